"""Launch the scan along routes on the GPU for one state per channel: products by PyTorch, scans by `triton_kernels`.

Bytes that the forward pass moves per image, with s bytes per element of x and V = L E elements:

    x_dbl        s V read; 4 L P written
    two scans    s V for every order and scan, and 4 L P for each scan
    y            8 V for every order but the last, and 4 V: float32 throughout
    chunks       24 K V / 16: decay and end of every chunk written, read, replaced and read again

VMamba-T at 224 in bfloat16, 14 layers, V = 1.58e6 in all, 4 L P = 1.9e6: 50 MB. Where x and the partial y of a layer
stay in the L2 cache (50 MB hold 27 images of the first stage, 110 of the third), memory itself sees (s + 4) V and
x_dbl, about 12 MB.

For the backward pass x, x_dbl and 4 K V / 16 bytes of states are kept. The backward pass moves (s + 8) V for every
order (x once; dy, which is float32, twice), partial sums of dx as above, 3 K s V of the step sizes' gradients (written
once, read by two products), 3 s V in the products of x_proj, and 52 K V / 16 around the chunks. In bfloat16 these are
73 V bytes, or 115 MB for VMamba-T.
"""

# B batch, K routes, E channels, H x W map, L = H W, R rank of the step size, P = K (R + 2), C chunks

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from ssmpretrain.base.errors import UserError
from ssmpretrain.kernels.cross_scan.inputs import CrossScanInputs
from ssmpretrain.kernels.cross_scan.layout import channels_last, like_tokens, restore_layout
from ssmpretrain.kernels.cross_scan.routes import split_flip
from ssmpretrain.kernels.cross_scan.triton_kernels.backward import adjoint_ends, scan_gradients
from ssmpretrain.kernels.cross_scan.triton_kernels.forward import carry, chunk_ends, scan_chunks
from ssmpretrain.kernels.cross_scan.triton_kernels.steps import T
from ssmpretrain.kernels.dispatch import is_interpreting
from ssmpretrain.kernels.gpu.launch import launch
from ssmpretrain.kernels.gpu.projections import matmul_float32

CHUNK: int = T.value
"""Steps of a chunk; the states between chunks are what the backward pass starts from."""


