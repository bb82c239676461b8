"""The plot of a run's metrics."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from matplotlib.figure import Figure

from ssmpretrain.base.json_lines import Row, read_rows, series
from ssmpretrain.base.run_folder import RunFolder
from ssmpretrain.callbacks.saved_figures import save_figure


class LossPlot(Callback):
    """Draw `plots/loss.png` from the run's metrics after every validation and at the end."""

    observes_only = True

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._draw(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._draw(trainer)

    def _draw(self, trainer: Trainer) -> None:
        folder = RunFolder(trainer.default_root_dir)
        if trainer.is_global_zero and not trainer.sanity_checking:
            draw_loss(read_rows(folder.metrics), folder.loss_plot)


def draw_loss(rows: list[Row], path: Path) -> None:
    """Plot the losses and the accuracies in `rows` of metrics.jsonl over the step, and save the figure at `path`."""
    panels = [
        ("loss", ["train/loss", "val/loss"]),
        ("top-1 accuracy", ["val/top1", "val/knn", "val/linear_probe"]),
        ("mIoU", ["val/mIoU"]),
        ("average precision", ["val/box_AP", "val/mask_AP"]),
    ]
    panels = [(label, names) for label, names in panels if any(series(rows, name) for name in names)]
    if not panels:
        return
    figure = Figure(figsize=(5 * len(panels), 3.4), dpi=110)  # not pyplot: its backend is the user's choice
    axes = figure.subplots(1, len(panels), squeeze=False)
    for axis, (label, names) in zip(axes[0], panels, strict=True):
        for name in names:
            if points := series(rows, name):
                style = {"linewidth": 1.0} if name == "train/loss" else {"marker": "o", "markersize": 3.5}
                axis.plot(*zip(*points, strict=True), label=name, **style)
        axis.set_xlabel("step")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.tight_layout()
    save_figure(figure, path)
