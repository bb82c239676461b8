"""Device code that all SSD kernels share: tiles of rows, step sizes, decays inside a block, products with states."""

import triton
import triton.language as tl

from ssmpretrain.kernels.gpu.triton_kernels.functions import LOG2E

LENGTHS = ("L", "BLOCKS", "K", "batch", "dt_b", "dt_l", "dt_h", "back_b", "back_l", "back_h")
"""Arguments of which no value compiles a kernel anew."""

_MIN_LOG = tl.constexpr(-100.0)  # `inputs.MIN_LOG_DECAY`


@triton.jit
def load_rows(pointer, first, stride, stop, column, WIDTH: tl.constexpr, T: tl.constexpr, TILE: tl.constexpr):
    """Return T rows from first on and TILE of their WIDTH columns from column on, (T, TILE); zeros beyond either end."""
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
    acc, rows, first, stride, stop, states, states_k, states_o,
    K: tl.constexpr, OUT: tl.constexpr, T: tl.constexpr, SLICE: tl.constexpr, TILE: tl.constexpr,
    column, MATH: tl.constexpr,
):  # fmt: skip
    """Return acc + rows states, (T, TILE): rows (T, K) times columns column to column + TILE of states (K, OUT)."""
    o = column + tl.arange(0, TILE)
    for k0 in tl.static_range(0, K, SLICE):
        k = k0 + tl.arange(0, SLICE)
        tile = load_rows(rows, first, stride, stop, k0, K, T, SLICE)
        mask = (k < K)[:, None] & (o < OUT)[None, :]
        state = tl.load(states + k[:, None] * states_k + o[None, :] * states_o, mask=mask, other=0.0)
        acc = product(tile, state, acc, MATH)
    return acc


@triton.jit
def decay_inside(log, log_back, FORWARD: tl.constexpr, BACK: tl.constexpr, T: tl.constexpr):
    """Return the decay between the tokens of a block, (reader, read token).

    A reader at or after the token reads it forwards, a reader before it backwards. A pair that no direction joins
    has decay 0, and a token reads itself with decay 1.
    """
    t, s = tl.arange(0, T)[:, None], tl.arange(0, T)[None, :]
    if FORWARD:
        to = sums_to(log)
        ahead = to[:, None] - to[None, :]
    if BACK:
        before = sums_to(log_back) - log_back
        behind = before[None, :] - before[:, None]
    if FORWARD and BACK:
        decay = tl.exp2(tl.where(t >= s, ahead, behind))
    elif FORWARD:
        decay = tl.where(t >= s, tl.exp2(tl.minimum(ahead, 0.0)), 0.0)
    else:
        decay = tl.where(t <= s, tl.exp2(tl.minimum(behind, 0.0)), 0.0)
    return decay


@triton.jit
def steps_inside(step, step_back, FORWARD: tl.constexpr, BACK: tl.constexpr, T: tl.constexpr):
    """Return the step size with which a reader reads a token of its block, (reader, read token); itself by both."""
    t, s = tl.arange(0, T)[:, None], tl.arange(0, T)[None, :]
    if FORWARD and BACK:
        steps = tl.where(t >= s, step[None, :], 0.0) + tl.where(t <= s, step_back[None, :], 0.0)
    elif FORWARD:
        steps = tl.where(t >= s, step[None, :], 0.0)
    else:
        steps = tl.where(t <= s, step_back[None, :], 0.0)
    return steps