def forward(inputs: CrossScanInputs, keep_states: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return the output, x_dbl and, if asked, the state before every chunk for `backward` (otherwise nothing, (0,)).

    The kernels read x with channels last; other layouts are copied.
    """
    x, x_proj, _, _, _, D, _ = inputs
    columns = max(x.shape[1], x_proj.shape[:2].numel())
    if x.shape[2] * x.shape[3] * columns >= 2**31:
        raise UserError(
            f"cross_selective_scan: on the GPU, H W times the larger of E and K (R + 2N) is below 2^31; "
            f"got x {tuple(x.shape)} and x_proj {tuple(x_proj.shape)}. Cut the map into tiles."
        )
    tokens = channels_last(x)
    weights, steps = _weights(inputs)
    x_dbl = matmul_float32(tokens.flatten(0, 1)[None], weights.mT[None]).view(x_dbl_shape(inputs))
    arguments = {"x": tokens, **_parameters(inputs, x_dbl, steps)}
    states = _boundaries(chunk_ends, inputs, arguments, backwards=False)
    y = torch.empty_like(x, dtype=torch.float32)
    out = like_tokens(y)
    arguments |= {"D": D.contiguous(), "starts": states}
    _run_orders(scan_chunks, inputs, _block(x), "y", out, arguments)
    restore_layout(y, out)
    return y, x_dbl, _empty(x, (0,)) if states is None or not keep_states else states


def backward(dy: Tensor, x_dbl: Tensor, states: Tensor, inputs: CrossScanInputs) -> list[Tensor]:
    """Return the gradients of x (in its dtype and layout) and of every parameter (float32)."""
    x, x_proj, dt_proj, _, A, D, _ = inputs
    tokens = channels_last(x)
    weights, steps = _weights(inputs)
    arguments = {"dy": channels_last(dy), **_parameters(inputs, x_dbl, steps)}
    adjoints = _boundaries(adjoint_ends, inputs, arguments, backwards=True)

    batch, count, num_chunks, channels = _chunks_shape(inputs)
    positions = tokens.shape[:2].numel()
    block = 32
    dstep = tokens.new_empty(count, positions, channels)
    dBC = _empty(x, (-(-channels // block), positions, count, 2))
    dbias, dA, dD = (_empty(x, (batch, count, num_chunks, channels)) for _ in range(3))
    dx = torch.empty_like(x)
    out = like_tokens(dx)
    arguments |= {"x": tokens, "D": D.contiguous(), "adjoints": adjoints}
    arguments |= {"starts": None if adjoints is None else states}
    arguments |= {"dstep": dstep, "dBC": dBC, "dbias": dbias, "dA": dA, "dD": dD}
    _run_orders(scan_gradients, inputs, block, "dx", out, arguments)

    rank = dt_proj.shape[2]
    ddt = matmul_float32(dstep, steps.mT).transpose(0, 1)  # (B L, K, R)
    drows = torch.cat([ddt, dBC.sum(0)], dim=-1).flatten(1).to(x.dtype)
    dt = x_dbl.view(positions, count, rank + 2)[..., :rank].transpose(0, 1).to(x.dtype)
    out.flatten(0, 1).addmm_(drows, weights)
    restore_layout(dx, out)
    return [
        dx,
        matmul_float32(drows.mT[None], tokens.flatten(0, 1)[None]).view_as(x_proj),
        matmul_float32(dstep.mT, dt),
        dbias.sum((0, 2)),
        dA.sum((0, 2)).view_as(A),
        dD.sum((0, 2)),
    ]


def x_dbl_shape(inputs: CrossScanInputs) -> tuple[int, ...]:
    """Return the shape of dt, B and C of every position and route, (B, L, P)."""
    batch, _, height, width = inputs.x.shape
    return batch, height * width, inputs.x_proj.shape[:2].numel()


def states_shape(inputs: CrossScanInputs) -> tuple[int, ...]:
    """Return the shape of what the scan keeps for the backward pass: nothing if one chunk covers the map."""
    shape = _chunks_shape(inputs)
    return shape if shape[2] > 1 else (0,)


def _chunks_shape(inputs: CrossScanInputs) -> tuple[int, int, int, int]:
    """Return the shape of a number per route, chunk and channel, (B, K, C, E)."""
    batch, channels, height, width = inputs.x.shape
    return batch, len(inputs.routes), -(-height * width // CHUNK), channels


def _empty(x: Tensor, shape: Sequence[int]) -> Tensor:
    return x.new_empty(shape, dtype=torch.float32)


def _weights(inputs: CrossScanInputs) -> tuple[Tensor, Tensor]:
    """Return the projections in x's dtype: x_proj as (P, E), dt_proj as (K, R, E), contiguous."""
    dtype = inputs.x.dtype
    return inputs.x_proj.flatten(0, 1).to(dtype), inputs.dt_proj.mT.to(dtype).contiguous()


def _parameters(inputs: CrossScanInputs, x_dbl: Tensor, steps: Tensor) -> dict[str, Any]:
    """Return the arguments that all kernels take for step sizes and decays."""
    return {"x_dbl": x_dbl, "weights": steps, "bias": inputs.dt_bias.contiguous(), "A": inputs.A.contiguous()}


def _orders(routes: Sequence[str]) -> list[tuple[str, tuple[int, ...]]]:
    """Group the routes by the order they read, at most four to a group; a route k is written as 2 k + flipped."""
    orders: dict[str, list[int]] = {}
    for k, route in enumerate(routes):
        base, flipped = split_flip(route)
        orders.setdefault(base, []).append(2 * k + flipped)
    return [(base, tuple(codes[i : i + 4])) for base, codes in orders.items() for i in range(0, len(codes), 4)]


def _block(x: Tensor) -> int:
    """Return the channels of a program: two a thread if registers allow it and few threads would idle, else one."""
    return 64 if x.dtype == torch.bfloat16 and (x.shape[1] % 64 == 0 or x.shape[1] > 256) else 32


def _boundaries(kernel: Any, inputs: CrossScanInputs, arguments: dict[str, Any], *, backwards: bool) -> Tensor | None:
    """Return the first state of every chunk, or its gradient if backwards; None if one chunk covers the map."""
    x, routes = inputs.x, inputs.routes
    batch, count, num_chunks, channels = shape = _chunks_shape(inputs)
    if num_chunks == 1:
        return None
    decays, ends = (_empty(x, shape) for _ in range(2))
    for order in _orders(routes):
        _launch(kernel, x, order, _block(x), {**arguments, "K": count, "decays": decays, "ends": ends})
    flips = sum(1 << k for k, route in enumerate(routes) if split_flip(route)[1] != backwards)
    launch(
        carry, (-(-channels // 32) * batch * count,), 1, decays=decays, ends=ends,
        C=num_chunks, FLIPS=flips, K=count, E=channels, BE=32,
    )  # fmt: skip
    return ends


def _run_orders(
    kernel: Any, inputs: CrossScanInputs, block: int, name: str, out: Tensor, arguments: dict[str, Any]
) -> None:
    """Run one order after the other. Each adds to the sum, in float32; the last one writes out, (B, L, E)."""
    x, routes = inputs.x, inputs.routes
    orders = _orders(routes)
    total = _empty(x, out.shape) if len(orders) > 1 else None
    for i, order in enumerate(orders):
        sums = {"before": None if i == 0 else total, name: out if i == len(orders) - 1 else total}
        _launch(kernel, x, order, block, {**arguments, **sums, "K": len(routes)})


def _launch(kernel: Any, x: Tensor, order: tuple[str, tuple[int, ...]], block: int, arguments: dict[str, Any]) -> None:
    """Start one program of one warp for every block of channels, chunk and map."""
    base, codes = order
    batch, channels, height, width = x.shape
    rank = arguments["weights"].shape[1]
    num_chunks = -(-height * width // CHUNK)
    launch(
        kernel, (-(-channels // block) * num_chunks * batch,), 1, **arguments,
        L=height * width, height=height, width=width, window=min(int(base[1:] or 1), max(height, width)),
        C=num_chunks, codes=sum(code << 16 * i for i, code in enumerate(codes)), count=len(codes),
        ORDER={"h": 0, "v": 1, "w": 2}[base[0]], E=channels, R=rank,
        RP=max(16, 1 << (rank - 1).bit_length()), BE=block, TERMS=2 if x.dtype == torch.bfloat16 else 3,
        FACTOR=tl.float32 if is_interpreting() else tl.bfloat16,  # the interpreter multiplies bfloat16 as integers
    )  # fmt: skip
