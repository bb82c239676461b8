"""Launch the SSD on the GPU."""

# B batch, L tokens, H heads, P channels of a head, G groups of heads, N state, K chunks, T tokens of a block

from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from ssmpretrain.kernels.dispatch import is_interpreting
from ssmpretrain.kernels.gpu.launch import launch
from ssmpretrain.kernels.ssd.inputs import SSDInputs
from ssmpretrain.kernels.ssd.triton_kernels.gradients import read_gradients, reader_gradients, step_gradients
from ssmpretrain.kernels.ssd.triton_kernels.outputs import outputs
from ssmpretrain.kernels.ssd.triton_kernels.states import carry, chunk_states

_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_PROGRAMS = 1056  # of the gradients: 8 for each multiprocessor of an H200; more divide the heads of a group


def forward(inputs: SSDInputs, keep_states: bool) -> tuple[Tensor, Tensor]:
    """Return y, (B, L, H, P), contiguous, and what `backward` needs besides the inputs, or nothing, (0,)."""
    inputs = _readable(inputs)
    x = inputs.x
    y = x.new_empty(x.shape, dtype=torch.float32 if inputs.wide else x.dtype)
    states = _carried(inputs, x, inputs.B, None)
    batch, _, heads, channels, _, state = inputs.sizes
    tile = min(128, _power(channels))
    launch(
        outputs, (-(-channels // tile) * heads * _blocks(inputs) * batch,), 4,
        **_tensors(inputs), D=inputs.D, states=states, y=y, scale=inputs.scale,
        **_lengths(inputs), **_strides(inputs), **_tiles(inputs, tile),
    )  # fmt: skip
    return y, _empty(x, 0) if states is None or not keep_states else states


def backward(dy: Tensor, states: Tensor, inputs: SSDInputs) -> list[Tensor]:
    """Return the gradients of the tensors that are present, in the order of `inputs`, contiguous, in their dtypes."""
    inputs = _readable(inputs)
    x, D = inputs.x, inputs.D
    dy = _with_dense_rows(dy.to(x.dtype))
    batch, tokens, heads, channels, groups, state = inputs.sizes
    directions, blocks, chunks = len(inputs.directions), _blocks(inputs), _chunks(inputs)
    dstates, products = None, None
    if chunks > 1:
        products = _empty(x, directions, batch, chunks, heads, _carry_tiles(inputs))
        dstates = _carried(inputs, dy, inputs.C, (states, products))

    per_group = heads // groups
    parts = min(per_group, -(-_PROGRAMS // max(batch * blocks * groups, 1)))
    of_part = -(-per_group // parts)
    parts = -(-per_group // of_part)
    dB, dC = (_empty(x, parts, batch, tokens, groups, state) for _ in range(2))
    dx = x.new_empty(x.shape)
    dD = None if D is None else _empty(x, batch, blocks, heads)
    columns = _empty(x, 1 + 2 * directions, batch, heads, tokens)
    rows = _empty(x, directions, batch, heads, tokens)
    arguments = {
        **_tensors(inputs), "dy": dy, "scale": inputs.scale, "HEADS": of_part,
        **_lengths(inputs), **_strides(inputs), **_of_rows("dy", dy, "h"), **_tiles(inputs, _power(channels)),
    }  # fmt: skip
    grid = (parts * groups * blocks * batch,)
    launch(read_gradients, grid, 8, **arguments, D=D, dstates=dstates, dx=dx, dB=dB, dD=dD, columns=columns)
    launch(reader_gradients, grid, 8, **arguments, states=None if dstates is None else states, dC=dC, rows=rows)

    chunk, of_steps = _chunk(inputs), []
    for d, (dt, A, reverse) in enumerate(inputs.directions):
        ddt, dA = _empty(x, batch, tokens, heads), _empty(x, batch, chunks, heads)
        launch(
            step_gradients, (heads * chunks * batch,), 4,
            dt=dt, A=A, rows=rows, columns=columns, products=products, ddt=ddt, dA=dA,
            L=tokens, H=heads, K=chunks, batch=batch, d=d, dt_b=dt.stride(0), dt_l=dt.stride(1), dt_h=dt.stride(2),
            BACK=reverse, TILES=_carry_tiles(inputs), Q=chunk, TILE=_power(chunk),
        )  # fmt: skip
        of_steps += [ddt, dA.sum((0, 1))]
    of_rows = [partial.sum(0).to(x.dtype) for partial in (dB, dC)]
    return [dx, *of_rows, *([] if dD is None else [dD.sum((0, 1))]), *of_steps]


def states_shape(inputs: SSDInputs) -> tuple[int, ...]:
    """Return the shape of the states that enter each chunk, (directions, B, K, H, N, P); (0,) for a single chunk."""
    batch, _, heads, channels, _, state = inputs.sizes
    chunks = _chunks(inputs)
    return (len(inputs.directions), batch, chunks, heads, state, channels) if chunks > 1 else (0,)


def _chunk(inputs: SSDInputs) -> int:
    """Return the tokens of a chunk."""
    return inputs.chunk or 256


def _chunks(inputs: SSDInputs) -> int:
    return -(-inputs.x.shape[1] // _chunk(inputs))


def _block(inputs: SSDInputs) -> int:
    """Return the tokens of a block, a power of two that divides the chunk."""
    chunk = _chunk(inputs)
    return min(64, chunk & -chunk)


def _blocks(inputs: SSDInputs) -> int:
    return -(-inputs.x.shape[1] // _block(inputs))


def _power(size: int) -> int:
    """Return the smallest power of two that holds size; the products need 16 at least."""
    return max(16, 1 << (size - 1).bit_length())


def _empty(x: Tensor, *shape: int) -> Tensor:
    return x.new_empty(shape, dtype=torch.float32)


def _with_dense_rows(rows: Tensor) -> Tensor:
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _readable(inputs: SSDInputs) -> SSDInputs:
    """Return the inputs with the layouts that the kernels read: last axis of rows dense, parameters contiguous."""
    x, B, C = (_with_dense_rows(rows) for rows in (inputs.x, inputs.B, inputs.C))
    D, A, A_backward = (None if t is None else t.contiguous() for t in (inputs.D, inputs.A, inputs.A_backward))
    return inputs._replace(x=x, B=B, C=C, D=D, A=A, A_backward=A_backward)


def _carried(
    inputs: SSDInputs, x: Tensor, rows: Tensor, adjoint: tuple[Tensor, Tensor] | None
) -> Tensor | None:
    """Return the states that enter every chunk, or with adjoint the gradients of those that leave; None for one chunk.

    Args:
        inputs: For sizes and step sizes.
        x: x, or dy for gradients.
        rows: B, or C for gradients.
        adjoint: The states that entered, and where the gradients of the decays across chunks go.
    """
    if _chunks(inputs) == 1:
        return None
    batch, _, heads, channels, _, state = inputs.sizes
    states = _empty(x, *states_shape(inputs))
    totals = _empty(x, *states.shape[:4])
    tile_n, tile_p = (min(64, _power(size)) for size in (state, channels))
    tiles = -(-state // tile_n) * -(-channels // tile_p)
    steps = {name: value for name, value in _tensors(inputs).items() if name not in "xBC"}
    strides = {name: value for name, value in _strides(inputs).items() if name[0] not in "xBC"}
    launch(
        chunk_states, (tiles * heads * _chunks(inputs) * batch,), 4,
        x=x, rows=rows, **steps, states=states, totals=totals, scale=1.0 if adjoint is None else inputs.scale,
        **_lengths(inputs), **_of_rows("x", x, "h"), **_of_rows("rows", rows, "g"), **strides,
        ADJOINT=adjoint is not None, **{**_tiles(inputs, tile_p), "TILE_N": tile_n, "SLICE": None},
    )  # fmt: skip
    kept, products = adjoint or (None, None)
    launch(
        carry, (_carry_tiles(inputs) * heads * batch * len(states),), 4,
        states=states, totals=totals, kept=kept, products=products, K=_chunks(inputs), H=heads, batch=batch,
        BACK_FIRST=inputs.dt is None, ADJOINT=adjoint is not None, SIZE=state * channels, TILE=_carry_tile(inputs),
    )  # fmt: skip
    return states


def _carry_tile(inputs: SSDInputs) -> int:
    """Return the states of a program of the carry."""
    return min(1024, _power(inputs.x.shape[3] * inputs.B.shape[3]))


def _carry_tiles(inputs: SSDInputs) -> int:
    return -(-inputs.x.shape[3] * inputs.B.shape[3] // _carry_tile(inputs))


def _tensors(inputs: SSDInputs) -> dict[str, Any]:
    return {
        "x": inputs.x, "B": inputs.B, "C": inputs.C, "dt": inputs.dt, "A": inputs.A,
        "dt_back": inputs.dt_backward, "A_back": inputs.A_backward,
    }  # fmt: skip


def _lengths(inputs: SSDInputs) -> dict[str, int]:
    batch, tokens, heads, _, groups, _ = inputs.sizes
    return {
        "L": tokens, "H": heads, "R": heads // groups, "K": _chunks(inputs), "BLOCKS": _blocks(inputs), "batch": batch,
    }  # fmt: skip


def _of_rows(name: str, rows: Tensor, axis: str) -> dict[str, int]:
    return {f"{name}_b": rows.stride(0), f"{name}_l": rows.stride(1), f"{name}_{axis}": rows.stride(2)}


def _strides(inputs: SSDInputs) -> dict[str, int]:
    strides = _of_rows("x", inputs.x, "h") | _of_rows("B", inputs.B, "g") | _of_rows("C", inputs.C, "g")
    for name, dt in (("dt", inputs.dt), ("back", inputs.dt_backward)):
        strides |= dict.fromkeys((f"{name}_b", f"{name}_l", f"{name}_h"), 0) if dt is None else _of_rows(name, dt, "h")
    return strides


def _tiles(inputs: SSDInputs, tile_p: int) -> dict[str, Any]:
    block, state = _block(inputs), inputs.B.shape[3]
    kind = _TYPES[inputs.x.dtype]
    return {
        "PER_CHUNK": _chunk(inputs) // block, "T": block,
        "N": state, "TILE_N": _power(state), "SLICE": 64, "P": inputs.x.shape[3], "TILE_P": tile_p,
        # the interpreter multiplies bfloat16 as integers, and float32 as it is
        "MATH": (kind, tl.float32, "ieee") if is_interpreting() else (kind, kind, "bf16x6"),
    }  # fmt: skip
