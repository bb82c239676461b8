"""The scan along routes on the GPU for one state per channel, cut into chunks that run at the same time.

B batch, K routes, E channels, L = H W positions, R rank of the step size, P = K (R + 2) columns of x_dbl,
T steps of a chunk, C chunks of an order, BE channels of one program

An order is a sequence of the L positions; the routes of an order read it forwards or backwards. A program is one warp.
It owns BE channels of one chunk of one order, holds them in registers as T vectors, and serves every route of the order
from that one read. Time runs inside a thread, so a scan needs neither shuffles nor barriers; only the step sizes, a
product of T x R by R x BE on the tensor cores, change hands, through shared memory.

Three launches make a scan: `chunk_ends` scans every chunk from a zero state, `carry` passes the results on from
chunk to chunk, and `scan_chunks` starts every chunk where it belongs. Backwards, `adjoint_ends`, `carry` and
`scan_gradients` do the same against time.

All tensors are contiguous with channels last: x, y and their gradients are (B, L, E), x_dbl is (B, L, P), and what is
kept of chunks is (B, K, C, E). weights is dt_proj as (K, R, E) in x's dtype. codes holds 2 k + flipped of every route k
of the order, 16 bits each, up to four, and count how many. A program keeps its chunk in the time of the route it is
at and turns it around where the next one runs the other way.

Steps past the end of the order visit its last position again with a step size of 0, which changes nothing.
"""

import triton
import triton.language as tl

from ssmpretrain.kernels.gpu.functions import LOG2E, load_pair, softplus, window_position

T = tl.constexpr(16)  # steps of a chunk: the rows of the smallest product on tensor cores
AHEAD = tl.constexpr(16)  # chunks that `carry` reads before it needs them

_SIZES = ["L", "height", "width", "window", "C", "codes", "count"]


@triton.jit(do_not_specialize=_SIZES)
def chunk_ends(
    x, x_dbl, weights, bias, A, decays, ends,
    L, height, width, window, C, codes, count,
    ORDER: tl.constexpr,
    K: tl.constexpr, E: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, BE: tl.constexpr,
    TERMS: tl.constexpr, FACTOR: tl.constexpr,
):  # fmt: skip
    """Write the decay over every chunk and the state at its end, in the route's time, when it starts from zero."""
    b, chunk, e = _unravel(C, E, BE)
    at = _walk(chunk * T, L, height, width, window, ORDER)
    x_dbl += b * L * (K * (R + 2))
    xs = _load_steps(x + b * L * E + e, at, e, E, BE)
    rows = _position_of(tl.minimum(chunk * T + tl.arange(0, T), L - 1), height, width, window, ORDER)
    was_flipped = 0
    for i in tl.range(count, num_stages=1):
        k, flipped = _route(codes, i)
        at = _turn(at, flipped != was_flipped)
        xs = _turn(xs, flipped != was_flipped)
        was_flipped = flipped
        raw = _step_sizes(x_dbl, rows, weights, bias, e, k, K, E, R, RP, BE, TERMS, FACTOR)
        raw = _turn(raw, flipped == 1)
        rate = _load(A + k * E + e, e, E, BE) * LOG2E
        total = tl.zeros([BE], tl.float32)
        h = tl.zeros([BE], tl.float32)
        for t in tl.static_range(T):
            delta = tl.where(_inside(chunk, t, flipped, L), softplus(raw[t]), 0.0)
            B = tl.load(x_dbl + at[t] * (K * (R + 2)) + k * (R + 2) + R)
            h = tl.exp2(delta * rate) * h + delta * xs[t] * B
            total += delta
        offset = ((b * K + k) * C + chunk) * E + e
        _store(decays + offset, tl.exp2(total * rate), e, E, BE)
        _store(ends + offset, h, e, E, BE)


