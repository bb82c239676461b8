"""`fit`: train a run in its folder, from its checkpoint or from the start."""

from __future__ import annotations

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer

from ssmpretrain.run.options.run_options import RunOptions
from ssmpretrain.run.start.checkpoint_checks import restoring_from
from ssmpretrain.run.start.folder_at_start import FolderAtStart, claim
from ssmpretrain.run.start.lock import RunLock
from ssmpretrain.run.start.planned_run import PlannedRun
from ssmpretrain.run.start.run_start import RunStart
from ssmpretrain.run.summary import summary
from ssmpretrain.training.checkpoints.exact_resume import ExactResume
from ssmpretrain.training.ranks.agreement import RankAgreement
from ssmpretrain.training.ranks.launcher import check_launcher
from ssmpretrain.training.ranks.roll_call import LostRanks


def fit(
    trainer: Trainer,
    model: LightningModule,
    data: LightningDataModule | None,
    options: RunOptions,
    planned: PlannedRun,
) -> None:
    """Train `model` on `data` in the folder of the run, and print a summary. Of a complete run nothing is trained.

    Args:
        trainer: With all callbacks but those that know where the run starts.
        model: Trained in place.
        data: Its data.
        options: Of the command.
        planned: The run, in plain values.

    Raises:
        UserError: If the run cannot start. Nothing in its folder has changed then.
    """
    folder, first = options.folder, trainer.is_global_zero
    # A trial leaves the run in the folder alone.
    is_trial = bool(trainer.fast_dev_run)  # type: ignore[attr-defined]
    check_launcher(trainer)
    folder.check_links()
    with RunLock(folder.path, at_once=first and not is_trial and folder.path.is_dir()) as lock:
        start = RunStart() if is_trial else RunStart.decide(options, planned)
        ckpt_path = options.ckpt_path if is_trial else start.ckpt_path
        if first:
            start.tell()
        if is_trial:
            folder.prepare()
        elif first and not start.complete:
            claim(options, start, lock)
        if not start.complete:
            _add_callbacks(trainer, options, start, is_trial)
            with restoring_from(ckpt_path):
                trainer.fit(model, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
        if first:
            print(summary(folder, planned.reported))


def _add_callbacks(trainer: Trainer, options: RunOptions, start: RunStart, is_trial: bool) -> None:
    """Add the callbacks that know where the run starts."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    if not is_trial:  # after those of the recipe, which may refuse the run, and before ours, which write to the folder
        ours = next(number for number, one in enumerate(callbacks) if isinstance(one, ExactResume))
        callbacks.insert(ours, FolderAtStart(options, start))
    # On a slow file system a rank may see an older checkpoint than the others.
    callbacks[:0] = [LostRanks(), RankAgreement({**options.plain_settings, "step to begin at": start.step})]
