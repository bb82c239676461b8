"""Show what a masked model predicts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from matplotlib.figure import Figure
from torch import Tensor

from ssmpretrain.training.run_folder import RunFolder


class Reconstructions(Callback):
    """After every validation, draw image, visible part, prediction of the hidden part, and both together.

    Writes `plots/reconstruction.png` in the run's folder (always the newest) from the first validation batch, with
    masks that stay the same from epoch to epoch. The folder is `trainer.default_root_dir`.

    Args:
        num_images: Rows of the figure, at least 1.
    """

    def __init__(self, num_images: int = 6) -> None:
        if num_images < 1:
            raise ValueError(f"Reconstructions: num_images is at least 1; got {num_images}")
        self.num_images = num_images
        self._images: Tensor | None = None

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if batch_idx == 0:
            self._images = batch["image"][: self.num_images]

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or not trainer.is_global_zero or self._images is None:
            return
        data = trainer.datamodule  # type: ignore[attr-defined]
        path = RunFolder(trainer.default_root_dir).reconstruction
        draw_reconstructions(pl_module, self._images, data.mean, data.std, path)


@torch.no_grad()
def draw_reconstructions(model: Any, images: Tensor, mean: Any, std: Any, path: Path, seed: int = 0) -> None:
    """Write a figure with one row per image: the image, its visible part, the predicted hidden part, both together.

    Args:
        model: An objective with `reconstruct`, `predicted_images` and `patch_size`, e.g. MAE.
        images: Normalised images, (B, 3, H, W).
        mean, std: What `images` were normalised with, three numbers each.
        path: PNG file to write; its folder is created.
        seed: Fixes the masks.
    """
    result = model.reconstruct(images, torch.Generator(images.device).manual_seed(seed))
    predicted = model.predicted_images(images, result)
    p = model.patch_size
    grid = result.hidden.reshape(len(images), 1, images.shape[2] // p, images.shape[3] // p)
    hidden = grid.repeat_interleave(p, 2).repeat_interleave(p, 3)  # (B, 1, H, W)

    scale, shift = torch.tensor(std).view(1, 3, 1, 1), torch.tensor(mean).view(1, 3, 1, 1)
    image, guess = ((x.float().cpu() * scale + shift).clamp(0, 1) for x in (images, predicted))
    hidden = hidden.cpu()
    columns = {
        "image": image,
        f"visible ({1 - float(hidden.float().mean()):.0%})": torch.where(hidden, torch.tensor(0.75), image),
        "prediction": torch.where(hidden, guess, torch.tensor(0.75)),  # what it says where it sees is not trained
        "both together": torch.where(hidden, guess, image),
    }
    figure = Figure(figsize=(2.0 * len(columns), 2.0 * len(images) + 0.3), dpi=110)
    axes = figure.subplots(len(images), len(columns), squeeze=False)
    for axis, title in zip(axes[0], columns, strict=True):
        axis.set_title(title, fontsize=8)
    for row, cells in zip(axes, zip(*columns.values(), strict=True), strict=True):
        for axis, cell in zip(row, cells, strict=True):
            axis.imshow(cell.permute(1, 2, 0).numpy(), interpolation="nearest")
            axis.axis("off")
    figure.tight_layout(pad=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
