"""Loss and accuracies over a validation set, exact over all processes."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def percent(share: float) -> str:
    """Format a share in [0, 1], as `12.34 %`."""
    return f"{100 * share:.2f} %"


def right_ones(logits: Tensor, labels: Tensor) -> Tensor:
    """Count the images whose label has the largest logit, and those whose label is among the five largest.

    Args:
        logits: Logits (..., B, num_classes). With fewer than six classes every label is among the first five.
        labels: Labels (B,).

    Returns:
        Both counts, (..., 2), int64.
    """
    likeliest = logits.topk(min(5, logits.shape[-1])).indices
    hits = likeliest == labels.unsqueeze(-1)  # (..., B, 5), at most one True per row
    return torch.stack([hits[..., 0].sum(dim=-1), hits.sum(dim=(-2, -1))], dim=-1)


class Accuracy:
    """Accumulate the loss and the hits over a validation set. Each process counts its own part.

    Args:
        device: Device of the logits.
    """

    def __init__(self, device: torch.device | str) -> None:
        self._counts = torch.zeros(3, dtype=torch.int64, device=device)  # images, top-1 hits, top-5 hits
        self._loss = torch.zeros((), device=device)

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Add a batch: logits (B, num_classes) of any floating-point type, and labels (B,)."""
        logits = logits.float()
        self._counts[0] += len(labels)
        self._counts[1:] += right_ones(logits, labels)
        self._loss += F.cross_entropy(logits, labels, reduction="sum")

    def result(self, total: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """Return the cross-entropy "loss", and the accuracies "top1" and "top5" in [0, 1].

        With fewer than six classes "top5" is 1. Without images the dictionary is empty.

        Args:
            total: Function that sums a tensor over the processes.
        """
        images, first, among_five = total(self._counts)
        if images == 0:
            return {}
        return {"loss": total(self._loss) / images, "top1": first / images, "top5": among_five / images}
