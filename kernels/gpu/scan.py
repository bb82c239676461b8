"""Launch the scan over time on the GPU: K routes over one set of positions, forward and backward."""

# B batch, K routes, E channels, L positions, N state

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmpretrain.kernels.gpu.launch import launch
from ssmpretrain.kernels.gpu.triton_kernels.scan_backward import scan_backward
from ssmpretrain.kernels.gpu.triton_kernels.scan_chunks import carry_states, chunk_ends
from ssmpretrain.kernels.gpu.triton_kernels.scan_forward import scan_forward

CHUNK = 64
"""Steps between two states that the forward pass keeps for the backward pass."""

_STATES_AT_ONCE = 16  # that fit into registers; more are taken in groups
_TILE = 4  # steps that the backward pass keeps in registers
_SCHEDULERS = 528  # of warps on an H100 or H200
_FULL = 2 * _SCHEDULERS  # programs of one warp that keep them busy: one computes while another waits


@dataclass(frozen=True)
class Scan:
    """The inputs of a scan. Strides are free, but channels should have stride 1: threads hold neighbouring channels.

    u, delta: Input and step size before bias and softplus, (B, K, E, L), by position.
    A: (K, E, N), float32.
    rows: B and C of every position, (B, K, L, P), float32, 8-byte aligned: B from column 0, C from `row_of_C(N)`.
    D, bias: (K, E), float32, or None.
    z: Gate before its SiLU, (B, K, E, L), or None.
    routes: 2 order + flip of every route, or one code for all; orders as in `scan_steps.position_of`.
    size: Height and width of the map that the L positions form; needed for orders other than 0.
    orders: Positions in the order of each route, (K, L), int64, where a route's order is not 0.
    """

    u: Tensor
    delta: Tensor
    A: Tensor
    rows: Tensor
    D: Tensor | None
    bias: Tensor | None
    z: Tensor | None
    softplus: bool
    routes: tuple[int, ...]
    size: tuple[int, int] = (1, 1)
    orders: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """B, K, E, L, N."""
        batch, routes, channels, tokens = self.u.shape
        return batch, routes, channels, tokens, self.A.shape[2]

    @property
    def mapped(self) -> bool:
        return any(route > 1 for route in self.routes)