@triton.jit(do_not_specialize=["C"])
def carry(decays, ends, C, FLIPS: tl.constexpr, K: tl.constexpr, E: tl.constexpr, BE: tl.constexpr):
    """Replace what every chunk ends with, started from zero, by what it starts with, from zero before the first.

    FLIPS has bit k set where route k reads chunks from the last to the first.
    """
    sequence, _, e = _unravel(1, E, BE)
    flipped = (FLIPS >> (sequence % K).to(tl.int32)) & 1
    decays += sequence * C * E + e
    ends += sequence * C * E + e
    h = tl.zeros([BE], tl.float32)
    for first in range(0, C, AHEAD):
        chunks = ()
        read = ()
        for i in tl.static_range(AHEAD):
            chunk = tl.minimum(first + i, C - 1)
            chunk = tl.where(flipped == 1, C - 1 - chunk, chunk) * E
            chunks = chunks + (chunk,)
            read = read + ((_load(decays + chunk, e, E, BE), _load(ends + chunk, e, E, BE)),)
        for i in tl.static_range(AHEAD):
            tl.store(ends + chunks[i], h, mask=(first + i < C) & (e < E))
            h = read[i][0] * h + read[i][1]


@triton.jit(do_not_specialize=_SIZES)
def scan_chunks(
    x, x_dbl, weights, bias, A, D, starts, before, y,
    L, height, width, window, C, codes, count,
    ORDER: tl.constexpr,
    K: tl.constexpr, E: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, BE: tl.constexpr,
    TERMS: tl.constexpr, FACTOR: tl.constexpr,
):  # fmt: skip
    """Write the sum of C_t h_t + D x_t over the routes of the order and, unless before is None, of earlier orders."""
    b, chunk, e = _unravel(C, E, BE)
    at = _walk(chunk * T, L, height, width, window, ORDER)
    x_dbl += b * L * (K * (R + 2))
    xs = _load_steps(x + b * L * E + e, at, e, E, BE)
    ys = _first_sum(before, b * L * E + e, at, e, E, BE)
    rows = _position_of(tl.minimum(chunk * T + tl.arange(0, T), L - 1), height, width, window, ORDER)
    was_flipped = 0
    for i in tl.range(count, num_stages=1):
        k, flipped = _route(codes, i)
        at = _turn(at, flipped != was_flipped)
        xs = _turn(xs, flipped != was_flipped)
        ys = _turn(ys, flipped != was_flipped)
        was_flipped = flipped
        raw = _step_sizes(x_dbl, rows, weights, bias, e, k, K, E, R, RP, BE, TERMS, FACTOR)
        raw = _turn(raw, flipped == 1)
        rate = _load(A + k * E + e, e, E, BE) * LOG2E
        skip = _load(D + k * E + e, e, E, BE)
        h = _start(starts, ((b * K + k) * C + chunk) * E + e, e, E, BE)
        sums = ()
        for t in tl.static_range(T):
            delta = tl.where(_inside(chunk, t, flipped, L), softplus(raw[t]), 0.0)
            B, C_t = _load_B_C(x_dbl + at[t] * (K * (R + 2)) + k * (R + 2) + R, R)
            h = tl.exp2(delta * rate) * h + delta * xs[t] * B
            sums = sums + (ys[t] + skip * xs[t] + C_t * h,)
        ys = sums
    _store_steps(y + b * L * E + e, at, ys, chunk, was_flipped, L, e, E, BE)


