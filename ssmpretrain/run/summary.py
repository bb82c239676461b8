"""The summary of a run, printed after training."""

from __future__ import annotations

from ssmpretrain.base.json_lines import read_rows, series
from ssmpretrain.base.run_folder import RunFolder

_METRICS = {
    "train/loss": "train loss", "val/loss": "val loss", "val/loss_ema": "EMA val loss", "val/top1": "top-1",
    "val/top1_ema": "EMA top-1", "val/top5": "top-5", "val/top5_ema": "EMA top-5", "val/knn": "kNN",
    "val/linear_probe": "linear probe", "val/effective_rank": "effective rank", "val/zeroshot_top1": "zero-shot",
    "val/zeroshot_held_out": "unseen classes", "val/i2t_r1": "R@1 image-text", "val/t2i_r1": "R@1 text-image",
    "val/mIoU": "mIoU", "val/mIoU_ema": "EMA mIoU", "val/box_AP": "box AP", "val/box_AP_ema": "EMA box AP",
    "val/mask_AP": "mask AP", "val/mask_AP_ema": "EMA mask AP",
}  # fmt: skip


def summary(folder: RunFolder, reported: str | None) -> str:
    """Return the first and last value of each main metric, and the paths of the files to open next.

    Args:
        folder: Folder of the run.
        reported: Description of the reported weights, e.g. the average; None if the run has one set of weights.
    """
    rows = read_rows(folder.metrics)
    lines = ["", f"{'run':<16}{folder.path}"]
    for name, label in _METRICS.items():
        if values := [value for _, value in series(rows, name)]:
            lines.append(f"{label:<16}{values[0]:.4g}" + (f" -> {values[-1]:.4g}" if len(values) > 1 else ""))
    if reported is not None:
        lines.append(f"{'reported':<16}{reported}")
    for label, path in (("checkpoint", folder.last_checkpoint), ("loss plot", folder.loss_plot),
                        ("pictures", folder.reconstruction), ("pictures", folder.predictions),
                        ("similarities", folder.similarity)):  # fmt: skip
        if path.exists():
            lines.append(f"{label:<16}{path}")
    return "\n".join(lines)
