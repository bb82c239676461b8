"""Device code for the steps of a chunk in registers: positions, step sizes, loads and stores."""

import triton
import triton.language as tl

from ssmpretrain.kernels.gpu.triton_kernels.functions import load_pair, softplus, window_position

T = tl.constexpr(16)  # steps of a chunk: the rows of the smallest product on tensor cores

SIZES = ["L", "height", "width", "window", "C", "codes", "count"]  # no value of these compiles a kernel anew


@triton.jit
def step_sizes(
    x_dbl, rows, inside, weights, bias, e, k,
    K: tl.constexpr, E: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, BE: tl.constexpr,
    TERMS: tl.constexpr, FACTOR: tl.constexpr,
):  # fmt: skip
    """Return the step sizes, softplus(dt @ weights + bias), at every step of an order, T vectors; 0 past its end.

    The product runs on the tensor cores, RANKS of the R at a time, so that one tile of weights is in registers. The
    factors are sums of bfloat16. TERMS = 2: bfloat16 weights and two terms of dt, with an error of 2^-16. TERMS = 3:
    three terms of each, which hold all bits of float32. FACTOR is the dtype of the factors.

    The softplus is taken of the whole tile: of 16 vectors it would be 16 times the operations to compile.
    """
    RANKS: tl.constexpr = min(RP, 32)
    raw = tl.zeros([T, BE], tl.float32) + load(bias + k * E + e, e, E, BE)[None, :]
    for first in tl.range(0, RP, RANKS, num_stages=1):
        r = first + tl.arange(0, RANKS)
        dt = tl.load(x_dbl + rows[:, None] * (K * (R + 2)) + k * (R + 2) + r[None, :], mask=r[None, :] < R, other=0.0)
        weight = tl.load(
            weights + (k * R + r[:, None]) * E + e[None, :],
            mask=(r[:, None] < R) & is_channel(e, E, BE)[None, :],
            other=0.0,
        )
        dt_1, rest = _split(dt)
        dt_2, rest = _split(rest)
        if TERMS == 2:
            raw = tl.dot(dt_2.to(FACTOR), weight.to(FACTOR), raw)
            raw = tl.dot(dt_1.to(FACTOR), weight.to(FACTOR), raw)
        else:
            weight_1, rest_of_weight = _split(weight.to(tl.float32))
            weight_2, weight_3 = _split(rest_of_weight)
            raw = tl.dot(rest.to(FACTOR), weight_1.to(FACTOR), raw)
            raw = tl.dot(dt_2.to(FACTOR), weight_2.to(FACTOR), raw)
            raw = tl.dot(dt_1.to(FACTOR), weight_3.to(FACTOR), raw)
            raw = tl.dot(dt_2.to(FACTOR), weight_1.to(FACTOR), raw)
            raw = tl.dot(dt_1.to(FACTOR), weight_2.to(FACTOR), raw)
            raw = tl.dot(dt_1.to(FACTOR), weight_1.to(FACTOR), raw)
    delta = tl.where(inside[:, None], softplus(raw), 0.0)
    return _unstack(tl.permute(delta, [1, 0]))


