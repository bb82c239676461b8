"""Device code that all SSD kernels share: tiles of rows, step sizes, decays inside a block, products with states."""

import triton
import triton.language as tl

from ssmpretrain.kernels.gpu.triton_kernels.functions import LOG2E

LENGTHS = ("L", "BLOCKS", "K", "batch", "dt_b", "dt_l", "dt_h", "back_b", "back_l", "back_h")
"""Arguments of which no value compiles a kernel anew."""

_MIN_LOG = tl.constexpr(-100.0)  # `inputs.MIN_LOG_DECAY`


@triton.jit
def load_rows(pointer, first, stride, stop, column, WIDTH: tl.constexpr, T: tl.constexpr, TILE: tl.constexpr):
    """Return T rows from first on and TILE of their WIDTH columns from column on, (T, TILE); zeros beyond the ends."""
    t = first + tl.arange(0, T)
    w = column + tl.arange(0, TILE)
    mask = (t < stop)[:, None] & (w < WIDTH)[None, :]
    return tl.load(pointer + t.to(tl.int64)[:, None] * stride + w[None, :], mask=mask, other=0.0)


@triton.jit
def store_rows(pointer, tile, first, stride, stop, column, WIDTH: tl.constexpr, T: tl.constexpr, TILE: tl.constexpr):
    t = first + tl.arange(0, T)
    w = column + tl.arange(0, TILE)
    mask = (t < stop)[:, None] & (w < WIDTH)[None, :]
    tl.store(pointer + t.to(tl.int64)[:, None] * stride + w[None, :], tile.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def load_steps(dt, A, first, stride, stop, T: tl.constexpr):
    """Return step sizes and log2 of the decays of T tokens; tokens beyond the last have step 0 and decay 1."""
    t = first + tl.arange(0, T)
    step = tl.load(dt + t.to(tl.int64) * stride, mask=t < stop, other=0.0)
    return step, tl.maximum(step * A, _MIN_LOG) * LOG2E


@triton.jit
def sums_to(log):
    """Return the sum of each element and all before it."""
    return tl.cumsum(log, 0)


@triton.jit
def sums_from(log):
    """Return the sum of each element and all after it."""
    return tl.cumsum(log, 0, reverse=True)


@triton.jit
def product(a, b, acc, MATH: tl.constexpr):
    """Return acc + a b in float32.

    MATH: The dtype that operands are rounded to, the dtype that they are multiplied as, and how float32 is multiplied.
    """
    a, b = a.to(MATH[0]).to(MATH[1]), b.to(MATH[0]).to(MATH[1])
    return tl.dot(a, b, acc, input_precision=MATH[2])


@triton.jit
def times_states(
    rows, first, stride, stop, states, states_k, states_o, column, T: tl.constexpr,
    K: tl.constexpr, OUT: tl.constexpr, SLICE: tl.constexpr, TILE: tl.constexpr, MATH: tl.constexpr,
):  # fmt: skip
    """Return rows, (T, K), times the columns from column on of states, (K, OUT), as (T, TILE)."""
    o = column + tl.arange(0, TILE)
    acc = tl.zeros([T, TILE], tl.float32)
    for k0 in tl.range(0, K, SLICE, num_stages=1):
        k = k0 + tl.arange(0, SLICE)
        tile = load_rows(rows, first, stride, stop, k0, K, T, SLICE)
        mask = (k < K)[:, None] & (o < OUT)[None, :]
        state = tl.load(states + k[:, None] * states_k + o[None, :] * states_o, mask=mask, other=0.0)
        acc = product(tile, state, acc, MATH)
    return acc


@triton.jit
def weights_inside(
    step, log, step_back, log_back,
    FORWARD: tl.constexpr, BACK: tl.constexpr, ADJOINT: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Return the decay between the tokens of a block and the step size of the token that is read, (T, T) each.

    Rows are readers and columns the tokens that are read; with ADJOINT the other way round. A reader at or after a
    token reads it forwards, a reader at or before it backwards. A pair that no direction joins has step size 0.
    """
    reader: tl.constexpr = 0 if ADJOINT else 1  # the axis to insert into a vector over readers
    read: tl.constexpr = 1 - reader
    t, s = tl.expand_dims(tl.arange(0, T), reader), tl.expand_dims(tl.arange(0, T), read)
    if FORWARD:
        to = sums_to(log)
        decay = tl.minimum(tl.expand_dims(to, reader) - tl.expand_dims(to, read), 0.0)
        steps = tl.where(t >= s, tl.expand_dims(step, read), 0.0)
    if BACK:
        before = sums_to(log_back) - log_back
        behind = tl.minimum(tl.expand_dims(before, read) - tl.expand_dims(before, reader), 0.0)
        steps_back = tl.where(t <= s, tl.expand_dims(step_back, read), 0.0)
        if FORWARD:
            decay = tl.where(t >= s, decay, behind)
            steps += steps_back
        else:
            decay = behind
            steps = steps_back
    return tl.exp2(decay), steps


@triton.jit
def row_logs(log, EARLIER: tl.constexpr, ADJOINT: tl.constexpr):
    """Return log2 of the decay between each token of a block and the edge towards the other blocks.

    A decay belongs to the step that the reader ends: forwards it lies after the token that is read.
    """
    logs = sums_to(log) if EARLIER else sums_from(log)
    return logs - log if ADJOINT else logs


@triton.jit
def column_weights(step, log, EARLIER: tl.constexpr, ADJOINT: tl.constexpr):
    """Return the decay between the tokens of another block and its edge, times their step sizes if they are read."""
    logs = sums_from(log) if EARLIER else sums_to(log)
    return tl.exp2(logs) if ADJOINT else tl.exp2(logs - log) * step
