"""Device code of the SSD's output."""

import triton
import triton.language as tl

from ssmpretrain.kernels.ssd.triton_kernels.blocks import (
    LENGTHS,
    decay_inside,
    load_rows,
    load_steps,
    product,
    steps_inside,
    store_rows,
    sums_from,
    sums_to,
    times_states,
)


@triton.jit(do_not_specialize=[*LENGTHS])
def outputs(
    x, B, C, D, dt, A, dt_back, A_back, states, y, scale,
    L, H, R, K, BLOCKS, batch,
    x_b, x_l, x_h, B_b, B_l, B_g, C_b, C_l, C_g,
    dt_b, dt_l, dt_h, back_b, back_l, back_h,
    PER_CHUNK: tl.constexpr, T: tl.constexpr,
    N: tl.constexpr, TILE_N: tl.constexpr, SLICE: tl.constexpr, P: tl.constexpr, TILE_P: tl.constexpr,
    MATH: tl.constexpr,
):  # fmt: skip
    """Write the output of one block of tokens and one head: TILE_P of its channels, from all states."""
    FORWARD: tl.constexpr = dt is not None
    BACK: tl.constexpr = dt_back is not None
    p_tiles: tl.constexpr = (P + TILE_P - 1) // TILE_P
    i = tl.program_id(0)
    p0, i = i % p_tiles * TILE_P, i // p_tiles
    h, i = i % H, i // H
    block, b = i % BLOCKS, (i // BLOCKS).to(tl.int64)
    chunk = block // PER_CHUNK
    wide_h, group = h.to(tl.int64), (h // R).to(tl.int64)
    x += b * x_b + wide_h * x_h
    B += b * B_b + group * B_g
    C += b * C_b + group * C_g

    log, step, log_back, step_back = None, None, None, None
    if FORWARD:
        dt += b * dt_b + wide_h * dt_h
        rate = tl.load(A + h)
        step, log = load_steps(dt, rate, block * T, dt_l, L, T)
    if BACK:
        dt_back += b * back_b + wide_h * back_h
        rate_back = tl.load(A_back + h)
        step_back, log_back = load_steps(dt_back, rate_back, block * T, back_l, L, T)

    queries = load_rows(C, block * T, C_l, L, 0, N, T, TILE_N)
    keys = load_rows(B, block * T, B_l, L, 0, N, T, TILE_N)
    values = load_rows(x, block * T, x_l, L, p0, P, T, TILE_P)
    weights = product(queries, tl.trans(keys), None, MATH)
    weights *= decay_inside(log, log_back, FORWARD, BACK, T) * steps_inside(step, step_back, FORWARD, BACK, T)
    acc = tl.zeros([T, TILE_P], tl.float32)
    if D is not None:
        acc += values.to(tl.float32) * (tl.load(D + h) / scale)
    acc = product(weights, values, acc, MATH)

    if FORWARD:
        row = sums_to(log)  # of the decays since the reader's state entered its block
        for other in range(1, block - chunk * PER_CHUNK + 1):
            first = (block - other) * T
            step, log = load_steps(dt, rate, first, dt_l, L, T)
            column = tl.exp2(sums_from(log) - log) * step
            keys = load_rows(B, first, B_l, L, 0, N, T, TILE_N)
            values = load_rows(x, first, x_l, L, p0, P, T, TILE_P)
            weights = product(queries, tl.trans(keys), None, MATH) * (tl.exp2(row)[:, None] * column[None, :])
            acc = product(weights, values, acc, MATH)
            row += tl.sum(log, 0)
        if states is not None:
            entering = states + ((b * K + chunk) * H + h) * (N * P)
            zeros = tl.zeros([T, TILE_P], tl.float32)
            read = times_states(zeros, C, block * T, C_l, L, entering, P, 1, N, P, T, SLICE, TILE_P, p0, MATH)
            acc += tl.exp2(row)[:, None] * read
            states += batch.to(tl.int64) * K * H * (N * P)
    if BACK:
        row = sums_from(log_back)
        for other in range(1, tl.minimum((chunk + 1) * PER_CHUNK, BLOCKS) - block):
            first = (block + other) * T
            step, log = load_steps(dt_back, rate_back, first, back_l, L, T)
            column = tl.exp2(sums_to(log) - log) * step
            keys = load_rows(B, first, B_l, L, 0, N, T, TILE_N)
            values = load_rows(x, first, x_l, L, p0, P, T, TILE_P)
            weights = product(queries, tl.trans(keys), None, MATH) * (tl.exp2(row)[:, None] * column[None, :])
            acc = product(weights, values, acc, MATH)
            row += tl.sum(log, 0)
        if states is not None:
            entering = states + ((b * K + chunk) * H + h) * (N * P)
            zeros = tl.zeros([T, TILE_P], tl.float32)
            read = times_states(zeros, C, block * T, C_l, L, entering, P, 1, N, P, T, SLICE, TILE_P, p0, MATH)
            acc += tl.exp2(row)[:, None] * read
    y += ((b * L) * H + h) * P
    store_rows(y, acc * scale, block * T, H * P, L, p0, P, T, TILE_P)
