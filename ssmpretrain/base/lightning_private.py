"""Lightning's private parts: every private name of Lightning that this package uses, each with the reason.

No other file of the package uses one, which a test checks. `tests/base/test_lightning_private.py` names the version of
Lightning that these functions were checked with: an upgrade that moves a private name fails there.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable
from datetime import timedelta
from subprocess import Popen
from typing import Any, NamedTuple

from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.utilities.distributed import _set_num_threads_if_needed
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loops.utilities import _reset_progress
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector
from torch.distributed.constants import default_pg_timeout

_FRAME_OF_LIGHTNING = re.compile(r"/lightning/(pytorch|fabric)/")
_FRAME_OF_RESTORING = "checkpoint_connector.py"

# Where training stands. Lightning has no public property for any of these questions.


def epoch_has_no_batch_left(trainer: Trainer) -> bool:
    """Return whether the last batch of the training epoch was taken; a callback must know it before Lightning acts."""
    return trainer.fit_loop.epoch_loop._num_ready_batches_reached()


def is_accumulating(trainer: Trainer) -> bool:
    """Return whether the optimizer step of the present batch waits for further batches."""
    return trainer.fit_loop._should_accumulate()


def stops_early(trainer: Trainer) -> bool:
    """Return whether a callback asked for the end of training, and min_steps and min_epochs allow it."""
    return bool(trainer.should_stop and trainer.fit_loop._can_stop_early)


# What Lightning would do otherwise in a continued run


def forget_restart(trainer: Trainer) -> None:
    """Have the first epoch of a continued run step its schedulers; a restarting loop leaves out the first step."""
    trainer.fit_loop._restarting = False


def log_by_optimizer_step(trainer: Trainer) -> None:
    """Set the step of log entries to the optimizer step; restarts and max_steps move Lightning's own by one."""
    trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step


def validate_now(trainer: Trainer) -> None:
    """Run a whole validation before the first step, as Lightning runs its sanity check."""
    loop = trainer.fit_loop.epoch_loop.val_loop
    trainer.validating = True
    loop.run()
    _reset_progress(loop)
    trainer.training = True


def log_training_step(trainer: Trainer) -> None:
    """Log a training step now if its row is due; Lightning does so only after all callbacks.

    A run that is killed between its checkpoint and this row would continue without the row.
    """
    connector = trainer._logger_connector
    if trainer.training and connector._first_loop_iter is not None:
        connector.update_train_step_metrics()


def watch_fetching(loop: Any, before: Callable[[], None], after: Callable[[], None]) -> None:
    """Call `before` and `after` around every batch that `loop` fetches; no hook of a callback is called there.

    Args:
        loop: The training epoch loop, or an evaluation loop.
        before: Called after Lightning's own method that precedes a fetch.
        after: Called before Lightning's own method that follows a fetch.
    """
    kind = type(loop)

    def on_before() -> None:
        kind._on_before_fetch(loop)
        before()

    def on_after() -> None:
        after()
        kind._on_after_fetch(loop)

    loop._on_before_fetch, loop._on_after_fetch = on_before, on_after


# Checkpoints


class LoopCounts(NamedTuple):
    """Counters of Lightning's loops inside a checkpoint; dictionaries that may be changed in place."""

    epochs: dict[str, dict[str, int]]  # "current" and "total", each with ready, started, processed, completed
    batches: dict[str, Any]  # the same counters, and "is_last_batch"
    validation: dict[str, Any]  # the same counters


def loop_counts(checkpoint: dict[str, Any]) -> LoopCounts:
    """Return the counters that say where training stood when `checkpoint` was made."""
    loops = checkpoint["loops"]["fit_loop"]
    return LoopCounts(
        loops["epoch_progress"], loops["epoch_loop.batch_progress"], loops["epoch_loop.val_loop.batch_progress"]
    )


