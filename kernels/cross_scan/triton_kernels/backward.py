"""Device code of the scan along routes, backward."""

import triton
import triton.language as tl

from ssmpretrain.kernels.cross_scan.triton_kernels.steps import (
    SIZES,
    T,
    first_sum,
    is_inside,
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


@triton.jit(do_not_specialize=SIZES)
def adjoint_ends(
    dy, x_dbl, weights, bias, A, decays, ends,
    L, height, width, window, C, codes, count,
    ORDER: tl.constexpr,
    K: tl.constexpr, E: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, BE: tl.constexpr,
    TERMS: tl.constexpr, FACTOR: tl.constexpr,
):  # fmt: skip
    """Scan the state's gradient back over every chunk, from zero; write the decay and the gradient at its start."""
    b, chunk, e = unravel(C, E, BE)
    at = walk(chunk * T, L, height, width, window, ORDER)
    steps = chunk * T + tl.arange(0, T)
    rows = position_of(tl.minimum(steps, L - 1), height, width, window, ORDER)
    inside = steps < L
    x_dbl += b * L * (K * (R + 2))
    dys = load_steps(dy + b * L * E, rows, inside, e, E, BE)
    was_flipped = 0
    for i in tl.range(count, num_stages=1):
        k, flipped = route_at(codes, i)
        at = turn(at, flipped != was_flipped)
        dys = turn(dys, flipped != was_flipped)
        was_flipped = flipped
        deltas = step_sizes(x_dbl, rows, inside, weights, bias, e, k, K, E, R, RP, BE, TERMS, FACTOR)
        deltas = turn(deltas, flipped == 1)
        rate = load(A + k * E + e, e, E, BE) * LOG2E
        total = tl.zeros([BE], tl.float32)
        g = tl.zeros([BE], tl.float32)
        for t in tl.static_range(T - 1, -1, -1):
            delta = deltas[t]
            C_t = tl.load(x_dbl + at[t] * (K * (R + 2)) + k * (R + 2) + R + 1)
            g = tl.exp2(delta * rate) * (g + C_t * dys[t])
            total += delta
        offset = ((b * K + k) * C + chunk) * E + e
        store(decays + offset, tl.exp2(total * rate), e, E, BE)
        store(ends + offset, g, e, E, BE)


@triton.jit(do_not_specialize=SIZES)
def scan_gradients(
    x, dy, x_dbl, weights, bias, A, D, starts, adjoints, before, dx, dstep, dBC, dbias, dA, dD,
    L, height, width, window, C, codes, count,
    ORDER: tl.constexpr,
    K: tl.constexpr, E: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, BE: tl.constexpr,
    TERMS: tl.constexpr, FACTOR: tl.constexpr,
):  # fmt: skip
    """Write the gradient of x through the scan alone, and the gradients that products and sums in PyTorch finish.

    dx: Summed over the routes of the order, plus before, the sum of earlier orders, if any.
    dstep: Of the step size before bias and softplus, (K, B, L, E).
    dBC: Of B and C, summed over the channels of a program, (blocks, B, L, K, 2).
    dbias, dA, dD: Summed over the steps of a chunk, (B, K, C, E).
    """
    b, chunk, e = unravel(C, E, BE)
    blocks: tl.constexpr = (E + BE - 1) // BE
    block = tl.program_id(0) % blocks
    batches = tl.num_programs(0) // (blocks * C)
    at = walk(chunk * T, L, height, width, window, ORDER)
    steps = chunk * T + tl.arange(0, T)
    rows = position_of(tl.minimum(steps, L - 1), height, width, window, ORDER)
    inside = steps < L
    x_dbl += b * L * (K * (R + 2))
    xs = load_steps(x + b * L * E, rows, inside, e, E, BE)
    dys = load_steps(dy + b * L * E, rows, inside, e, E, BE)
    dxs = first_sum(before, b * L * E, rows, inside, e, E, BE)
    was_flipped = 0
    for i in tl.range(count, num_stages=1):
        k, flipped = route_at(codes, i)
        at = turn(at, flipped != was_flipped)
        xs = turn(xs, flipped != was_flipped)
        dys = turn(dys, flipped != was_flipped)
        dxs = turn(dxs, flipped != was_flipped)
        was_flipped = flipped
        deltas = step_sizes(x_dbl, rows, inside, weights, bias, e, k, K, E, R, RP, BE, TERMS, FACTOR)
        deltas = turn(deltas, flipped == 1)
        A_k = load(A + k * E + e, e, E, BE)
        skip = load(D + k * E + e, e, E, BE)
        offset = ((b * K + k) * C + chunk) * E + e
        h = load_start(starts, offset, e, E, BE)
        carried = ()  # into each step from the one before: exp(delta A) h
        for t in tl.static_range(T):
            delta = deltas[t]
            h = tl.exp2(delta * (A_k * LOG2E)) * h
            carried = carried + (h,)
            h += delta * xs[t] * tl.load(x_dbl + at[t] * (K * (R + 2)) + k * (R + 2) + R)

        dBC_k = dBC + ((block * batches + b) * L * K + k) * 2
        g = load_start(adjoints, offset, e, E, BE)  # of the state, by way of later steps
        sum_dbias = tl.zeros([BE], tl.float32)
        sum_dA = tl.zeros([BE], tl.float32)
        sum_dD = tl.zeros([BE], tl.float32)
        sums = ()
        ds = ()
        for t in tl.static_range(T - 1, -1, -1):
            delta = deltas[t]
            B, C_t = load_B_C(x_dbl + at[t] * (K * (R + 2)) + k * (R + 2) + R, R)
            g += C_t * dys[t]
            x_B = xs[t] * B
            d = g * (A_k * carried[t] + x_B) * softplus_slope(delta)
            sum_dbias += d
            sum_dA += g * carried[t] * delta
            sum_dD += dys[t] * xs[t]
            sums = (dxs[t] + skip * dys[t] + g * delta * B,) + sums
            exists = is_inside(chunk, t, flipped, L)
            ds = (d,) + ds
            tl.store(dBC_k + at[t] * (2 * K), tl.sum(g * delta * xs[t], 0), mask=exists)
            tl.store(dBC_k + at[t] * (2 * K) + 1, tl.sum((carried[t] + delta * x_B) * dys[t], 0), mask=exists)
            g = tl.exp2(delta * (A_k * LOG2E)) * g
        dxs = sums
        store_steps(dstep + (k * batches + b) * L * E, rows, inside, ds, flipped, e, E, BE)
        store(dbias + offset, sum_dbias, e, E, BE)
        store(dA + offset, sum_dA, e, E, BE)
        store(dD + offset, sum_dD, e, E, BE)
    store_steps(dx + b * L * E, rows, inside, dxs, was_flipped, e, E, BE)


@triton.jit
def softplus_slope(y):
    """Return the derivative of softplus from its value y, 1 - e^-y; the relative error is below 3e-7."""
    q = y * (1.0 / 5040.0) - (1.0 / 720.0)
    q = q * y + (1.0 / 120.0)
    q = q * y - (1.0 / 24.0)
    q = q * y + (1.0 / 6.0)
    q = q * y - 0.5
    q = q * y + 1.0
    return tl.where(y < 0.5, q * y, 1.0 - tl.exp2(-y * LOG2E))
