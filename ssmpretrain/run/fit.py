"""`fit`: train a run in its folder, from its checkpoint or from the start."""

from __future__ import annotations

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer

from ssmpretrain.run.options.run_options import RunOptions
from ssmpretrain.run.start.checkpoint_checks import restoring_from
from ssmpretrain.run.start.folder_at_start import FolderAtStart, claim
from ssmpretrain.run.start.lock import RunLock
from ssmpretrain.run.start.run_request import RunRequest
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
    request: RunRequest,
) -> None:
    """Train `model` on `data` in the folder of the run, and print a summary. A complete run is not trained further.

    Args:
        trainer: Trainer of the recipe. This function adds the callbacks that need to know where the run starts.
        model: Objective to train, changed in place.
        data: Data module; None if the recipe names none.
        options: Options of the run.
        request: Plain values of model, data and trainer.

    Raises:
        UserError: If the run cannot start. Nothing in its folder is changed in this case.
    """
    folder, first = options.folder, trainer.is_global_zero
    # A trial changes nothing of a run in the folder.
    is_trial = bool(trainer.fast_dev_run)  # type: ignore[attr-defined]
    check_launcher(trainer)
    folder.check_links()
    with RunLock(folder.path, at_once=first and not is_trial and folder.path.is_dir()) as lock:
        start = RunStart() if is_trial else RunStart.decide(options, request)
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
            print(summary(folder, request.reported))


def _add_callbacks(trainer: Trainer, options: RunOptions, start: RunStart, is_trial: bool) -> None:
    """Add the callbacks that know where the run starts."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    if not is_trial:  # after the recipe's callbacks, which may refuse the run; before ours, which write to the folder
        ours = next(number for number, one in enumerate(callbacks) if isinstance(one, ExactResume))
        callbacks.insert(ours, FolderAtStart(options, start))
    # On a slow file system a rank may see an older checkpoint than the others.
    callbacks[:0] = [LostRanks(), RankAgreement({**options.plain_settings, "step to begin at": start.step})]
