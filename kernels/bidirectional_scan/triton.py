"""Run the core of Vim's mixer on the GPU.

Five passes over the activations: convolution of both directions from one read of x; x_proj; the step sizes; the scan,
both directions in one launch; sum, halving and gate. Projections are PyTorch's matrix products. Nothing is flipped.

The step sizes are a product of their own because the rank does not pay inside the scan: R more multiply-adds for each
token and channel are R / N of an instruction per state update (0.75 for Vim-Ti, 3 for Vim-B, on top of 7), and R
registers per channel, four channels a thread.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ssmpretrain.kernels.causal_conv1d import triton as causal_conv1d
from ssmpretrain.kernels.gpu import scan
from ssmpretrain.kernels.gpu.projections import (
    gradient_rows,
    in_row_order,
    in_weight_order,
    low_rank,
    matmul_float32,
    num_columns,
)

_CONV_WEIGHT, _CONV_BIAS, _X_PROJ, _DT_PROJ, _DT_BIAS, _A, _D = range(7)  # places in a direction


def forward(
    xz: Tensor, parameters: Sequence[Tensor], divide_output: bool, keep_states: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the output, x_dbl and, if asked, every CHUNK-th state for `backward` (otherwise nothing, (0,)).

    Args:
        xz: (B, L, 2E), any strides.
        parameters: The seven tensors of each direction, float32.
        divide_output: Halve the sum of two directions.
        keep_states: Keep what the backward pass needs.
    """
    x, z = xz.chunk(2, dim=-1)
    u = _convolve(x, parameters)
    x_dbl = _project(u, parameters)
    inputs = _scan(u, _step_sizes(x_dbl, parameters, xz.dtype), x_dbl, parameters)
    parts = torch.empty_like(u)
    states, _ = scan.forward(inputs, _per_route(parts), keep_states, want_last=False)
    out = xz.new_empty(x.shape)
    scan.merge(parts, out, _scale(parameters, divide_output), z)
    return out, x_dbl, xz.new_empty(0, dtype=torch.float32) if states is None or not keep_states else states


def backward(
    dout: Tensor, x_dbl: Tensor, states: Tensor, xz: Tensor, parameters: Sequence[Tensor], divide_output: bool
) -> list[Tensor]:
    """Return the gradients of xz (in its dtype, contiguous) and of every parameter (float32).

    Convolution and step sizes are computed again, from xz and from x_dbl.
    """
    x, z = xz.chunk(2, dim=-1)
    directions = len(parameters) // 7
    u = _convolve(x, parameters)
    delta = _step_sizes(x_dbl, parameters, xz.dtype)
    inputs = _scan(u, delta, x_dbl, parameters, z)
    du, ddelta, dz = (torch.empty_like(u) for _ in range(3))
    drows, dA, dD, dbias = scan.backward(
        inputs,
        dout.mT.unsqueeze(1).expand(-1, directions, -1, -1),
        None,
        states,
        _scale(parameters, divide_output),
        (_per_route(du), _per_route(ddelta), _per_route(dz)),
    )
    assert dD is not None and dbias is not None

    # the projections: all tokens of a batch in one matrix
    u, du, ddelta = (t.flatten(1, 2) for t in (u, du, ddelta))
    rank, state = _rank_and_state(parameters)
    dt_proj = _stacked(parameters, _DT_PROJ, xz.dtype)
    ddt_proj = matmul_float32(ddelta.mT, low_rank(x_dbl, rank, state).to(xz.dtype).flatten(1, 2))
    dx_dbl = gradient_rows(drows.transpose(0, 1).flatten(1, 2), matmul_float32(ddelta, dt_proj)).to(xz.dtype)
    dx_proj = in_weight_order(matmul_float32(dx_dbl.mT, u), rank, state)
    du = torch.baddbmm(du, dx_dbl, _x_proj(parameters, xz.dtype))

    dxz = torch.empty_like(xz, memory_format=torch.contiguous_format)
    dx, gate = dxz.chunk(2, dim=-1)
    scan.merge(dz, gate)
    conv_weight, conv_bias = _stacked(parameters, _CONV_WEIGHT), _stacked(parameters, _CONV_BIAS)
    _, dconv_weight, dconv_bias = causal_conv1d.backward(
        du.view(dz.shape).mT, x.mT, conv_weight, conv_bias, reverse=False, silu=True, out=dx.mT
    )
    assert dconv_bias is not None
    stacked = (dconv_weight, dconv_bias, dx_proj, ddt_proj, dbias, dA, dD)
    return [
        dxz,
        *(gradient[d].clone(memory_format=torch.contiguous_format) for d in range(directions) for gradient in stacked),
    ]


def x_dbl_shape(xz: Tensor, parameters: Sequence[Tensor]) -> tuple[int, ...]:
    """Return the shape of B, C and the low-rank step sizes side by side, (K, B, L, even columns)."""
    return len(parameters) // 7, *xz.shape[:2], num_columns(*_rank_and_state(parameters))


def states_shape(xz: Tensor, parameters: Sequence[Tensor]) -> tuple[int, ...]:
    """Return the shape of what the scan keeps for the backward pass."""
    batch, tokens, width = xz.shape
    return scan.states_shape(batch, len(parameters) // 7, width // 2, tokens, parameters[_A].shape[1])


def _convolve(x: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """Return u of every direction, (K, B, L, E), contiguous."""
    weight, bias = _stacked(parameters, _CONV_WEIGHT), _stacked(parameters, _CONV_BIAS)
    return causal_conv1d.forward(x.mT, weight, bias, reverse=False, silu=True).mT.contiguous()


def _project(u: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """Return x_dbl, (K, B, L, P), float32."""
    return matmul_float32(u.flatten(1, 2), _x_proj(parameters, u.dtype).mT).view(*u.shape[:3], -1)


def _step_sizes(x_dbl: Tensor, parameters: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Return the step sizes before bias and softplus, (K, B, L, E)."""
    dt = low_rank(x_dbl, *_rank_and_state(parameters)).to(dtype).flatten(1, 2)
    return torch.bmm(dt, _stacked(parameters, _DT_PROJ, dtype).mT).view(*x_dbl.shape[:3], -1)


def _x_proj(parameters: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Return the weight of x_proj in the order of x_dbl, (K, P, E)."""
    return in_row_order(_stacked(parameters, _X_PROJ, dtype), *_rank_and_state(parameters))


def _rank_and_state(parameters: Sequence[Tensor]) -> tuple[int, int]:
    return parameters[_DT_PROJ].shape[1], parameters[_A].shape[1]


def _scan(u: Tensor, delta: Tensor, x_dbl: Tensor, parameters: Sequence[Tensor], z: Tensor | None = None) -> scan.Scan:
    directions = u.shape[0]
    return scan.Scan(
        u=_per_route(u),
        delta=_per_route(delta),
        A=_stacked(parameters, _A),
        rows=x_dbl.transpose(0, 1),
        D=_stacked(parameters, _D),
        bias=_stacked(parameters, _DT_BIAS),
        z=None if z is None else z.mT.unsqueeze(1).expand(-1, directions, -1, -1),
        softplus=True,
        routes=(0, 1)[:directions],
    )


def _per_route(tensor: Tensor) -> Tensor:
    """View (K, B, L, E) as (B, K, E, L)."""
    return tensor.permute(1, 0, 3, 2)


def _stacked(parameters: Sequence[Tensor], place: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.stack(list(parameters[place::7])).to(dtype)


def _scale(parameters: Sequence[Tensor], divide_output: bool) -> float:
    return 0.5 if divide_output and len(parameters) == 14 else 1.0