@triton.jit(do_not_specialize=_SIZES)
def adjoint_ends(
    dy, x_dbl, weights, bias, A, decays, ends,
    L, height, width, window, C, codes, count,
    ORDER: tl.constexpr,
    K: tl.constexpr, E: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, BE: tl.constexpr,
    TERMS: tl.constexpr, FACTOR: tl.constexpr,
):  # fmt: skip
    """Write the decay over every chunk and the gradient of the state before it, when that of the last is zero."""
    b, chunk, e = _unravel(C, E, BE)
    at = _walk(chunk * T, L, height, width, window, ORDER)
    x_dbl += b * L * (K * (R + 2))
    dys = _load_steps(dy + b * L * E + e, at, e, E, BE)
    rows = _position_of(tl.minimum(chunk * T + tl.arange(0, T), L - 1), height, width, window, ORDER)
    was_flipped = 0
    for i in tl.range(count, num_stages=1):
        k, flipped = _route(codes, i)
        at = _turn(at, flipped != was_flipped)
        dys = _turn(dys, flipped != was_flipped)
        was_flipped = flipped
        raw = _step_sizes(x_dbl, rows, weights, bias, e, k, K, E, R, RP, BE, TERMS, FACTOR)
        raw = _turn(raw, flipped == 1)
        rate = _load(A + k * E + e, e, E, BE) * LOG2E
        total = tl.zeros([BE], tl.float32)
        g = tl.zeros([BE], tl.float32)
        for t in tl.static_range(T - 1, -1, -1):
            inside = _inside(chunk, t, flipped, L)
            delta = tl.where(inside, softplus(raw[t]), 0.0)
            C_t = tl.load(x_dbl + at[t] * (K * (R + 2)) + k * (R + 2) + R + 1)
            g = tl.exp2(delta * rate) * (g + tl.where(inside, C_t, 0.0) * dys[t])
            total += delta
        offset = ((b * K + k) * C + chunk) * E + e
        _store(decays + offset, tl.exp2(total * rate), e, E, BE)
        _store(ends + offset, g, e, E, BE)


@triton.jit(do_not_specialize=_SIZES)
def scan_gradients(
    x, dy, x_dbl, weights, bias, A, D, starts, adjoints, before, dx, dstep, dBC, dbias, dA, dD,
    L, height, width, window, C, codes, count,
    ORDER: tl.constexpr,
    K: tl.constexpr, E: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, BE: tl.constexpr,
    TERMS: tl.constexpr, FACTOR: tl.constexpr,
):  # fmt: skip
    """Write what the scan itself sends back to x, and the gradients that torch's products and sums finish.

    dx: Summed over the routes of the order and, unless before is None, of earlier orders.
    dstep: Of the step size before bias and softplus, (K, B, L, E).
    dBC: Of B and C, summed over the channels of a program, (blocks, B, L, K, 2).
    dbias, dA, dD: Summed over the steps of a chunk, (B, K, C, E).
    """
    b, chunk, e = _unravel(C, E, BE)
    blocks: tl.constexpr = (E + BE - 1) // BE
    block = tl.program_id(0) % blocks
    batches = tl.num_programs(0) // (blocks * C)
    at = _walk(chunk * T, L, height, width, window, ORDER)
    x_dbl += b * L * (K * (R + 2))
    xs = _load_steps(x + b * L * E + e, at, e, E, BE)
    dys = _load_steps(dy + b * L * E + e, at, e, E, BE)
    dxs = _first_sum(before, b * L * E + e, at, e, E, BE)
    rows = _position_of(tl.minimum(chunk * T + tl.arange(0, T), L - 1), height, width, window, ORDER)
    was_flipped = 0
    for i in tl.range(count, num_stages=1):
        k, flipped = _route(codes, i)
        at = _turn(at, flipped != was_flipped)
        xs = _turn(xs, flipped != was_flipped)
        dys = _turn(dys, flipped != was_flipped)
        dxs = _turn(dxs, flipped != was_flipped)
        was_flipped = flipped
        raw = _step_sizes(x_dbl, rows, weights, bias, e, k, K, E, R, RP, BE, TERMS, FACTOR)
        raw = _turn(raw, flipped == 1)
        A_k = _load(A + k * E + e, e, E, BE)
        skip = _load(D + k * E + e, e, E, BE)
        offset = ((b * K + k) * C + chunk) * E + e
        h = _start(starts, offset, e, E, BE)
        deltas = ()
        carried = ()  # into each step from the one before: exp(delta A) h
        for t in tl.static_range(T):
            delta = tl.where(_inside(chunk, t, flipped, L), softplus(raw[t]), 0.0)
            h = tl.exp2(delta * (A_k * LOG2E)) * h
            deltas = deltas + (delta,)
            carried = carried + (h,)
            h += delta * xs[t] * tl.load(x_dbl + at[t] * (K * (R + 2)) + k * (R + 2) + R)

        dstep_k = dstep + (k * batches + b) * L * E + e
        dBC_k = dBC + ((block * batches + b) * L * K + k) * 2
        g = _start(adjoints, offset, e, E, BE)  # of the state, by way of later steps
        sum_dbias = tl.zeros([BE], tl.float32)
        sum_dA = tl.zeros([BE], tl.float32)
        sum_dD = tl.zeros([BE], tl.float32)
        sums = ()
        for t in tl.static_range(T - 1, -1, -1):
            inside = _inside(chunk, t, flipped, L)
            delta = deltas[t]
            B, C_t = _load_B_C(x_dbl + at[t] * (K * (R + 2)) + k * (R + 2) + R, R)
            dy_t = tl.where(inside, dys[t], 0.0)
            g += C_t * dy_t
            x_B = xs[t] * B
            d = g * (A_k * carried[t] + x_B) * softplus_slope(delta)
            sum_dbias += d
            sum_dA += g * carried[t] * delta
            sum_dD += dy_t * xs[t]
            sums = (dxs[t] + skip * dy_t + g * delta * B,) + sums
            tl.store(dstep_k + at[t] * E, d, mask=inside & _within(e, E, BE))
            tl.store(dBC_k + at[t] * (2 * K), tl.sum(g * delta * xs[t], 0), mask=inside)
            tl.store(dBC_k + at[t] * (2 * K) + 1, tl.sum((carried[t] + delta * x_B) * dy_t, 0), mask=inside)
            g = tl.exp2(delta * (A_k * LOG2E)) * g
        dxs = sums
        _store(dbias + offset, sum_dbias, e, E, BE)
        _store(dA + offset, sum_dA, e, E, BE)
        _store(dD + offset, sum_dD, e, E, BE)
    _store_steps(dx + b * L * E + e, at, dxs, chunk, was_flipped, L, e, E, BE)


