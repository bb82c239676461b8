"""Launch the SSD on the GPU.

A chunk is 256 tokens, four blocks. Per token and head, both directions, bfloat16, P = N = 64, counted:

    forward     x read twice, y written: 384 bytes; states of both directions written, carried (read and written) and
                read: 512; B and C: 64. Products: 65.5 kFLOP inside a chunk, 32.8 with states. 64 exponentials and a few
    backward    x and dy read by two kernels, dy by two more: 768 bytes; dx 128; states 640; shares of dB and dC written
                and summed 512; sums over pairs 80. Products: 262 kFLOP inside a chunk, 65.5 with states

An H200 (4.3 TB/s) moves the 960 bytes of the forward pass in 0.22 ns and computes 98 kFLOP in 0.25 ns at 400 TFLOP/s:
chunks of 128 tokens would move 512 bytes more, chunks of 512 compute 65 kFLOP more. A sequence of at most 256 tokens is
one chunk: no states, 300 bytes.

Float32 factors are multiplied as three bfloat16 terms each ("bf16x6"): float32's precision from the tensor cores of
every target. "ieee" has no tensor cores on NVIDIA; "tf32x3" does not compile for AMD and takes as many registers.

A program has 4 warps, 64 rows being one instruction of theirs on sm_90. `pair_gradients` holds two tiles over pairs at
once: with 64 tokens a block it spills 288 bytes on sm_80 and 8 on sm_90, with 32 nothing. Float32 takes blocks of 16
and 8 warps: with 32 `outputs` spills 160 bytes on gfx942, with 4 warps `chunk_states` spills 64 on sm_80. Every head
writes its own share of dB and dC, in x's dtype; a program that loops over the heads of a group spills 744 bytes.
"""

# B batch, L tokens, H heads, P channels of a head, G groups of heads, N state, K chunks, T tokens of a block

from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from ssmpretrain.kernels.dispatch import is_interpreting
from ssmpretrain.kernels.gpu.launch import launch
from ssmpretrain.kernels.layouts import with_dense_rows
from ssmpretrain.kernels.ssd.inputs import SSDInputs
from ssmpretrain.kernels.ssd.triton_kernels.gradients import pair_gradients, step_gradients
from ssmpretrain.kernels.ssd.triton_kernels.outputs import outputs
from ssmpretrain.kernels.ssd.triton_kernels.states import carry, chunk_states

_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def forward(inputs: SSDInputs, keep_states: bool) -> tuple[Tensor, Tensor]:
    """Return y, (B, L, H, P), contiguous, and what `backward` needs besides the inputs, or nothing, (0,)."""
    inputs = inputs.readable()
    x = inputs.x
    y = x.new_empty(x.shape, dtype=torch.float32 if inputs.wide else x.dtype)
    states = _carried(inputs, x, inputs.B, None)
    _read(inputs, inputs.C, inputs.B, x, states, y, adjoint=False)
    return y, _empty(x, 0) if states is None or not keep_states else states


def backward(dy: Tensor, states: Tensor, inputs: SSDInputs) -> list[Tensor]:
    """Return the gradients of the tensors that are present, in the order of `inputs`, contiguous, in their dtypes."""
    inputs = inputs.readable()
    x, B, C, D = inputs[:4]
    dy = with_dense_rows(dy.to(x.dtype))
    batch, tokens, heads, channels, groups, state = inputs.sizes
    directions, chunks = len(inputs.directions), _chunks(inputs)
    entering, leaving, products = None, None, None
    if chunks > 1:
        products = _empty(x, directions, batch, chunks, heads, _carry_tiles(inputs))
        entering, leaving = states, _carried(inputs, dy, C, (states, products))
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    _read(inputs, B, C, dy, leaving, dx, adjoint=True)

    dD = None if D is None else _empty(x, batch, _blocks(inputs, pairs=True), heads)
    shares, sums, outside = [], [], []
    for adjoint in (False, True):
        queries, keys, own, values, of_chunks = (B, C, x, dy, leaving) if adjoint else (C, B, dy, x, entering)
        shares.append(x.new_empty(batch, tokens, heads, state))
        sums.append(_empty(x, 1 + directions, batch, heads, tokens))
        outside.append(_empty(x, directions, batch, heads, tokens) if chunks > 1 else sums[-1])
        launch(
            pair_gradients, (heads * _blocks(inputs, pairs=True) * batch,), _warps(inputs),
            queries=queries, keys=keys, own_values=own, values=values, **_steps(inputs), states=of_chunks,
            dqueries=shares[-1], sums=sums[-1], outside=outside[-1], dD=dD if adjoint else None, scale=inputs.scale,
            **_lengths(inputs), **_of_rows("queries", queries, "g"), **_of_rows("keys", keys, "g"),
            **_of_rows("own", own, "h"), **_of_rows("values", values, "h"),
            ADJOINT=adjoint, **_tiles(inputs, _power(channels), pairs=True),
        )  # fmt: skip
    dC, dB = (share.view(batch, tokens, groups, -1, state).sum(3) for share in shares)

    of_steps = []
    for d, (dt, A, reverse) in enumerate(inputs.directions):
        ddt, dA = _empty(x, batch, tokens, heads), _empty(x, batch, chunks, heads)
        launch(
            step_gradients, (heads * chunks * batch,), 4,
            dt=dt, A=A, reader_sums=sums[0], reader_outside=outside[0], read_sums=sums[1], read_outside=outside[1],
            products=products, ddt=ddt, dA=dA, scale=inputs.scale, L=tokens, H=heads, K=chunks, batch=batch, d=d,
            **_of_rows("dt", dt, "h"), BACK=reverse, TILES=_carry_tiles(inputs), Q=_chunk(inputs),
            TILE=_power(_chunk(inputs)),
        )  # fmt: skip
        of_steps += [ddt, dA.sum((0, 1))]
    return [dx, dB, dC, *([] if dD is None else [dD.sum((0, 1))]), *of_steps]


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


