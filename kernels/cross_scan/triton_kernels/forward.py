"""Device code of the scan along routes, forward, and of `carry`, which the backward pass uses too."""

import triton
import triton.language as tl

from ssmpretrain.kernels.cross_scan.triton_kernels.steps import (
    SIZES,
    T,
    first_sum,
    load,
    load_B_C,
    load_start,
    load_steps,
    position_of,
    route_at,
    step_sizes,
    store,
    store_steps,
    turn,
    unravel,
    walk,
)
from ssmpretrain.kernels.gpu.triton_kernels.functions import LOG2E

AHEAD = tl.constexpr(16)  # chunks that `carry` reads before it needs them


@triton.jit(do_not_specialize=SIZES)
def chunk_ends(
    x, x_dbl, weights, bias, A, decays, ends,
    L, height, width, window, C, codes, count,
    ORDER: tl.constexpr,
    K: tl.constexpr, E: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, BE: tl.constexpr,
    TERMS: tl.constexpr, FACTOR: tl.constexpr,
):  # fmt: skip
    """Scan every chunk from zero, in the route's time; write the decay over it and the state at its end."""
    b, chunk, e = unravel(C, E, BE)
    at = walk(chunk * T, L, height, width, window, ORDER)
    steps = chunk * T + tl.arange(0, T)
    rows = position_of(tl.minimum(steps, L - 1), height, width, window, ORDER)
    inside = steps < L
    x_dbl += b * L * (K * (R + 2))
    xs = load_steps(x + b * L * E, rows, inside, e, E, BE)
    was_flipped = 0
    for i in tl.range(count, num_stages=1):
        k, flipped = route_at(codes, i)
        at = turn(at, flipped != was_flipped)
        xs = turn(xs, flipped != was_flipped)
        was_flipped = flipped
        deltas = step_sizes(x_dbl, rows, inside, weights, bias, e, k, K, E, R, RP, BE, TERMS, FACTOR)
        deltas = turn(deltas, flipped == 1)
        rate = load(A + k * E + e, e, E, BE) * LOG2E
        total = tl.zeros([BE], tl.float32)
        h = tl.zeros([BE], tl.float32)
        for t in tl.static_range(T):
            delta = deltas[t]
            B = tl.load(x_dbl + at[t] * (K * (R + 2)) + k * (R + 2) + R)
            h = tl.exp2(delta * rate) * h + delta * xs[t] * B
            total += delta
        offset = ((b * K + k) * C + chunk) * E + e
        store(decays + offset, tl.exp2(total * rate), e, E, BE)
        store(ends + offset, h, e, E, BE)


@triton.jit(do_not_specialize=["C"])
def carry(decays, ends, C, FLIPS: tl.constexpr, K: tl.constexpr, E: tl.constexpr, BE: tl.constexpr):
    """Replace the end of every chunk, scanned from zero, by the value that the chunk starts from; zero for the first.

    FLIPS has bit k set if route k reads the chunks from the last to the first.
    """
    sequence, _, e = unravel(1, E, BE)
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
            read = read + ((load(decays + chunk, e, E, BE), load(ends + chunk, e, E, BE)),)
        for i in tl.static_range(AHEAD):
            tl.store(ends + chunks[i], h, mask=(first + i < C) & (e < E))
            h = read[i][0] * h + read[i][1]


@triton.jit(do_not_specialize=SIZES)
def scan_chunks(
    x, x_dbl, weights, bias, A, D, starts, before, y,
    L, height, width, window, C, codes, count,
    ORDER: tl.constexpr,
    K: tl.constexpr, E: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, BE: tl.constexpr,
    TERMS: tl.constexpr, FACTOR: tl.constexpr,
):  # fmt: skip
    """Write the sum of C_t h_t + D x_t over the routes of the order, plus before, the sum of earlier orders, if any."""
    b, chunk, e = unravel(C, E, BE)
    at = walk(chunk * T, L, height, width, window, ORDER)
    steps = chunk * T + tl.arange(0, T)
    rows = position_of(tl.minimum(steps, L - 1), height, width, window, ORDER)
    inside = steps < L
    x_dbl += b * L * (K * (R + 2))
    xs = load_steps(x + b * L * E, rows, inside, e, E, BE)
    ys = first_sum(before, b * L * E, rows, inside, e, E, BE)
    was_flipped = 0
    for i in tl.range(count, num_stages=1):
        k, flipped = route_at(codes, i)
        at = turn(at, flipped != was_flipped)
        xs = turn(xs, flipped != was_flipped)
        ys = turn(ys, flipped != was_flipped)
        was_flipped = flipped
        deltas = step_sizes(x_dbl, rows, inside, weights, bias, e, k, K, E, R, RP, BE, TERMS, FACTOR)
        deltas = turn(deltas, flipped == 1)
        rate = load(A + k * E + e, e, E, BE) * LOG2E
        skip = load(D + k * E + e, e, E, BE)
        h = load_start(starts, ((b * K + k) * C + chunk) * E + e, e, E, BE)
        sums = ()
        for t in tl.static_range(T):
            delta = deltas[t]
            B, C_t = load_B_C(x_dbl + at[t] * (K * (R + 2)) + k * (R + 2) + R, R)
            h = tl.exp2(delta * rate) * h + delta * xs[t] * B
            sums = sums + (ys[t] + skip * xs[t] + C_t * h,)
        ys = sums
    store_steps(y + b * L * E, rows, inside, ys, was_flipped, e, E, BE)