@triton.jit
def _step_sizes(
    x_dbl, rows, weights, bias, e, k,
    K: tl.constexpr, E: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, BE: tl.constexpr,
    TERMS: tl.constexpr, FACTOR: tl.constexpr,
):  # fmt: skip
    """Step sizes before the softplus at every step, T vectors: dt @ weights + bias on the tensor cores.

    Factors are sums of bfloat16: with TERMS = 2 of bfloat16 weights and two terms of dt, which leaves an error of
    2^-16; with TERMS = 3 of three terms of each, which hold all bits of
    float32. FACTOR is the type they meet in.
    """
    r = tl.arange(0, RP)
    dt = tl.load(x_dbl + rows[:, None] * (K * (R + 2)) + k * (R + 2) + r[None, :], mask=r[None, :] < R, other=0.0)
    weight = tl.load(
        weights + (k * R + r[:, None]) * E + e[None, :], mask=(r[:, None] < R) & _within(e, E, BE)[None, :], other=0.0
    )
    raw = tl.zeros([T, BE], tl.float32) + _load(bias + k * E + e, e, E, BE)[None, :]
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
    return _unstack(tl.permute(raw, [1, 0]))


@triton.jit
def softplus_slope(y):
    """Derivative of softplus where it has the value y: 1 - e^-y, relative error below 3e-7; the argument can go."""
    q = y * (1.0 / 5040.0) - (1.0 / 720.0)
    q = q * y + (1.0 / 120.0)
    q = q * y - (1.0 / 24.0)
    q = q * y + (1.0 / 6.0)
    q = q * y - 0.5
    q = q * y + 1.0
    return tl.where(y < 0.5, q * y, 1.0 - tl.exp2(-y * LOG2E))


