"""Launch the core of Vim's mixer on the GPU.

It makes five passes over the activations: convolution of both directions from one read of x; x_proj; step sizes; scan
of both directions in one launch; sum, halving and gate. Projections are PyTorch's matrix products. Nothing is flipped.

The step sizes are computed before the scan, by a product of their own. Inside the scan they would cost R more
multiply-adds for each token and channel: R / N instructions per state update (0.75 for Vim-Ti, 3 for Vim-B, on top of
7), and R registers for each of a thread's four channels.
"""

import torch
from torch import Tensor

from ssmpretrain.kernels.bidirectional_scan.inputs import BidirectionalInputs, ScanDirection
from ssmpretrain.kernels.causal_conv1d import triton as causal_conv1d
from ssmpretrain.kernels.gpu import scan
from ssmpretrain.kernels.gpu.merge import merge
from ssmpretrain.kernels.gpu.projections import (
    gradient_rows,
    in_row_order,
    in_weight_order,
    low_rank,
    matmul_float32,
    num_columns,
)


def forward(inputs: BidirectionalInputs, keep_states: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return the output, x_dbl and, if asked, every CHUNK-th state for `backward` (otherwise nothing, (0,))."""
    xz = inputs.xz
    x, z = xz.chunk(2, dim=-1)
    p = _stack(inputs)
    u = _convolve(x, p)
    x_dbl = matmul_float32(u.flatten(1, 2), in_row_order(p.x_proj, *_rank_and_state(p)).mT).view(*u.shape[:3], -1)
    parts = torch.empty_like(u)
    states, _ = scan.forward(_scan(u, x_dbl, p), _per_route(parts), keep_states, want_last=False)
    out = xz.new_empty(x.shape)
    merge(parts, out, _scale(inputs), z)
    return out, x_dbl, xz.new_empty(0, dtype=torch.float32) if states is None or not keep_states else states


def backward(dout: Tensor, x_dbl: Tensor, states: Tensor, inputs: BidirectionalInputs) -> list[Tensor]:
    """Return the gradients of xz (in its dtype, contiguous) and of every parameter (float32).

    Convolution and step sizes are computed again, from xz and from x_dbl.
    """
    xz = inputs.xz
    x, z = xz.chunk(2, dim=-1)
    p = _stack(inputs)
    u = _convolve(x, p)
    du, ddelta, dz = (torch.empty_like(u) for _ in range(3))
    drows, dA, dD, ddt_bias = scan.backward(
        _scan(u, x_dbl, p, z),
        dout.mT.unsqueeze(1).expand(-1, len(u), -1, -1),
        None,
        states,
        _scale(inputs),
        (_per_route(du), _per_route(ddelta), _per_route(dz)),
    )
    assert dD is not None and ddt_bias is not None

    # the projections: all tokens of a batch in one matrix
    u, du, ddelta = (t.flatten(1, 2) for t in (u, du, ddelta))
    rank, state = _rank_and_state(p)
    ddt_proj = matmul_float32(ddelta.mT, _low_rank(x_dbl, p))
    dx_dbl = gradient_rows(drows.transpose(0, 1).flatten(1, 2), matmul_float32(ddelta, p.dt_proj)).to(xz.dtype)
    dx_proj = in_weight_order(matmul_float32(dx_dbl.mT, u), rank, state)
    du = torch.baddbmm(du, dx_dbl, in_row_order(p.x_proj, rank, state))

    dxz = torch.empty_like(xz, memory_format=torch.contiguous_format)
    dx, gate = dxz.chunk(2, dim=-1)
    merge(dz, gate)
    _, dconv_weight, dconv_bias = causal_conv1d.backward(
        du.view(dz.shape).mT, x.mT, p.conv_weight, p.conv_bias, reverse=False, silu=True, out=dx.mT
    )
    assert dconv_bias is not None
    stacked = ScanDirection(dconv_weight, dconv_bias, dx_proj, ddt_proj, ddt_bias, dA, dD)
    return [
        dxz,
        *(gradient[d].clone(memory_format=torch.contiguous_format) for d in range(len(dz)) for gradient in stacked),
    ]


def x_dbl_shape(inputs: BidirectionalInputs) -> tuple[int, ...]:
    """Return the shape of B, C and the low-rank step sizes side by side, (K, B, L, even columns)."""
    return len(inputs.directions), *inputs.xz.shape[:2], num_columns(*_rank_and_state(inputs.directions[0]))


def states_shape(inputs: BidirectionalInputs) -> tuple[int, ...]:
    """Return the shape of what the scan keeps for the backward pass."""
    batch, tokens, width = inputs.xz.shape
    _, state = _rank_and_state(inputs.directions[0])
    return scan.states_shape(batch, len(inputs.directions), width // 2, tokens, state)


def _stack(inputs: BidirectionalInputs) -> ScanDirection:
    """Stack the parameters of all directions, (K, ...); cast the projections to the dtype of the tokens."""
    p = ScanDirection(*(torch.stack(same) for same in zip(*inputs.directions, strict=True)))
    return p._replace(x_proj=p.x_proj.to(inputs.xz.dtype), dt_proj=p.dt_proj.to(inputs.xz.dtype))


def _rank_and_state(p: ScanDirection) -> tuple[int, int]:
    return p.dt_proj.shape[-1], p.A.shape[-1]


def _convolve(x: Tensor, p: ScanDirection) -> Tensor:
    """Return u of every direction, (K, B, L, E), contiguous."""
    return causal_conv1d.forward(x.mT, p.conv_weight, p.conv_bias, reverse=False, silu=True).mT.contiguous()


def _low_rank(x_dbl: Tensor, p: ScanDirection) -> Tensor:
    """Return the columns of x_dbl that give the step sizes, (K, B L, R)."""
    return low_rank(x_dbl, *_rank_and_state(p)).to(p.dt_proj.dtype).flatten(1, 2)


def _scan(u: Tensor, x_dbl: Tensor, p: ScanDirection, z: Tensor | None = None) -> scan.Scan:
    directions = len(u)
    delta = torch.bmm(_low_rank(x_dbl, p), p.dt_proj.mT).view(u.shape)  # before bias and softplus
    return scan.Scan(
        u=_per_route(u),
        delta=_per_route(delta),
        A=p.A,
        rows=x_dbl.transpose(0, 1),
        D=p.D,
        bias=p.dt_bias,
        z=None if z is None else z.mT.unsqueeze(1).expand(-1, directions, -1, -1),
        softplus=True,
        routes=(0, 1)[:directions],
    )


def _per_route(tensor: Tensor) -> Tensor:
    """View (K, B, L, E) as (B, K, E, L)."""
    return tensor.permute(1, 0, 3, 2)


def _scale(inputs: BidirectionalInputs) -> float:
    return 0.5 if inputs.divide_output and len(inputs.directions) == 2 else 1.0
