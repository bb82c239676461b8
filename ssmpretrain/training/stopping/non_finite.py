"""Non-finite numbers: skip bad steps, stop a run that has diverged, and never save a non-finite weight."""

from __future__ import annotations

import logging
import math
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only
from torch.optim import Optimizer

from ssmpretrain.base import ranks
from ssmpretrain.base.errors import UserError
from ssmpretrain.training.optim.clipping import gradient_norms
from ssmpretrain.training.ranks.sharded_tensors import local

_log = logging.getLogger(__name__)
_REMEDY = (
    "with --allow_changes and a lower --model.optimizer.lr_per_256, a longer --model.schedule.warmup_epochs, "
    "--trainer.gradient_clip_val 1.0 (DINO: a lower --model.clip_per_tensor), or --trainer.precision 32."
)


class TrainingDiverged(UserError):
    """The loss, the gradients or the weights are no longer finite. The message gives the step and the remedy."""

    exit_code = 1


class NonFiniteGuard(Callback):
    """Skip optimizer steps whose gradient is not finite, and stop the run after several in a row.

    A gradient counts as finite if its norm is. The norm overflows float32 from 1.8e19 on, as the squares do that AdamW
    keeps; it would never change such a weight again.

    A non-finite loss makes every gradient non-finite, and under DDP the averaged gradient is non-finite on every rank,
    so all ranks take the same decision without communication. Under FSDP2 each rank has a part of the gradient, and the
    ranks combine their norms first.

    Args:
        max_in_a_row: Number of skipped steps in a row that stops the run, at least 1.

    It also warns once if no step of an epoch returned a loss, as then nothing is trained.

    Logs:
        train/skipped_steps: Number of steps skipped since the run began.

    Raises:
        TrainingDiverged: After `max_in_a_row` skipped steps in a row, or instead of saving a non-finite weight.
    """

    def __init__(self, max_in_a_row: int = 5) -> None:
        if max_in_a_row < 1:
            raise UserError(f"NonFiniteGuard: max_in_a_row is at least 1; got {max_in_a_row}")
        self.max_in_a_row = max_in_a_row
        self.skipped = 0
        self._in_a_row = 0
        self._has_loss: set[bool] = set()  # over the steps of this epoch
        self._told = False

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._has_loss.clear()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if pl_module.automatic_optimization:  # where Lightning makes a dictionary of what the step returned
            self._has_loss.add(bool(outputs) and outputs.get("loss") is not None)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._has_loss == {False} and not self._told:
            self._told = True
            _warn_of_no_loss(type(pl_module).__name__)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        trained = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norms = gradient_norms([p.grad for p in trained]).tolist() if trained else []
        bad = [number for number, norm in enumerate(norms) if not math.isfinite(norm)]
        if bad:
            optimizer.zero_grad(set_to_none=True)  # without gradients a step changes neither weights nor moments
            name = next((name for name, p in pl_module.named_parameters() if p is trained[bad[0]]), "a parameter")
            self._count_skip(trainer, f"{len(bad)} of {len(norms)} gradients, first {name} with norm {norms[bad[0]]}")
        else:
            self._in_a_row = 0
        pl_module.log("train/skipped_steps", float(self.skipped))

    def _count_skip(self, trainer: Trainer, what: str) -> None:
        self.skipped += 1
        self._in_a_row += 1
        _log.warning("step %d skipped: loss or gradient is not finite (%s)", trainer.global_step, what)
        if self._in_a_row >= self.max_in_a_row:
            raise TrainingDiverged(
                f"step {trainer.global_step}: the gradient was not finite {self._in_a_row} times in a row; the run has "
                f"diverged. The last checkpoint is finite: continue from it {_REMEDY}"
            )

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        bad = [
            name
            for name, value in checkpoint["state_dict"].items()
            if value.is_floating_point() and not local(value).isfinite().all()
        ]
        parts = ranks.gather(bad)  # under FSDP2 a rank sees only its rows, and all must stop
        bad = list(dict.fromkeys(name for part in parts for name in part))
        if bad:
            raise TrainingDiverged(
                f"checkpoint at step {trainer.global_step} not written: {len(bad)} tensors are not finite, first "
                f"{bad[0]}. Continue from the previous checkpoint {_REMEDY}"
            )

    def state_dict(self) -> dict[str, int]:
        return {"skipped": self.skipped}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.skipped = state_dict["skipped"]


@rank_zero_only
def _warn_of_no_loss(name: str) -> None:
    _log.warning(
        "train: training_step of %s returned None in every step of the epoch; nothing was trained. Return the loss.",
        name,
    )
