"""Device code of the SSD's gradients.

Z[t, s] is what token t reads of token s, per unit of step size: the product of C_t . B_s, dy_t . x_s and the decay
between them. The gradient of the logarithm of a decay is the sum of step_s Z[t, s] over all pairs that it lies between.
"""

import triton
import triton.language as tl

from ssmpretrain.kernels.ssd.inputs import MIN_LOG_DECAY
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

_SMALLEST = tl.constexpr(MIN_LOG_DECAY)


@triton.jit(do_not_specialize=[*LENGTHS, "HEADS"])
def read_gradients(
    x, B, C, D, dy, dt, A, dt_back, A_back, dstates, dx, dB, dD, columns, scale,
    L, H, R, K, BLOCKS, batch, HEADS,
    x_b, x_l, x_h, B_b, B_l, B_g, C_b, C_l, C_g, dy_b, dy_l, dy_h,
    dt_b, dt_l, dt_h, back_b, back_l, back_h,
    PER_CHUNK: tl.constexpr, T: tl.constexpr,
    N: tl.constexpr, TILE_N: tl.constexpr, P: tl.constexpr, TILE_P: tl.constexpr, SLICE: tl.constexpr,
    MATH: tl.constexpr,
):  # fmt: skip
    """Write dx, dB, the part of dD and the sums over readers of one block of tokens, for HEADS heads of a group.

    columns, (1 + 2 directions, B, H, L): sums of Z over readers, first of a token by itself, then in each direction by
    other tokens of the chunk and by tokens outside of it.
    """
    FORWARD: tl.constexpr = dt is not None
    BACK: tl.constexpr = dt_back is not None
    G = H // R
    slices = (R + HEADS - 1) // HEADS
    i = tl.program_id(0)
    part, i = i % slices, i // slices
    g, i = i % G, i // G
    block, b = i % BLOCKS, (i // BLOCKS).to(tl.int64)
    chunk = block // PER_CHUNK
    before = block - chunk * PER_CHUNK
    after = tl.minimum((chunk + 1) * PER_CHUNK, BLOCKS) - block - 1
    own = block * T
    t = own + tl.arange(0, T)
    inside = t < L
    index, other = tl.arange(0, T)[:, None], tl.arange(0, T)[None, :]  # read tokens, readers
    B += b * B_b + g.to(tl.int64) * B_g
    C += b * C_b + g.to(tl.int64) * C_g

    keys = load_rows(B, own, B_l, L, 0, N, T, TILE_N)
    dkeys = tl.zeros([T, TILE_N], tl.float32)
    for h in range(g * R + part * HEADS, g * R + tl.minimum((part + 1) * HEADS, R)):
        wide_h = b * 0 + h
        x_h_at, dy_h_at = x + b * x_b + wide_h * x_h, dy + b * dy_b + wide_h * dy_h
        log, step, log_back, step_back = None, None, None, None
        if FORWARD:
            dt_at = dt + b * dt_b + wide_h * dt_h
            rate = tl.load(A + h)
            step, log = load_steps(dt_at, rate, own, dt_l, L, T)
        if BACK:
            back_at = dt_back + b * back_b + wide_h * back_h
            rate_back = tl.load(A_back + h)
            step_back, log_back = load_steps(back_at, rate_back, own, back_l, L, T)
        column = columns + (b * H + h) * L + t
        plane = batch.to(tl.int64) * H * L

        values = load_rows(x_h_at, own, x_l, L, 0, P, T, TILE_P)
        dys = load_rows(dy_h_at, own, dy_l, L, 0, P, T, TILE_P)
        queries = load_rows(C, own, C_l, L, 0, N, T, TILE_N)
        dvalues = tl.zeros([T, TILE_P], tl.float32)
        if D is not None:
            wide_dys = dys.to(tl.float32)
            dvalues += wide_dys * (tl.load(D + h) / scale)
            tl.store(dD + (b * BLOCKS + block) * H + h, tl.sum(tl.sum(wide_dys * values.to(tl.float32), 1), 0))
        decay = tl.trans(decay_inside(log, log_back, FORWARD, BACK, T))
        steps = tl.trans(steps_inside(step, step_back, FORWARD, BACK, T))
        seen = product(keys, tl.trans(queries), None, MATH) * decay
        pulled = product(values, tl.trans(dys), None, MATH)
        pairs = seen * pulled * scale
        tl.store(column, tl.sum(tl.where(index == other, pairs, 0.0), 1), mask=inside)
        dvalues = product(seen * steps, dys, dvalues, MATH)
        dkeys = product(pulled * decay * steps * scale, queries, dkeys, MATH)

        if FORWARD:
            total = tl.sum(tl.where(index < other, pairs, 0.0), 1)
            row = sums_from(log) - log
            for n in range(1, after + 1):
                first = (block + n) * T
                _, log = load_steps(dt_at, rate, first, dt_l, L, T)
                dys = load_rows(dy_h_at, first, dy_l, L, 0, P, T, TILE_P)
                queries = load_rows(C, first, C_l, L, 0, N, T, TILE_N)
                decay = tl.exp2(row)[:, None] * tl.exp2(sums_to(log))[None, :]
                seen = product(keys, tl.trans(queries), None, MATH) * decay
                pulled = product(values, tl.trans(dys), None, MATH) * scale
                total += tl.sum(seen * pulled, 1)
                dvalues = product(seen * step[:, None], dys, dvalues, MATH)
                dkeys = product(pulled * decay * step[:, None], queries, dkeys, MATH)
                row += tl.sum(log, 0)
            column += plane
            tl.store(column, total, mask=inside)
            column += plane
            if dstates is not None:
                leaving = dstates + ((b * K + chunk) * H + h) * (N * P)
                edge = tl.exp2(row)
                zeros = tl.zeros([T, TILE_P], tl.float32)
                moved = times_states(zeros, B, own, B_l, L, leaving, P, 1, N, P, T, SLICE, TILE_P, 0, MATH)
                moved *= edge[:, None]
                tl.store(column, tl.sum(moved * values.to(tl.float32), 1), mask=inside)
                dvalues += moved * (step / scale)[:, None]
                zeros = tl.zeros([T, TILE_N], tl.float32)
                moved = times_states(zeros, x_h_at, own, x_l, L, leaving, 1, P, P, N, T, SLICE, TILE_N, 0, MATH)
                dkeys += moved * (edge * step)[:, None]
        if BACK:
            total = tl.sum(tl.where(index > other, pairs, 0.0), 1)
            row = sums_to(log_back) - log_back
            for n in range(1, before + 1):
                first = (block - n) * T
                _, log = load_steps(back_at, rate_back, first, back_l, L, T)
                dys = load_rows(dy_h_at, first, dy_l, L, 0, P, T, TILE_P)
                queries = load_rows(C, first, C_l, L, 0, N, T, TILE_N)
                decay = tl.exp2(row)[:, None] * tl.exp2(sums_from(log))[None, :]
                seen = product(keys, tl.trans(queries), None, MATH) * decay
                pulled = product(values, tl.trans(dys), None, MATH) * scale
                total += tl.sum(seen * pulled, 1)
                dvalues = product(seen * step_back[:, None], dys, dvalues, MATH)
                dkeys = product(pulled * decay * step_back[:, None], queries, dkeys, MATH)
                row += tl.sum(log, 0)
            column += plane
            tl.store(column, total, mask=inside)
            column += plane
            if dstates is not None:
                slot = (b * K + chunk) * H + h
                if FORWARD:
                    slot += batch.to(tl.int64) * K * H
                leaving = dstates + slot * (N * P)
                edge = tl.exp2(row)
                zeros = tl.zeros([T, TILE_P], tl.float32)
                moved = times_states(zeros, B, own, B_l, L, leaving, P, 1, N, P, T, SLICE, TILE_P, 0, MATH)
                moved *= edge[:, None]
                tl.store(column, tl.sum(moved * values.to(tl.float32), 1), mask=inside)
                dvalues += moved * (step_back / scale)[:, None]
                zeros = tl.zeros([T, TILE_N], tl.float32)
                moved = times_states(zeros, x_h_at, own, x_l, L, leaving, 1, P, P, N, T, SLICE, TILE_N, 0, MATH)
                dkeys += moved * (edge * step_back)[:, None]
        store_rows(dx + (b * L * H + h) * P, dvalues * scale, own, H * P, L, 0, P, T, TILE_P)
    store_rows(dB + ((part * batch + b) * L * G + g) * N, dkeys, own, G * N, L, 0, N, T, TILE_N)


@triton.jit(do_not_specialize=[*LENGTHS, "HEADS"])
def reader_gradients(
    x, B, C, dy, dt, A, dt_back, A_back, states, dC, rows, scale,
    L, H, R, K, BLOCKS, batch, HEADS,
    x_b, x_l, x_h, B_b, B_l, B_g, C_b, C_l, C_g, dy_b, dy_l, dy_h,
    dt_b, dt_l, dt_h, back_b, back_l, back_h,
    PER_CHUNK: tl.constexpr, T: tl.constexpr,
    N: tl.constexpr, TILE_N: tl.constexpr, P: tl.constexpr, TILE_P: tl.constexpr, SLICE: tl.constexpr,
    MATH: tl.constexpr,
):  # fmt: skip
    """Write dC of one block of tokens, for HEADS heads of a group, and the sums over the other tokens that it reads.

    rows, (directions, B, H, L): sums of step_s Z over all tokens that a reader reads in a direction, without itself.
    """
    FORWARD: tl.constexpr = dt is not None
    BACK: tl.constexpr = dt_back is not None
    G = H // R
    slices = (R + HEADS - 1) // HEADS
    i = tl.program_id(0)
    part, i = i % slices, i // slices
    g, i = i % G, i // G
    block, b = i % BLOCKS, (i // BLOCKS).to(tl.int64)
    chunk = block // PER_CHUNK
    before = block - chunk * PER_CHUNK
    after = tl.minimum((chunk + 1) * PER_CHUNK, BLOCKS) - block - 1
    own = block * T
    t = own + tl.arange(0, T)
    inside = t < L
    index, other = tl.arange(0, T)[:, None], tl.arange(0, T)[None, :]  # readers, read tokens
    B += b * B_b + g.to(tl.int64) * B_g
    C += b * C_b + g.to(tl.int64) * C_g

    queries = load_rows(C, own, C_l, L, 0, N, T, TILE_N)
    dqueries = tl.zeros([T, TILE_N], tl.float32)
    for h in range(g * R + part * HEADS, g * R + tl.minimum((part + 1) * HEADS, R)):
        wide_h = b * 0 + h
        x_h_at, dy_h_at = x + b * x_b + wide_h * x_h, dy + b * dy_b + wide_h * dy_h
        log, step, log_back, step_back = None, None, None, None
        if FORWARD:
            dt_at = dt + b * dt_b + wide_h * dt_h
            rate = tl.load(A + h)
            step, log = load_steps(dt_at, rate, own, dt_l, L, T)
        if BACK:
            back_at = dt_back + b * back_b + wide_h * back_h
            rate_back = tl.load(A_back + h)
            step_back, log_back = load_steps(back_at, rate_back, own, back_l, L, T)
        row_at = rows + (b * H + h) * L + t

        dys = load_rows(dy_h_at, own, dy_l, L, 0, P, T, TILE_P)
        values = load_rows(x_h_at, own, x_l, L, 0, P, T, TILE_P)
        keys = load_rows(B, own, B_l, L, 0, N, T, TILE_N)
        pulled = product(dys, tl.trans(values), None, MATH) * scale
        pulled *= decay_inside(log, log_back, FORWARD, BACK, T) * steps_inside(step, step_back, FORWARD, BACK, T)
        pairs = product(queries, tl.trans(keys), None, MATH) * pulled
        dqueries = product(pulled, keys, dqueries, MATH)

        if FORWARD:
            total = tl.sum(tl.where(index > other, pairs, 0.0), 1)
            row = sums_to(log)
            for n in range(1, before + 1):
                first = (block - n) * T
                step, log = load_steps(dt_at, rate, first, dt_l, L, T)
                values = load_rows(x_h_at, first, x_l, L, 0, P, T, TILE_P)
                keys = load_rows(B, first, B_l, L, 0, N, T, TILE_N)
                weight = (tl.exp2(row) * scale)[:, None] * (tl.exp2(sums_from(log) - log) * step)[None, :]
                pulled = product(dys, tl.trans(values), None, MATH) * weight
                total += tl.sum(product(queries, tl.trans(keys), None, MATH) * pulled, 1)
                dqueries = product(pulled, keys, dqueries, MATH)
                row += tl.sum(log, 0)
            if states is not None:
                entering = states + ((b * K + chunk) * H + h) * (N * P)
                zeros = tl.zeros([T, TILE_N], tl.float32)
                moved = times_states(zeros, dy_h_at, own, dy_l, L, entering, 1, P, P, N, T, SLICE, TILE_N, 0, MATH)
                moved *= (tl.exp2(row) * scale)[:, None]
                total += tl.sum(moved * queries.to(tl.float32), 1)
                dqueries += moved
            tl.store(row_at, total, mask=inside)
            row_at += batch.to(tl.int64) * H * L
        if BACK:
            total = tl.sum(tl.where(index < other, pairs, 0.0), 1)
            row = sums_from(log_back)
            for n in range(1, after + 1):
                first = (block + n) * T
                step, log = load_steps(back_at, rate_back, first, back_l, L, T)
                values = load_rows(x_h_at, first, x_l, L, 0, P, T, TILE_P)
                keys = load_rows(B, first, B_l, L, 0, N, T, TILE_N)
                weight = (tl.exp2(row) * scale)[:, None] * (tl.exp2(sums_to(log) - log) * step)[None, :]
                pulled = product(dys, tl.trans(values), None, MATH) * weight
                total += tl.sum(product(queries, tl.trans(keys), None, MATH) * pulled, 1)
                dqueries = product(pulled, keys, dqueries, MATH)
                row += tl.sum(log, 0)
            if states is not None:
                slot = (b * K + chunk) * H + h
                if FORWARD:
                    slot += batch.to(tl.int64) * K * H
                entering = states + slot * (N * P)
                zeros = tl.zeros([T, TILE_N], tl.float32)
                moved = times_states(zeros, dy_h_at, own, dy_l, L, entering, 1, P, P, N, T, SLICE, TILE_N, 0, MATH)
                moved *= (tl.exp2(row) * scale)[:, None]
                total += tl.sum(moved * queries.to(tl.float32), 1)
                dqueries += moved
            tl.store(row_at, total, mask=inside)
    store_rows(dC + ((part * batch + b) * L * G + g) * N, dqueries, own, G * N, L, 0, N, T, TILE_N)


@triton.jit(do_not_specialize=["L", "K", "batch", "dt_b", "dt_l", "dt_h"])
def step_gradients(
    dt, A, rows, columns, products, ddt, dA,
    L, H, K, batch, d, dt_b, dt_l, dt_h,
    BACK: tl.constexpr, TILES: tl.constexpr, Q: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Write the gradients of the step sizes of one chunk, head and direction d, and the chunk's part of dA.

    A decay lies between a reader and what it reads: in the forward direction after the token that is read, up to and
    with the reader's.
    """
    i = tl.program_id(0)
    h, i = i % H, i // H
    chunk, b = i % K, (i // K).to(tl.int64)
    t = chunk * Q + tl.arange(0, TILE)
    inside = (tl.arange(0, TILE) < Q) & (t < L)
    wide_h = h.to(tl.int64)
    rate = tl.load(A + h)
    step = tl.load(dt + b * dt_b + wide_h * dt_h + t.to(tl.int64) * dt_l, mask=inside, other=0.0)
    plane = batch.to(tl.int64) * H * L
    at = (b * H + h) * L + t
    direct = tl.load(columns + at, mask=inside, other=0.0)
    read = tl.load(columns + (2 * d + 1) * plane + at, mask=inside, other=0.0)
    between = tl.load(rows + d * plane + at, mask=inside, other=0.0) - step * read
    dlog = sums_to(between) if BACK else sums_from(between)
    direct += read
    if products is not None:
        outside = tl.load(columns + (2 * d + 2) * plane + at, mask=inside, other=0.0)
        direct += outside
        leaving = step * outside
        dlog += (sums_from(leaving) if BACK else sums_to(leaving)) - leaving
        slot = ((d * batch + b) * K + chunk) * H + h
        for tile in tl.static_range(TILES):
            dlog += tl.load(products + slot * TILES + tile)
    dlog = tl.where(inside & (step * rate > _SMALLEST), dlog, 0.0)
    tl.store(ddt + (b * L + t) * H + h, direct + rate * dlog, mask=inside)
    tl.store(dA + (b * K + chunk) * H + h, tl.sum(step * dlog, 0))
