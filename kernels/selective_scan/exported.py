"""The selective scan as a graph of PyTorch's own operations, small at any length: for exported programs and ONNX."""

# B batch, E channels, L tokens = K chunks of T steps, N state, G groups of channels that share B and C

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmpretrain.kernels.selective_scan.inputs import ScanInputs


def scan_for_export(inputs: ScanInputs) -> tuple[Tensor, Tensor]:
    """Return y and the last state, (B, G, E / G, N), of `selective_scan` in two loops of sqrt(L) steps.

    The chunks are those of `scan_in_chunks`, but each loop is one node of the graph: PyTorch's `scan`, which ONNX calls
    `Scan`. Unrolled, the 48 scans of Vim-Ti would be graphs of thousands of nodes. There are no gradients.
    """
    from torch._higher_order_ops.scan import scan_op  # a prototype in PyTorch; nothing else should depend on it

    u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse = inputs
    x, dt = u.float(), delta.float()
    if delta_bias is not None:
        dt = dt + delta_bias.float().unsqueeze(-1)
    if delta_softplus:
        dt = F.softplus(dt)
    B, C = (rows.float().unsqueeze(1) if rows.ndim == 3 else rows.float() for rows in (B, C))
    tokens, groups, state = u.shape[-1], *B.shape[1:3]
    A = A.float().view(groups, -1, state)  # (G, E / G, N)
    by_group = [torch.unflatten(t, 1, (groups, -1)) for t in (dt, dt * x)]
    sizes = [A.shape[1], A.shape[1], state, state]
    dt_t, x_t, B_t, C_t = torch.split(_by_step(torch.cat([*by_group, B, C], dim=2), reverse), sizes, dim=-1)

    h = torch.zeros_like(dt_t[0].unsqueeze(-1) * A, memory_format=torch.contiguous_format)  # (B, K, G, E / G, N)
    ends, y = scan_op(_step, [h], [dt_t, x_t, B_t, C_t], (A,))
    elapsed = dt_t.cumsum(0)
    by_chunk = [t.transpose(0, 1).contiguous() for t in (elapsed[-1], ends)]
    last, entering = scan_op(_chain, [torch.zeros_like(by_chunk[1][0])], by_chunk, (A,))
    carried = torch.exp(elapsed.unsqueeze(-1) * A) * entering.transpose(0, 1)
    y = y + (carried * C_t.unsqueeze(-2)).sum(-1)

    y = y.permute(1, 3, 4, 2, 0).flatten(3).flatten(1, 2)[..., :tokens]
    if reverse:
        y = y.flip(-1)
    if D is not None:
        y = y + D.float().unsqueeze(-1) * x
    if z is not None:
        y = y * F.silu(z.float())
    return y.to(u.dtype), last  # by group: another shape would be another node, also where nobody asks for the state


def _step(h: Tensor, dt: Tensor, x: Tensor, B: Tensor, C: Tensor, A: Tensor) -> list[Tensor]:
    """Return the state after one step of every chunk, and the output of the step."""
    h = torch.exp(dt.unsqueeze(-1) * A) * h + x.unsqueeze(-1) * B.unsqueeze(-2)
    return [h, (h * C.unsqueeze(-2)).sum(-1)]


def _chain(state: Tensor, elapsed: Tensor, end: Tensor, A: Tensor) -> list[Tensor]:
    """Return the state after a whole chunk, and a copy of the state before it."""
    return [torch.exp(elapsed.unsqueeze(-1) * A) * state + end, state.clone()]


def _by_step(x: Tensor, reverse: bool) -> Tensor:
    """Return step t of every chunk: (B, G, c, L) to (T, B, K, G, c). Zeros fill the last chunk and change nothing."""
    if reverse:
        x = x.flip(-1)
    tokens = x.shape[-1]
    steps = math.isqrt(tokens - 1) + 1
    chunks = -(-tokens // steps)
    padded = F.pad(x, (0, chunks * steps - tokens))
    return torch.unflatten(padded, -1, (chunks, steps)).permute(4, 0, 3, 1, 2).contiguous()
