"""The selective scan, one line of PyTorch per line of mathematics."""

# B batch, E channels, L tokens, N state, G groups of channels that share B and C

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmpretrain.kernels.selective_scan.inputs import ScanInputs


def selective_scan_reference(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    *,
    reverse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute `selective_scan` step by step. All other implementations are tested against this one.

    Takes the arguments of `selective_scan` and returns its results. Computes in float64 when u is float64, in float32
    otherwise.
    """
    y, last = scan_step_by_step(ScanInputs(u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse))
    return (y, last) if return_last_state else y


def scan_step_by_step(inputs: ScanInputs) -> tuple[Tensor, Tensor]:
    """Return y and the last state in a loop over the tokens."""
    dtype = torch.float64 if inputs.u.dtype == torch.float64 else torch.float32
    x, dt, A, B, C = (t.to(dtype) for t in inputs[:5])
    if inputs.delta_bias is not None:
        dt = dt + inputs.delta_bias.to(dtype).unsqueeze(-1)
    if inputs.delta_softplus:
        dt = F.softplus(dt)
    channels, tokens = x.shape[1:]
    B_rows = _per_channel(B, channels)
    C_rows = _per_channel(C, channels)

    h = x.new_zeros(x.shape[0], channels, A.shape[1])
    y = [x[..., 0]] * tokens
    x_t, dt_t = x.unbind(-1), dt.unbind(-1)
    for t in reversed(range(tokens)) if inputs.reverse else range(tokens):
        decay = torch.exp(dt_t[t].unsqueeze(-1) * A)  # (B, E, N)
        h = decay * h + (dt_t[t] * x_t[t]).unsqueeze(-1) * B_rows[t]
        y[t] = (h * C_rows[t]).sum(-1)
    out = torch.stack(y, dim=-1)
    if inputs.D is not None:
        out = out + inputs.D.to(dtype).unsqueeze(-1) * x
    if inputs.z is not None:
        out = out * F.silu(inputs.z.to(dtype))
    return out.to(inputs.u.dtype), h


def _per_channel(rows: Tensor, channels: int) -> tuple[Tensor, ...]:
    """Return one row per token and channel: (B, N, L) or (B, G, N, L) to L views of (B, E or 1, N)."""
    if rows.ndim == 3:
        return rows.unsqueeze(1).unbind(-1)
    return rows.repeat_interleave(channels // rows.shape[1], dim=1).unbind(-1)
