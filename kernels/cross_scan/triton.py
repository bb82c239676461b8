"""Launch the scan along routes on the GPU for several states per channel, as in VMamba's first family (N = 16).

The kernels are those of Vim's scan, `gpu.scan`: states in registers, sequential in time; each route finds its positions
by arithmetic. Every route writes an output of its own in float32, and a last pass adds them. One state per channel has
kernels of its own, `triton_one_state`.
"""

# B batch, K routes, E channels, H x W map, L = H W, N state, R rank of the step size

import torch
from torch import Tensor

from ssmpretrain.kernels.cross_scan.inputs import CrossScanInputs
from ssmpretrain.kernels.cross_scan.layout import channels_last, like_tokens, restore_layout
from ssmpretrain.kernels.cross_scan.routes import split_flip, visiting_order
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


def forward(inputs: CrossScanInputs, keep_states: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return the output, x_dbl and, if asked, every CHUNK-th state for `backward` (otherwise nothing, (0,)).

    The kernels read x with channels last; other layouts are copied.
    """
    x = inputs.x
    tokens = channels_last(x)
    rank, state = _rank_and_state(inputs)
    weight = in_row_order(inputs.x_proj.to(x.dtype), rank, state).flatten(0, 1)
    x_dbl = matmul_float32(tokens.flatten(0, 1).unsqueeze(0), weight.mT.unsqueeze(0))
    num_routes = len(inputs.routes)
    x_dbl = x_dbl.view(*tokens.shape[:2], num_routes, -1)  # (B, L, K, P)
    parts = tokens.new_empty(num_routes, *tokens.shape, dtype=torch.float32)
    states, _ = scan.forward(_scan(inputs, tokens, x_dbl), parts.permute(1, 0, 3, 2), keep_states, want_last=False)
    y = torch.empty_like(x, dtype=torch.float32)
    out = like_tokens(y)
    merge(parts, out)
    restore_layout(y, out)
    kept = x.new_empty(0, dtype=torch.float32) if states is None or not keep_states else states
    return y, x_dbl, kept


def backward(dy: Tensor, x_dbl: Tensor, states: Tensor, inputs: CrossScanInputs) -> list[Tensor]:
    """Return the gradients of x (in its dtype and layout) and of every parameter (float32)."""
    x, x_proj, dt_proj = inputs.x, inputs.x_proj, inputs.dt_proj
    tokens, dy = channels_last(x), channels_last(dy)
    count, (rank, state) = len(inputs.routes), _rank_and_state(inputs)
    du, ddelta = (tokens.new_empty(count, *tokens.shape) for _ in range(2))
    drows, dA, dD, dbias = scan.backward(
        _scan(inputs, tokens, x_dbl),
        dy.mT.unsqueeze(1).expand(-1, count, -1, -1),
        None,
        states,
        1.0,
        (du.permute(1, 0, 3, 2), ddelta.permute(1, 0, 3, 2)),
    )
    assert dD is not None and dbias is not None

    ddelta = ddelta.flatten(1, 2)
    ddt_proj = matmul_float32(ddelta.mT, _low_rank(x_dbl, rank, state, x.dtype))
    dlow_rank = matmul_float32(ddelta, dt_proj.to(x.dtype))
    dx_dbl = gradient_rows(drows.transpose(0, 1).flatten(1, 2), dlow_rank).to(x.dtype)  # (K, B L, P)
    dx_proj = matmul_float32(dx_dbl.mT, tokens.flatten(0, 1).expand(count, -1, -1))
    weight = in_row_order(x_proj.to(x.dtype), rank, state)
    du = torch.baddbmm(du.flatten(1, 2), dx_dbl, weight).view(du.shape)
    dx = torch.empty_like(x)
    out = like_tokens(dx)
    merge(du, out)
    restore_layout(dx, out)
    return [dx, in_weight_order(dx_proj, rank, state), ddt_proj, dbias, dA, dD]


def x_dbl_shape(inputs: CrossScanInputs) -> tuple[int, ...]:
    """Return the shape of B, C and the low-rank step sizes of every position and route, (B, L, K, P)."""
    batch, _, height, width = inputs.x.shape
    return batch, height * width, len(inputs.routes), num_columns(*_rank_and_state(inputs))


def states_shape(inputs: CrossScanInputs) -> tuple[int, ...]:
    """Return the shape of what the scan keeps for the backward pass."""
    batch, channels, height, width = inputs.x.shape
    return scan.states_shape(batch, len(inputs.routes), channels, height * width, inputs.A.shape[2])


def _rank_and_state(inputs: CrossScanInputs) -> tuple[int, int]:
    return inputs.dt_proj.shape[2], inputs.A.shape[2]


def _scan(inputs: CrossScanInputs, tokens: Tensor, x_dbl: Tensor) -> scan.Scan:
    x, _, dt_proj, dt_bias, A, D, routes = inputs
    height, width = x.shape[2:]
    dt = _low_rank(x_dbl, *_rank_and_state(inputs), x.dtype)
    delta = torch.bmm(dt, dt_proj.to(x.dtype).mT).view(len(routes), *tokens.shape)
    codes = tuple(_code(route) for route in routes)
    orders = None
    if any(code > 1 for code in codes):
        orders = torch.stack([visiting_order(route, height, width, x.device) for route in routes])
    return scan.Scan(
        u=tokens.mT.unsqueeze(1).expand(-1, len(routes), -1, -1),
        delta=delta.permute(1, 0, 3, 2),
        A=A.contiguous(),
        rows=x_dbl.transpose(1, 2),
        D=D.contiguous(),
        bias=dt_bias.contiguous(),
        z=None,
        softplus=True,
        routes=codes,
        size=(height, width),
        orders=orders,
    )


def _low_rank(x_dbl: Tensor, rank: int, state: int, dtype: torch.dtype) -> Tensor:
    """Return the columns of x_dbl that give the step sizes, (K, B L, R)."""
    return low_rank(x_dbl, rank, state).to(dtype).permute(2, 0, 1, 3).flatten(1, 2)


def _code(route: str) -> int:
    """Return 2 order + flip, order 0 for rows, 1 for columns, w for windows; windows of 1 are rows."""
    base, flip = split_flip(route)
    order = {"h": 0, "v": 1}.get(base)
    if order is None:
        order = int(base[1:]) if int(base[1:]) > 1 else 0
    return 2 * order + flip