@triton.jit
def _split(x):
    """The upper half of float32's bits, which a bfloat16 holds, and what that leaves."""
    near = (x.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
    return near, x - near


@triton.jit
def _unstack(tile):
    """The columns of (BE, 16) as 16 vectors."""
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
def _unravel(C, E: tl.constexpr, BE: tl.constexpr):
    """Return (sequence, chunk, channels) of this program: blocks of channels vary fastest; int64 where it scales."""
    i = tl.program_id(0)
    blocks: tl.constexpr = (E + BE - 1) // BE
    e = i % blocks * BE + tl.arange(0, BE)
    i = i // blocks
    return (i // C).to(tl.int64), i % C, e


@triton.jit
def _position_of(t, height, width, window, ORDER: tl.constexpr):
    """Position row * width + col of step t of an order; see `routes` for the arithmetic."""
    if ORDER == 0:
        return t
    elif ORDER == 1:
        return t % height * width + t // height
    else:
        return window_position(t, height, width, window)


@triton.jit
def _walk(first, L, height, width, window, ORDER: tl.constexpr):
    """Positions of T steps, T scalars: each from the one before, because division is slow."""
    at = _position_of(first, height, width, window, ORDER)
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
def _route(codes, i):
    """Return (k, flipped) of the i-th route of an order, from 16 bits of codes."""
    code = ((codes >> (16 * i)) & 0x7FFF).to(tl.int32)
    return code >> 1, code & 1


@triton.jit
def _turn(steps, reverse):
    """Put the steps of a chunk into a route's time: reverse them where it runs the other way."""
    turned = ()
    for t in tl.static_range(T):
        turned = turned + (tl.where(reverse, steps[T - 1 - t], steps[t]),)
    return turned


@triton.jit
def _inside(chunk, t, flipped, L):
    """Whether the t-th step in a route's time is one of the L."""
    return chunk * T + tl.where(flipped == 1, T - 1 - t, t) < L


@triton.jit
def _within(e, E: tl.constexpr, BE: tl.constexpr):
    """Which channels exist; all of them, known to the compiler, where blocks fit."""
    return (e < E) if E % BE != 0 else (e >= 0)


@triton.jit
def _load(pointer, e, E: tl.constexpr, BE: tl.constexpr):
    return tl.load(pointer, mask=_within(e, E, BE), other=0.0).to(tl.float32)


@triton.jit
def _store(pointer, value, e, E: tl.constexpr, BE: tl.constexpr):
    tl.store(pointer, value, mask=_within(e, E, BE))


@triton.jit
def _start(starts, offset, e, E: tl.constexpr, BE: tl.constexpr):
    """What a chunk starts with: zero where there is only one."""
    if starts is None:
        return tl.zeros([BE], tl.float32)
    else:
        return _load(starts + offset, e, E, BE)


@triton.jit
def _load_steps(pointer, at, e, E: tl.constexpr, BE: tl.constexpr):
    steps = ()
    for t in tl.static_range(T):
        steps = steps + (_load(pointer + at[t] * E, e, E, BE),)
    return steps


@triton.jit
def _store_steps(pointer, at, steps, chunk, flipped, L, e, E: tl.constexpr, BE: tl.constexpr):
    for t in tl.static_range(T):
        tl.store(pointer + at[t] * E, steps[t], mask=_inside(chunk, t, flipped, L) & _within(e, E, BE))


@triton.jit
def _first_sum(before, offset, at, e, E: tl.constexpr, BE: tl.constexpr):
    """What earlier orders add up to, or zeros."""
    if before is not None:
        return _load_steps(before + offset, at, e, E, BE)
    else:
        sums = ()
        for _ in tl.static_range(T):
            sums = sums + (tl.zeros([BE], tl.float32),)
        return sums


@triton.jit
def _load_B_C(pointer, R: tl.constexpr):
    if R % 2 == 0:
        return load_pair(pointer)
    else:
        return tl.load(pointer), tl.load(pointer + 1)
