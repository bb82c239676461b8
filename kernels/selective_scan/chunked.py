"""The selective scan in plain PyTorch, all chunks at once, for machines without a C++ compiler."""

# B batch, E channels, L tokens = K chunks of T steps, N state

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ssmpretrain.kernels.selective_scan.inputs import ScanInputs
from ssmpretrain.kernels.transforms import inside_transform


def scan_in_chunks(inputs: ScanInputs) -> tuple[Tensor, Tensor]:
    """Return y and the last state of `selective_scan` in 2 sqrt(L) steps instead of L.

    All chunks are scanned at once, each from a zero state. Then the states at the ends are chained, and each chunk adds
    what its first state contributes: exp(A S_t) times it, where S_t is the sum of the step sizes since the chunk began.
    For negative A no exponent is positive, and nothing is divided by a decay that may have vanished.

    The states are N times as large as u. The backward pass computes them again: to keep them, training Vim-Ti at batch
    8 would need 20 GB. `torch.func` and forward mode cannot recompute, so there the states are kept.
    """
    if not torch.is_grad_enabled() or inside_transform():
        return _scan(inputs)
    result: tuple[Tensor, Tensor] = checkpoint(_scan, inputs, use_reentrant=False, preserve_rng_state=False)
    return result


def _scan(inputs: ScanInputs) -> tuple[Tensor, Tensor]:
    u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse = inputs
    x, dt = u.float(), delta.float()
    if delta_bias is not None:
        dt = dt + delta_bias.float().unsqueeze(-1)
    if delta_softplus:
        dt = F.softplus(dt)
    channels, tokens = u.shape[1:]
    rows_B, rows_C = (_per_channel(rows.float(), channels) for rows in (B, C))

    steps = math.isqrt(tokens - 1) + 1
    x_t, dt_t, B_t, C_t = (_by_step(t, steps, reverse) for t in (x, dt, rows_B, rows_C))  # T times (B, E, K, ...)
    A = A.unsqueeze(1)  # (E, 1, N)

    h = torch.zeros_like(x_t[0].unsqueeze(-1) * A)  # (B, E, K, N)
    elapsed = torch.zeros_like(x_t[0])
    local: list[Tensor] = []
    elapsed_t: list[Tensor] = []
    for t in range(steps):
        h = torch.exp(dt_t[t].unsqueeze(-1) * A) * h + (dt_t[t] * x_t[t]).unsqueeze(-1) * B_t[t].mT
        elapsed = elapsed + dt_t[t]
        local.append(h)
        elapsed_t.append(elapsed)

    state = torch.zeros_like(h[:, :, 0])
    entering: list[Tensor] = []
    for decay, end in zip(torch.exp(elapsed.unsqueeze(-1) * A).unbind(2), h.unbind(2), strict=True):
        entering.append(state)
        state = decay * state + end
    carried = torch.stack(entering, dim=2)

    y_t = [((local[t] + torch.exp(elapsed_t[t].unsqueeze(-1) * A) * carried) * C_t[t].mT).sum(-1) for t in range(steps)]
    y = torch.stack(y_t, dim=-1).flatten(2)[..., :tokens]
    if reverse:
        y = y.flip(-1)
    if D is not None:
        y = y + D.float().unsqueeze(-1) * x
    if z is not None:
        y = y * F.silu(z.float())
    return y.to(u.dtype), state


def _per_channel(rows: Tensor, channels: int) -> Tensor:
    """Give every channel its group's rows: (B, N, L) or (B, G, N, L) to (B, E or 1, N, L)."""
    if rows.ndim == 3:
        return rows.unsqueeze(1)
    return rows.repeat_interleave(channels // rows.shape[1], dim=1)


def _by_step(x: Tensor, steps: int, reverse: bool) -> tuple[Tensor, ...]:
    """Split (..., L) into step t of every chunk, T times (..., K); zeros fill the last chunk and change nothing."""
    if reverse:
        x = x.flip(-1)
    chunks = -(-x.shape[-1] // steps)
    padded = F.pad(x, (0, chunks * steps - x.shape[-1]))
    return padded.view(*x.shape[:-1], chunks, steps).unbind(-1)
