"""The decaying sum, one line of PyTorch per line of mathematics."""

import torch
from torch import Tensor


def decay_scan_reference(x: Tensor, log_decay: Tensor, *, reverse: bool = False) -> Tensor:
    """Compute `decay_scan` step by step."""
    steps = range(x.shape[1])
    h = torch.zeros_like(x[:, 0])
    y = [h] * x.shape[1]
    for t in reversed(steps) if reverse else steps:
        h = torch.exp(log_decay[:, t]) * h + x[:, t]
        y[t] = h
    return torch.stack(y, dim=1)
