"""`validate`: evaluate the weights of a checkpoint, or the initial weights if there is no checkpoint."""

from __future__ import annotations

from lightning.pytorch import LightningDataModule, LightningModule, Trainer

from ssmpretrain.base.errors import UserError
from ssmpretrain.run.options.run_options import RunOptions
from ssmpretrain.run.start.checkpoint_checks import restoring_from
from ssmpretrain.run.start.run_request import RunRequest
from ssmpretrain.run.start.run_start import RunStart
from ssmpretrain.training.ranks.agreement import RankAgreement
from ssmpretrain.training.ranks.launcher import check_launcher
from ssmpretrain.training.ranks.roll_call import LostRanks


def validate(
    trainer: Trainer,
    model: LightningModule,
    data: LightningDataModule | None,
    options: RunOptions,
    request: RunRequest,
    verbose: bool = True,
) -> None:
    """Evaluate `model` on the validation data. The function changes no file of a run in the folder.

    Args:
        trainer: Trainer of the recipe. This function adds the callbacks that compare the ranks.
        model: Objective to evaluate. It receives the weights of the checkpoint, if there is one.
        data: Data module; None if the recipe names none.
        options: Options of the run.
        request: Plain values of model, data and trainer.
        verbose: Whether to print a table of the metrics.

    Raises:
        UserError: If there are no validation images, or the checkpoint belongs to another model.
    """
    if getattr(data, "val", "") is None:
        raise UserError("validate: images to evaluate are in data.val; got null. Set data.val.")
    check_launcher(trainer)
    options.folder.check_links()
    start = RunStart.decide(options, request)
    if trainer.is_global_zero:
        start.tell()
    trainer.callbacks[:0] = [LostRanks(), RankAgreement(options.plain_settings)]  # type: ignore[attr-defined]
    with restoring_from(start.ckpt_path):
        trainer.validate(model, datamodule=data, ckpt_path=start.ckpt_path, verbose=verbose, weights_only=True)