def row_of_C(state: int) -> int:
    """Return the column of `rows` where C begins: N rounded up to even, so that pairs are aligned."""
    return -(-state // 2) * 2


def states_shape(batch: int, routes: int, channels: int, tokens: int, state: int) -> tuple[int, int, int, int, int]:
    """Return the shape of the states at the starts of chunks, (B, K, chunks, N, E)."""
    return batch, routes, -(-tokens // CHUNK), state, channels


def forward(scan: Scan, y: Tensor, keep_states: bool, want_last: bool) -> tuple[Tensor | None, Tensor | None]:
    """Run the scan and write y, (B, K, E, L), any dtype and strides.

    Returns:
        The states at the starts of chunks if asked or if chunks run in parallel, and the last state, (B, K, E, N), if
        asked.
    """
    batch, routes, channels, tokens, state = scan.shape
    block, parallel = _plan(batch * routes, channels, tokens)
    states = last = None
    if keep_states or parallel:
        states = scan.u.new_empty(states_shape(*scan.shape), dtype=torch.float32)
    if want_last:
        last = scan.u.new_empty(batch, routes, channels, state, dtype=torch.float32)
    if parallel:
        assert states is not None
        for first, count in _groups(state):
            end = None if last is None else last[..., first:]
            _fill_states(scan, states[:, :, :, first:], None, end, first, count)
    blocks, chunks = -(-channels // block), -(-tokens // CHUNK)
    segments = chunks if parallel else 1
    groups = list(_groups(state))
    sums = [torch.empty_like(y, dtype=torch.float32) for _ in groups[1:]]  # up to and including each group but the last
    for i, (first, count) in enumerate(groups):
        is_first, is_last = i == 0, i == len(groups) - 1
        launch(
            scan_forward, (batch * routes * blocks * segments,), 1,
            u=scan.u, delta=scan.delta, A=scan.A[..., first:], rows=scan.rows[..., first:],
            D=scan.D if is_first else None, bias=scan.bias, z=scan.z if is_last else None,
            partial=None if is_first else sums[i - 1], y=y if is_last else sums[i],
            states=None if states is None else states[:, :, :, first:],
            last=None if last is None or parallel else last[..., first:],
            **_sizes(scan), **_strides("u", scan.u), **_strides("delta", scan.delta), **_strides("z", scan.z),
            **_strides("y", y), **_rows(scan), rows_c=row_of_C(state), **_parameters(scan),
            states_c=state * channels, last_e=state,
            BLOCKS=blocks, CHUNKS=chunks, SEGMENTS=segments, K=routes, **_constants(scan),
            FROM_STATES=parallel, N=count, BE=block,
        )  # fmt: skip
    return states, last


def backward(
    scan: Scan, dout: Tensor, dlast: Tensor | None, states: Tensor, scale: float, gradients: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Compute every gradient of `forward`.

    Args:
        scan: As for the forward pass.
        dout: Gradient of y, (B, K, E, L), any strides; it is multiplied by `scale`.
        dlast: Gradient of the last state, (B, K, E, N), float32, or None.
        states: From the forward pass.
        scale: Factor on dout.
        gradients: du, ddelta and, with a gate, dz to write, (B, K, E, L); du and ddelta have the same strides.

    Returns:
        The gradients of rows as (B, K, L, 2, N), B's before C's, and of A, D and bias, all float32.
    """
    batch, routes, channels, tokens, state = scan.shape
    block, parallel = _plan(batch * routes, channels, tokens)
    blocks, chunks = -(-channels // block), -(-tokens // CHUNK)
    segments = chunks if parallel else 1
    groups = list(_groups(state))

    def zeros(*shape: int) -> Tensor:
        return scan.u.new_zeros(batch, routes, segments, *shape, dtype=torch.float32)

    drows = scan.u.new_empty(batch, routes, tokens, 2, state, dtype=torch.float32)
    dA = scan.u.new_empty(routes, channels, state, dtype=torch.float32)
    dD = None if scan.D is None else zeros(channels)
    dbias = None if scan.bias is None else zeros(channels)
    sums = gradients if len(groups) == 1 else tuple(torch.empty_like(t, dtype=torch.float32) for t in gradients)
    du, ddelta, dz = (*sums, None)[:3]
    for i, (first, count) in enumerate(groups):
        carry, dA_parts = zeros(count, channels), zeros(count, channels)
        start = None if dlast is None else dlast[..., first : first + count]
        if parallel:
            _fill_states(scan, carry, start, None, first, count, adjoint=(dout, scale))
        elif start is not None:
            carry.copy_(start.mT.unsqueeze(2))
        packed = _pack(scan, first, count)
        dpacked = packed.new_empty(blocks, *packed.shape)
        launch(
            scan_backward, (batch * routes * blocks * segments,), 1,
            dout=dout, u=scan.u, delta=scan.delta, A=scan.A[..., first:], rows=scan.rows[..., first:], packed=packed,
            D=scan.D if i == 0 else None, bias=scan.bias, z=scan.z, states=states[:, :, :, first:], carry=carry,
            scratch=packed.new_empty(batch * routes * segments * blocks * (CHUNK // _TILE) * count * block),
            du=du, ddelta=ddelta, dz=dz, dpacked=dpacked, dA=dA_parts, dD=dD, dbias=dbias,
            **_sizes(scan), **_strides("dout", dout), **_strides("u", scan.u), **_strides("delta", scan.delta),
            **_strides("z", scan.z), **_strides("du", du), **_strides("dz", dz), **_rows(scan),
            rows_c=row_of_C(state), packed_size=packed[0, 0].numel(), dpacked_block=packed.numel(),
            **_parameters(scan), states_c=state * channels, scale=scale,
            BLOCKS=blocks, CHUNKS=chunks, SEGMENTS=segments, K=routes, **_constants(scan),
            ADD=i > 0, FROM_STATES=parallel, N=count, T=_TILE, BE=block,
        )  # fmt: skip
        drows[..., first : first + count] = _unpack(scan, dpacked.sum(0))
        dA[..., first : first + count] = dA_parts.sum(2).sum(0).mT
    for total, gradient in zip(sums, gradients, strict=True):
        if total is not gradient:
            gradient.copy_(total)
    return drows, dA, None if dD is None else dD.sum(2).sum(0), None if dbias is None else dbias.sum(2).sum(0)


def _fill_states(
    scan: Scan,
    states: Tensor,
    initial: Tensor | None,
    last: Tensor | None,
    first: int,
    count: int,
    adjoint: tuple[Tensor, float] | None = None,
) -> None:
    """Write the state that every chunk starts from, for `count` states from `first` on.

    The chunks are scanned from zero, all at once; then the states are carried from chunk to chunk.

    Args:
        scan: The scan.
        states: (B, K, chunks, at least count, E), written.
        initial: State before the first chunk, (B, K, E, count) and any strides, or None for zero.
        last: Where to write the state after the last chunk, (B, K, E, count or more), or None.
        first, count: Which states.
        adjoint: dout and its factor. With it, the gradient of the state is carried, from the last chunk to the first.
    """
    batch, routes, channels, tokens, state = scan.shape
    block, _ = _plan(batch * routes, channels, tokens)
    blocks, chunks = -(-channels // block), -(-tokens // CHUNK)
    source, scale = (scan.u, 1.0) if adjoint is None else adjoint
    column = first if adjoint is None else row_of_C(state) + first
    sums = states.new_empty(batch, routes, chunks, channels)
    A = scan.A[..., first:]
    launch(
        chunk_ends, (batch * routes * blocks * chunks,), 1,
        u=source, delta=scan.delta, A=A, rows=scan.rows[..., column:], bias=scan.bias,
        z=None if adjoint is None else scan.z, ends=states, sums=sums,
        **_sizes(scan), **_strides("u", source), **_strides("delta", scan.delta), **_strides("z", scan.z),
        **_rows(scan), **_parameters(scan, skip=False), states_c=states.stride(2), scale=scale,
        BLOCKS=blocks, CHUNKS=chunks, K=routes, **_constants(scan), ADJOINT=adjoint is not None, N=count, BE=block,
    )  # fmt: skip
    if initial is not None:
        initial = initial.contiguous()
    launch(
        carry_states, (batch * routes * blocks * count,), 1,
        A=A, ends=states, sums=sums, initial=initial, last=last, E=channels,
        A_k=scan.A.stride(0), A_e=scan.A.stride(1), A_n=scan.A.stride(2), states_c=states.stride(2),
        initial_e=count, last_e=0 if last is None else last.stride(2),
        BLOCKS=blocks, CHUNKS=chunks, K=routes, N=count, ADJOINT=adjoint is not None, BE=block,
    )  # fmt: skip


def _plan(sequences: int, channels: int, tokens: int) -> tuple[int, bool]:
    """Return the channels of a program and whether the chunks of a sequence run in parallel.

    Four channels a thread cost the fewest instructions. If that leaves a large GPU idle, a short sequence gets programs
    of fewer channels. A long one is cut into chunks, which doubles its exponentials: that pays if schedulers are empty.
    """
    widths = [width for width in (128, 64, 32) if width < 2 * channels or width == 32]
    wide, narrow = widths[0], widths[-1]
    if tokens > 8 * CHUNK:
        return wide, sequences * -(-channels // wide) < _SCHEDULERS
    full = [width for width in widths if sequences * -(-channels // width) >= _FULL]
    return (full[0] if full else narrow), False


def _groups(state: int) -> Iterator[tuple[int, int]]:
    """Yield (first, count) of the groups in which states are taken."""
    for first in range(0, state, _STATES_AT_ONCE):
        yield first, min(_STATES_AT_ONCE, state - first)


def _pack(scan: Scan, first: int, count: int) -> Tensor:
    """Return B and C of some states in tiles of steps, (B, K, tiles, count, 2, T), as the backward pass reads them."""
    column = row_of_C(scan.shape[4]) + first
    both = torch.stack([scan.rows[..., first : first + count], scan.rows[..., column : column + count]], dim=3)
    steps = _reorder(scan, both, to_steps=True)
    steps = F.pad(steps, (0, 0, 0, 0, 0, -scan.shape[3] % _TILE))
    tiles = steps.view(*steps.shape[:2], -1, _TILE, *steps.shape[3:])
    return tiles.permute(0, 1, 2, 5, 4, 3).contiguous()


def _unpack(scan: Scan, packed: Tensor) -> Tensor:
    """Undo `_pack`: return the values by position, (B, K, L, 2, count)."""
    steps = packed.permute(0, 1, 2, 5, 4, 3).flatten(2, 3)[:, :, : scan.shape[3]]
    return _reorder(scan, steps, to_steps=False)


def _reorder(scan: Scan, x: Tensor, *, to_steps: bool) -> Tensor:
    """Reorder (B, K, L, ...) from positions to the steps of each route, or back."""
    routes = x.shape[1]
    codes = scan.routes * routes if len(scan.routes) == 1 else scan.routes
    if scan.orders is None:
        if not any(codes):
            return x
        return torch.stack([x[:, k].flip(1) if code % 2 else x[:, k] for k, code in enumerate(codes)], dim=1)
    out = torch.empty_like(x)
    for k in range(routes):
        if to_steps:
            out[:, k] = x[:, k][:, scan.orders[k]]
        else:
            out[:, k, scan.orders[k]] = x[:, k]
    return out


def _sizes(scan: Scan) -> dict[str, int]:
    _, _, channels, tokens, _ = scan.shape
    return {"E": channels, "L": tokens, "height": scan.size[0], "width": scan.size[1]}


def _constants(scan: Scan) -> dict[str, object]:
    return {"ROUTES": scan.routes, "MAPPED": scan.mapped, "SOFTPLUS": scan.softplus, "CHUNK": CHUNK}


def _strides(name: str, tensor: Tensor | None) -> dict[str, int]:
    strides = (0, 0, 0, 0) if tensor is None else tensor.stride()
    return {f"{name}_{axis}": stride for axis, stride in zip("bkel", strides, strict=True)}


def _rows(scan: Scan) -> dict[str, int]:
    return {f"rows_{axis}": stride for axis, stride in zip("bkl", scan.rows.stride()[:3], strict=True)}


def _parameters(scan: Scan, *, skip: bool = True) -> dict[str, int]:
    strides = {f"A_{axis}": stride for axis, stride in zip("ken", scan.A.stride(), strict=True)}
    if skip:
        strides["D_k"] = 0 if scan.D is None else scan.D.stride(0)
    return {**strides, "bias_k": 0 if scan.bias is None else scan.bias.stride(0)}