def _block(inputs: SSDInputs, pairs: bool = False) -> int:
    """Return the tokens of a block: a power of two that divides the chunk, as large as registers allow.

    Args:
        inputs: For sizes and dtype.
        pairs: Whether for `pair_gradients`, which holds two tiles over pairs of tokens at once.
    """
    chunk, widest = _chunk(inputs), max(inputs.x.shape[3], inputs.B.shape[3])
    halvings = 2 if inputs.x.dtype == torch.float32 else (widest > 64) + pairs
    return min(64 >> halvings, chunk & -chunk)


def _warps(inputs: SSDInputs) -> int:
    """Return the warps of a program: more for float32, whose factors are held as three bfloat16 terms each."""
    return 8 if inputs.x.dtype == torch.float32 else 4


def _blocks(inputs: SSDInputs, pairs: bool = False) -> int:
    return -(-inputs.x.shape[1] // _block(inputs, pairs))


def _power(size: int) -> int:
    """Return the smallest power of two that holds size; the products need 16 at least."""
    return max(16, 1 << (size - 1).bit_length())


def _empty(x: Tensor, *shape: int) -> Tensor:
    return x.new_empty(shape, dtype=torch.float32)


def _carried(inputs: SSDInputs, x: Tensor, rows: Tensor, adjoint: tuple[Tensor, Tensor] | None) -> Tensor | None:
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
    of_tile = {**_tiles(inputs, tile_p), "TILE_N": tile_n}
    del of_tile["SLICE"]
    launch(
        chunk_states, (tiles * heads * _chunks(inputs) * batch,), _warps(inputs),
        x=x, rows=rows, **_steps(inputs), states=states, totals=totals,
        **_lengths(inputs), **_of_rows("x", x, "h"), **_of_rows("rows", rows, "g"),
        ADJOINT=adjoint is not None, **of_tile,
    )  # fmt: skip
    kept, products = adjoint or (None, None)
    launch(
        carry, (_carry_tiles(inputs) * heads * batch * len(states),), 4,
        states=states, totals=totals, kept=kept, products=products, K=_chunks(inputs), H=heads, batch=batch,
        BACK_FIRST=inputs.dt is None, ADJOINT=adjoint is not None, SIZE=state * channels, TILE=_carry_tile(inputs),
    )  # fmt: skip
    return states


def _read(
    inputs: SSDInputs, queries: Tensor, keys: Tensor, values: Tensor, states: Tensor | None, out: Tensor,
    *, adjoint: bool,
) -> None:  # fmt: skip
    """Write out, (B, L, H, P): y from C, B, x and the entering states, or dx from B, C, dy and the leaving ones."""
    batch, _, heads, channels, _, _ = inputs.sizes
    tile = min(128, _power(channels))
    launch(
        outputs, (-(-channels // tile) * heads * _blocks(inputs) * batch,), _warps(inputs),
        queries=queries, keys=keys, values=values, D=inputs.D, **_steps(inputs), states=states, y=out,
        scale=inputs.scale, **_lengths(inputs), **_of_rows("queries", queries, "g"), **_of_rows("keys", keys, "g"),
        **_of_rows("values", values, "h"), ADJOINT=adjoint, **_tiles(inputs, tile),
    )  # fmt: skip


def _carry_tile(inputs: SSDInputs) -> int:
    """Return the states of a program of the carry."""
    return min(1024, _power(inputs.x.shape[3] * inputs.B.shape[3]))


def _carry_tiles(inputs: SSDInputs) -> int:
    return -(-inputs.x.shape[3] * inputs.B.shape[3] // _carry_tile(inputs))


def _steps(inputs: SSDInputs) -> dict[str, Any]:
    """Return step sizes and rates of both directions, and the strides of the step sizes."""
    found: dict[str, Any] = {"A": inputs.A, "A_back": inputs.A_backward}
    for name, prefix, dt in (("dt", "dt", inputs.dt), ("dt_back", "back", inputs.dt_backward)):
        found[name] = dt
        found |= dict.fromkeys((f"{prefix}_{axis}" for axis in "blh"), 0) if dt is None else _of_rows(prefix, dt, "h")
    return found


def _lengths(inputs: SSDInputs) -> dict[str, int]:
    batch, tokens, heads, _, groups, _ = inputs.sizes
    return {"L": tokens, "H": heads, "R": heads // groups, "K": _chunks(inputs), "batch": batch}


def _of_rows(name: str, rows: Tensor, axis: str) -> dict[str, int]:
    return {f"{name}_b": rows.stride(0), f"{name}_l": rows.stride(1), f"{name}_{axis}": rows.stride(2)}


def _tiles(inputs: SSDInputs, tile_p: int, pairs: bool = False) -> dict[str, Any]:
    block, state = _block(inputs, pairs), inputs.B.shape[3]
    kind = _TYPES[inputs.x.dtype]
    return {
        "BLOCKS": _blocks(inputs, pairs), "PER_CHUNK": _chunk(inputs) // block, "T": block,
        "N": state, "TILE_N": _power(state), "SLICE": block, "P": inputs.x.shape[3], "TILE_P": tile_p,
        # the interpreter multiplies bfloat16 as integers, and float32 as it is
        "MATH": (kind, tl.float32, "ieee") if is_interpreting() else (kind, kind, "bf16x6"),
    }  # fmt: skip
