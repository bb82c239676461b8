"""Pictures of the predictions of a masked model."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from matplotlib.figure import Figure
from torch import Tensor

from ssmpretrain.base.errors import UserError
from ssmpretrain.base.run_folder import RunFolder, takes_results
from ssmpretrain.callbacks.saved_figures import save_figure


class Reconstructions(Callback):
    """Draw images, their visible parts, the predictions, and both together after every validation.

    The figure `plots/reconstruction.png` in the run's folder always shows the newest validation. It uses the first
    validation batch, and the same masks in every epoch. The folder is `trainer.default_root_dir`. The command
    `validate` does not replace the figure of a run.

    Args:
        num_images: Rows of the figure, at least 1.
    """

    observes_only = True

    def __init__(self, num_images: int = 6) -> None:
        if num_images < 1:
            raise UserError(f"Reconstructions: num_images is at least 1; got {num_images}")
        self.num_images = num_images
        self._images: Tensor | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not hasattr(pl_module, "reconstruct"):
            raise UserError(
                f"Reconstructions: {type(pl_module).__name__} predicts no pixels. Leave the callback out, or use MAE, "
                "SimMIM, ARM or MAECLIP."
            )

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if batch_idx == 0:
            self._images = batch["image"][: self.num_images]

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or not trainer.is_global_zero or self._images is None or not takes_results(trainer):
            return
        data = trainer.datamodule  # type: ignore[attr-defined]
        model: Any = pl_module
        with torch.no_grad():
            predicted = model.reconstruct(self._images, torch.Generator(self._images.device).manual_seed(0))
            figure = draw_columns(model.pictures(self._images, predicted, data.mean, data.std))
        path = RunFolder(trainer.default_root_dir).reconstruction
        save_figure(figure, path)


_CELL, _GAP, _TITLE = 1.35, 0.05, 0.22  # inches: four cells and three gaps fill a text width of 5.55


def draw_columns(columns: dict[str, Tensor]) -> Figure:
    """Draw columns of pictures under their titles, with a thin gap between pictures, at 300 dots per inch.

    Args:
        columns: Pictures by title, as `Pretraining.pictures` gives them: (B, 3, H, W) each, in [0, 1].
    """
    rows, _, H, W = next(iter(columns.values())).shape
    cell = _CELL * H / W
    width = len(columns) * (_CELL + _GAP) - _GAP
    height = _TITLE + rows * (cell + _GAP) - _GAP
    figure = Figure(figsize=(width, height), dpi=300)  # not pyplot: its backend is the user's choice
    for number, (title, pictures) in enumerate(columns.items()):
        left = number * (_CELL + _GAP)
        figure.text((left + _CELL / 2) / width, 1 - _TITLE / 2 / height, title, size=8, ha="center", va="center")
        for row, picture in enumerate(pictures.permute(0, 2, 3, 1).numpy()):
            bottom = height - _TITLE - row * (cell + _GAP) - cell
            axis = figure.add_axes((left / width, bottom / height, _CELL / width, cell / height))
            axis.imshow(picture, interpolation="nearest", aspect="auto")
            axis.axis("off")
    return figure