def finished_epochs(checkpoint: dict[str, Any]) -> int:
    """Return the number of epochs that were finished when `checkpoint` was made."""
    return int(checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"])


def has_loop_counts(checkpoint: dict[str, Any]) -> bool:
    """Return whether the state of the loops has all entries that this package reads, each a count of at least 0."""
    try:
        loops = checkpoint["loops"]["fit_loop"]
        parts = [loops["epoch_progress"]["current"], loops["epoch_loop.batch_progress"]["current"]]
    except (KeyError, TypeError):
        return False
    counts = [part.get(name) for part in parts for name in ("ready", "completed", "started", "processed")]
    return all(type(count) is int and count >= 0 for count in counts)


def set_logged_steps(checkpoint: dict[str, Any], steps: int) -> None:
    """Set Lightning's step of log entries inside a checkpoint; see `log_by_optimizer_step`."""
    checkpoint["loops"]["fit_loop"]["epoch_loop.state_dict"]["_batches_that_stepped"] = steps


def checkpoint_of(trainer: Trainer) -> dict[str, Any]:
    """Return the content of a checkpoint; `trainer.save_checkpoint` would meet the other ranks at a barrier."""
    return trainer._checkpoint_connector.dump_checkpoint(weights_only=False)


def was_restoring(error: BaseException) -> bool:
    """Return whether Lightning was restoring the state of a checkpoint when `error` was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    return any("restore" in frame.name for frame in frames if frame.filename.endswith(_FRAME_OF_RESTORING))


def raised_by_lightning(error: BaseException) -> bool:
    """Return whether Lightning itself found something wrong and raised `error`, as for options of the Trainer."""
    frames = traceback.extract_tb(error.__traceback__)
    if not frames or _FRAME_OF_LIGHTNING.search(frames[-1].filename) is None:
        return False
    return (frames[-1].line or "").startswith("raise ")


# Signals


class _NoHandlers(_SignalConnector):
    """Lightning's state of signals, without its handlers."""

    def register_signal_handlers(self) -> None:
        pass


def leave_signals_alone(trainer: Trainer) -> None:
    """Have Lightning install no handlers of signals: its own save in the middle of a step and report success.

    Ranks do not wait for word from rank 0 before each batch either, which its handlers need.
    """
    trainer._signal_connector = _NoHandlers(trainer)
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]


def stop_after_this_step(trainer: Trainer) -> None:
    """End training once Lightning has logged the present step; it looks at the flag that its handler would set."""
    trainer._signal_connector.received_sigterm = True


# Processes


def cluster_environment_of(trainer: Trainer) -> ClusterEnvironment:
    """Return what started the processes of this job; a strategy of one device has no public attribute for it."""
    return trainer._accelerator_connector.cluster_environment


class ScriptLauncher(_SubprocessScriptLauncher):
    """Lightning's launcher, which starts the other ranks as further processes of the same command.

    It has no public base class that `Launcher` in `training.ranks` could be derived from.
    """

    def start_children(self) -> None:
        """Start the other ranks of this machine."""
        self._call_children_scripts()

    def limit_threads(self) -> None:
        """Divide the threads of the machine among its ranks, unless OMP_NUM_THREADS says how many."""
        _set_num_threads_if_needed(num_processes=self.num_processes)


def use_launcher(strategy: Strategy, kind: type[ScriptLauncher]) -> None:
    """Replace Lightning's launcher by one of `kind`; the strategy makes its own when it is connected to a trainer."""
    theirs = strategy.launcher
    if type(theirs) is _SubprocessScriptLauncher:
        strategy._launcher = kind(theirs.cluster_environment, theirs.num_processes, theirs.num_nodes)


def script_children(trainer: Trainer) -> list[Popen[bytes]]:
    """Return the ranks that this process started, the launcher's own list; empty for another launcher."""
    launcher = trainer.strategy.launcher
    return launcher.procs if isinstance(launcher, _SubprocessScriptLauncher) else []


def limit_waiting(strategy: Any, timeout: timedelta) -> None:
    """Set how long ranks wait for one another; a timeout that the recipe gave the strategy stays.

    The strategy is made before the trainer is known, and `timeout` is an argument of its constructor alone.
    """
    if getattr(strategy, "_timeout", None) == default_pg_timeout:
        strategy._timeout = timeout


def shard_over_all_ranks(strategy: ModelParallelStrategy) -> None:
    """Shard the data parallel way over all ranks of the job; before they are known the constructor takes no such size.

    Lightning's own "auto" shards over nodes, and splits tensors over the devices of one.
    """
    strategy._data_parallel_size = strategy.num_nodes * strategy.num_processes
    strategy._tensor_parallel_size = 1


# Command line


class CommandLine(LightningCLI):
    """LightningCLI that reads no checkpoint while it parses."""

    def _parse_ckpt_path(self) -> None:
        """Leave hyper-parameters of a checkpoint out of the recipe; Lightning reads them before the file is checked."""

    @property
    def parser_of_command(self) -> LightningArgumentParser:
        """The parser of the options of this subcommand; Lightning keeps it to itself."""
        return self._parser(self.subcommand)
