"""`validate`: evaluate the weights of a checkpoint, or those that training would begin with."""

from __future__ import annotations

from lightning.pytorch import LightningDataModule, LightningModule, Trainer

from ssmpretrain.base.errors import UserError
from ssmpretrain.run.options.run_options import RunOptions
from ssmpretrain.run.start.checkpoint_checks import restoring_from
from ssmpretrain.run.start.planned_run import PlannedRun
from ssmpretrain.run.start.run_start import RunStart
from ssmpretrain.training.ranks.agreement import RankAgreement
from ssmpretrain.training.ranks.launcher import check_launcher
from ssmpretrain.training.ranks.roll_call import LostRanks


def validate(
    trainer: Trainer,
    model: LightningModule,
    data: LightningDataModule | None,
    options: RunOptions,
    planned: PlannedRun,
    verbose: bool = True,
) -> None:
    """Evaluate `model` on the validation data. A run in the folder is left as it is.

    Args:
        trainer: With all callbacks but those that compare ranks.
        model: Takes the weights of the checkpoint, if the command means one.
        data: Its data.
        options: Of the command.
        planned: The run, in plain values.
        verbose: Print a table of the metrics.

    Raises:
        UserError: If there is nothing to validate, or the checkpoint is of another model.
    """
    if getattr(data, "val", "") is None:
        raise UserError("validate: images to evaluate are in data.val; got null. Set data.val.")
    check_launcher(trainer)
    options.folder.check_links()
    start = RunStart.decide(options, planned)
    if trainer.is_global_zero:
        start.tell()
    trainer.callbacks[:0] = [LostRanks(), RankAgreement(options.plain_settings)]  # type: ignore[attr-defined]
    with restoring_from(start.ckpt_path):
        trainer.validate(model, datamodule=data, ckpt_path=start.ckpt_path, verbose=verbose, weights_only=True)
