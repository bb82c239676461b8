"""The SSD as a recurrence over time, one line of PyTorch per line of mathematics."""

# B batch, L tokens, H heads, P channels of a head, G groups, N state

import torch
from torch import Tensor

from ssmpretrain.kernels.dispatch import without_autocast
from ssmpretrain.kernels.ssd.inputs import SSDInputs


def ssd_reference(inputs: SSDInputs) -> Tensor:
    """Compute an SSD step by step, (B, L, H, P), in float32, or in float64 for a float64 x.

    All other implementations are tested against this one.
    """
    x, B, C, D = inputs.x, inputs.B, inputs.C, inputs.D
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    with without_autocast(x.device.type):
        heads_per_group = x.shape[2] // B.shape[2]
        x_t, B_t, C_t = (
            x.to(dtype),
            *(rows.to(dtype).repeat_interleave(heads_per_group, dim=2) for rows in (B, C)),
        )
        y = sum(
            (_one_direction(x_t, dt.to(dtype), A.to(dtype), B_t, C_t, reverse) for dt, A, reverse in inputs.directions),
            torch.zeros_like(x_t),
        )
        y = inputs.scale * y
        if D is not None:
            y = y + D.to(dtype).unsqueeze(-1) * x_t
        return y if inputs.wide else y.to(x.dtype)


def _one_direction(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, reverse: bool) -> Tensor:
    """Return y_t = C_t . h_t with h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t, from the last token on if reverse."""
    h = x.new_zeros(x.shape[0], *x.shape[2:], B.shape[3])  # (B, H, P, N)
    outputs = []
    steps = range(x.shape[1])
    for t in reversed(steps) if reverse else steps:
        decay = torch.exp(dt[:, t] * A)[..., None, None]
        h = decay * h + (dt[:, t].unsqueeze(-1) * x[:, t]).unsqueeze(-1) * B[:, t].unsqueeze(-2)
        outputs.append((h * C[:, t].unsqueeze(-2)).sum(-1))
    return torch.stack(outputs[::-1] if reverse else outputs, dim=1)
