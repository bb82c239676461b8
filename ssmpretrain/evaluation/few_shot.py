"""A few labelled images of each class, drawn at random."""

from __future__ import annotations

import torch
from torch import Tensor


def draw_shots(labels: Tensor, shots: int, seed: int) -> Tensor:
    """Draw `shots` images of each class, or all that a class has; return their positions, sorted, int64.

    Args:
        labels: (N,).
        shots: At least 1.
        seed: Decides the draw, together with the labels. Of one seed, fewer shots are among more.
    """
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    shuffled = shuffled[labels[shuffled].argsort(stable=True)]  # class after class, each in random order
    counts = torch.unique(labels, return_counts=True)[1]
    place_in_class = torch.arange(len(labels)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    return shuffled[place_in_class < shots].sort().values
