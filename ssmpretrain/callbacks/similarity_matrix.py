"""A picture of the similarities between images and captions."""

from __future__ import annotations

import textwrap
import unicodedata
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from ssmpretrain.base.errors import UserError
from ssmpretrain.base.run_folder import RunFolder, takes_results
from ssmpretrain.callbacks.saved_figures import save_figure


class SimilarityMatrix(Callback):
    """Draw the similarities of images (columns) and captions (rows) after every validation.

    The figure `plots/similarity.png` in the run's folder always shows the newest validation. It uses the first images
    with captions of the first validation batch, and the first caption of each. The folder is
    `trainer.default_root_dir`. The command `validate` does not replace the figure of a run.

    Args:
        num_images: Number of rows and of columns, at least 2. A smaller batch gives fewer.

    Raises:
        ValueError: If `num_images` is below 2; when training begins, if the objective has no text tower.
    """

    observes_only = True

    def __init__(self, num_images: int = 12) -> None:
        if num_images < 2:
            raise UserError(f"SimilarityMatrix: num_images is at least 2; got {num_images}.")
        self.num_images = num_images
        self._drawn: tuple[Tensor, list[str], Tensor] | None = None  # images, captions, similarities

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not hasattr(pl_module, "encode_text"):
            raise UserError(
                f"SimilarityMatrix: images are compared with captions; {type(pl_module).__name__} has no text tower. "
                "Use CLIP, or Reconstructions for masked objectives."
            )

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        if batch_idx == 0:
            images, captions = first_pairs(batch, self.num_images)
            alike = outputs["text"][captions] @ outputs["image"][images].T
            self._drawn = batch["image"][images], [batch["text"][i] for i in captions.tolist()], alike

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or not trainer.is_global_zero or self._drawn is None or not takes_results(trainer):
            return
        images, captions, alike = self._drawn
        data = trainer.datamodule  # type: ignore[attr-defined]
        shift, scale = (torch.tensor(numbers).view(1, 3, 1, 1) for numbers in (data.mean, data.std))
        pictures = (images.float().cpu() * scale + shift).clamp(0, 1)
        path = RunFolder(trainer.default_root_dir).similarity
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph .* missing")  # the font lacks letters of some languages
            save_figure(draw_similarities(pictures, captions, alike.float().cpu()), path)


def first_pairs(batch: Any, number: int) -> tuple[Tensor, Tensor]:
    """Return the indices of the first captioned images of a batch and of the first caption of each.

    Returns:
        Two tensors (n,), int64, with n at most `number`.
    """
    owner = batch.get("owner", torch.arange(len(batch["text"]), device=batch["image"].device))
    images = torch.unique(owner)[:number]
    return images, torch.searchsorted(owner, images)


_CELL, _TEXT, _EDGE = 0.5, 2.6, 0.05  # inches
_LETTERS = 40  # letters of a caption in one line


def draw_similarities(pictures: Tensor, captions: Sequence[str], alike: Tensor) -> Figure:
    """Draw similarities as coloured squares; 0 and below are white.

    A frame marks the matching pairs. Bold type marks the most similar image of each caption.

    Args:
        pictures: Images, (n, 3, H, W), in [0, 1].
        captions: Texts of the n images; each takes two lines at most.
        alike: Cosine similarity of caption i (row) and image j (column), (n, n), in [-1, 1].
    """
    n = len(captions)
    width, height = _TEXT + n * _CELL + 2 * _EDGE, (n + 1) * _CELL + 3 * _EDGE
    figure = Figure(figsize=(width, height), dpi=200)  # not pyplot: its backend is the user's choice
    for column, picture in enumerate(pictures.permute(0, 2, 3, 1).numpy()):
        left, bottom = _EDGE + _TEXT + (column + 0.04) * _CELL, height - _EDGE - _CELL
        thumbnail = figure.add_axes((left / width, bottom / height, 0.92 * _CELL / width, 0.92 * _CELL / height))
        thumbnail.imshow(picture, interpolation="nearest", aspect="auto")
        thumbnail.axis("off")
    grid = figure.add_axes(((_EDGE + _TEXT) / width, _EDGE / height, n * _CELL / width, n * _CELL / height))
    grid.imshow(alike.numpy(), cmap="Blues", vmin=0, vmax=1, aspect="auto")
    grid.axis("off")
    best = alike.argmax(1).tolist()
    for row, values in enumerate(alike.tolist()):
        for column, value in enumerate(values):
            colour = "white" if value > 0.6 else "black"
            weight = "bold" if column == best[row] else "normal"
            grid.text(
                column,
                row,
                f"{round(value, 2) + 0:.2f}",
                size=6.5,
                ha="center",
                va="center",
                color=colour,
                weight=weight,
            )
        grid.add_patch(
            Rectangle((row - 0.48, row - 0.48), 0.96, 0.96, fill=False, edgecolor="tab:orange", linewidth=1.6)
        )
        y = (_EDGE + (n - row - 0.5) * _CELL) / height
        figure.text(
            (_TEXT - _EDGE) / width, y, _two_lines(captions[row]), size=7.5, ha="right", va="center", parse_math=False
        )
    return figure


def _two_lines(caption: str) -> str:
    """Break a caption into at most two lines, with an ellipsis if it is longer."""
    wide = any(unicodedata.east_asian_width(letter) in "WF" for letter in caption[:200])
    letters = _LETTERS // 2 if wide else _LETTERS
    lines = textwrap.wrap(caption[:200], letters)
    if len(lines) > 2 or len(caption) > 200:
        lines = [lines[0], lines[1][: letters - 1] + "…"]
    return "\n".join(lines)
