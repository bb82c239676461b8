"""Run the decaying sum on the CPU, in place."""

from itertools import pairwise

import torch
from torch import Tensor


def launch(x: Tensor, log_decay: Tensor, reverse: bool) -> Tensor:
    y, decay = x.clone(memory_format=torch.contiguous_format), log_decay.exp()
    steps = range(x.shape[1])
    order = list(reversed(steps) if reverse else steps)
    for before, t in pairwise(order):
        y[:, t].addcmul_(decay[:, t], y[:, before])
    return y
