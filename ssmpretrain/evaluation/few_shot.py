"""Random choice of a few labelled images of each class."""

from __future__ import annotations

import torch
from torch import Tensor


def draw_shots(labels: Tensor, shots: int, seed: int) -> Tensor:
    """Draw `shots` images of each class, or all images of a smaller class.

    Args:
        labels: Labels (N,).
        shots: Images per class, at least 1.
        seed: Seed of the draw. With the same seed and labels, a draw with fewer shots is a subset of one with more.

    Returns:
        Positions of the drawn images in `labels`, sorted, int64.
    """
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    shuffled = shuffled[labels[shuffled].argsort(stable=True)]  # class after class; random order within a class
    counts = torch.unique(labels, return_counts=True)[1]
    place_in_class = torch.arange(len(labels)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    return shuffled[place_in_class < shots].sort().values