@triton.jit
def _split(x):
    """Return the upper half of float32's bits, which a bfloat16 holds, and the rest."""
    near = (x.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
    return near, x - near


@triton.jit
def _unstack(tile):
    """Return the columns of (BE, 16) as 16 vectors."""
    even, odd = _unstack_pairs(tile, 16)
    even = _unstack_8(even)
    odd = _unstack_8(odd)
    columns = ()
    for i in tl.static_range(8):
        columns = columns + (even[i], odd[i])
    return columns


@triton.jit
def _unstack_8(tile):
    even, odd = _unstack_pairs(tile, 8)
    a, c, e, g = _unstack_4(even)
    b, d, f, h = _unstack_4(odd)
    return a, b, c, d, e, f, g, h


@triton.jit
def _unstack_4(tile):
    even, odd = _unstack_pairs(tile, 4)
    a, c = tl.split(even)
    b, d = tl.split(odd)
    return a, b, c, d


@triton.jit
def _unstack_pairs(tile, n: tl.constexpr):
    return tl.split(tl.reshape(tile, [tile.shape[0], n // 2, 2]))


@triton.jit
def _stack(columns, dtype: tl.constexpr):
    """Return 16 vectors as the columns of (BE, 16): the inverse of `_unstack`."""
    even = _stack_8(columns[0::2], dtype)
    odd = _stack_8(columns[1::2], dtype)
    return _stack_pairs(even, odd)


@triton.jit
def _stack_8(columns, dtype: tl.constexpr):
    even = _stack_4(columns[0::2], dtype)
    odd = _stack_4(columns[1::2], dtype)
    return _stack_pairs(even, odd)


@triton.jit
def _stack_4(columns, dtype: tl.constexpr):
    even = tl.join(columns[0].to(dtype), columns[2].to(dtype))
    odd = tl.join(columns[1].to(dtype), columns[3].to(dtype))
    return _stack_pairs(even, odd)


@triton.jit
def _stack_pairs(even, odd):
    return tl.reshape(tl.join(even, odd), [even.shape[0], 2 * even.shape[1]])


@triton.jit
def unravel(C, E: tl.constexpr, BE: tl.constexpr):
    """Return (sequence, chunk, channels) of this program: blocks of channels vary fastest; int64 where it scales."""
    i = tl.program_id(0)
    blocks: tl.constexpr = (E + BE - 1) // BE
    e = i % blocks * BE + tl.arange(0, BE)
    i = i // blocks
    return (i // C).to(tl.int64), i % C, e


@triton.jit
def position_of(t, height, width, window, ORDER: tl.constexpr):
    """Return the position of step t of an order, row * width + column; the arithmetic is in `routes`."""
    if ORDER == 0:
        return t
    elif ORDER == 1:
        return t % height * width + t // height
    else:
        return window_position(t, height, width, window)


@triton.jit
def walk(first, L, height, width, window, ORDER: tl.constexpr):
    """Return the positions of T steps as T scalars, each from the one before, because division is slow."""
    at = position_of(first, height, width, window, ORDER)
    row = at // width
    column = at % width
    top = row // window * window
    left = column // window * window
    positions = ()
    for t in tl.static_range(T):
        positions = positions + (tl.minimum(first + t, L - 1) if ORDER == 0 else row * width + column,)
        more = first + t + 1 < L
        if ORDER == 1:
            new_column = row + 1 == height
            column = tl.where(more & new_column, column + 1, column)
            row = tl.where(more, tl.where(new_column, 0, row + 1), row)
        elif ORDER == 2:
            right = tl.minimum(left + window, width)
            bottom = tl.minimum(top + window, height)
            new_row = column + 1 == right
            new_window = new_row & (row + 1 == bottom)
            new_band = new_window & (right == width)
            top = tl.where(new_band, bottom, top)
            left = tl.where(new_band, 0, tl.where(new_window, right, left))
            column = tl.where(more, tl.where(new_row, left, column + 1), column)
            row = tl.where(more, tl.where(new_window, top, tl.where(new_row, row + 1, row)), row)
    return positions


@triton.jit
def route_at(codes, i):
    """Return (k, flipped) of the i-th route of an order, from 16 bits of codes."""
    code = ((codes >> (16 * i)) & 0x7FFF).to(tl.int32)
    return code >> 1, code & 1


@triton.jit
def turn(steps, reverse):
    """Return the steps of a chunk in a route's time: reversed if it runs the other way."""
    turned = ()
    for t in tl.static_range(T):
        turned = turned + (tl.where(reverse, steps[T - 1 - t], steps[t]),)
    return turned


@triton.jit
def is_inside(chunk, t, flipped, L):
    """Return whether the t-th step of a chunk, in a route's time, is one of the L."""
    return chunk * T + tl.where(flipped == 1, T - 1 - t, t) < L


@triton.jit
def is_channel(e, E: tl.constexpr, BE: tl.constexpr):
    """Return which channels exist; if the blocks fit, the compiler knows that all do."""
    return (e < E) if E % BE != 0 else (e >= 0)


@triton.jit
def load(pointer, e, E: tl.constexpr, BE: tl.constexpr):
    return tl.load(pointer, mask=is_channel(e, E, BE), other=0.0).to(tl.float32)


@triton.jit
def store(pointer, value, e, E: tl.constexpr, BE: tl.constexpr):
    tl.store(pointer, value, mask=is_channel(e, E, BE))


@triton.jit
def load_start(starts, offset, e, E: tl.constexpr, BE: tl.constexpr):
    """Return the value that a chunk starts from; zero if there is only one chunk."""
    if starts is None:
        return tl.zeros([BE], tl.float32)
    else:
        return load(starts + offset, e, E, BE)


@triton.jit
def load_steps(pointer, rows, inside, e, E: tl.constexpr, BE: tl.constexpr):
    """Return the values at T positions as T vectors, 0 where not inside.

    They are read as one tile: the time to compile grows with the square of the operations and with the loads.
    """
    mask = inside[:, None] & is_channel(e, E, BE)[None, :]
    tile = tl.load(pointer + rows[:, None] * E + e[None, :], mask=mask, other=0.0)
    return _unstack(tl.permute(tile.to(tl.float32), [1, 0]))


@triton.jit
def store_steps(pointer, rows, inside, values, flipped, e, E: tl.constexpr, BE: tl.constexpr):
    """Write T vectors, in the time of a route, to their positions where inside: the inverse of `load_steps`."""
    tile = tl.permute(_stack(turn(values, flipped == 1), pointer.dtype.element_ty), [1, 0])
    mask = inside[:, None] & is_channel(e, E, BE)[None, :]
    tl.store(pointer + rows[:, None] * E + e[None, :], tile, mask=mask)


@triton.jit
def first_sum(before, offset, rows, inside, e, E: tl.constexpr, BE: tl.constexpr):
    """Return the sum of earlier orders, or zeros."""
    if before is not None:
        return load_steps(before + offset, rows, inside, e, E, BE)
    else:
        sums = ()
        for _ in tl.static_range(T):
            sums = sums + (tl.zeros([BE], tl.float32),)
        return sums


@triton.jit
def load_B_C(pointer, R: tl.constexpr):
    if R % 2 == 0:
        return load_pair(pointer)
    else:
        return tl.load(pointer), tl.load(pointer + 1)
