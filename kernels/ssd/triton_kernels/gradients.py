"""Device code of the SSD's gradients.

Z[t, s] is what token t reads of token s per unit of step size, times the gradient: the product of C_t . B_s, dy_t . x_s
and the decay between them. The gradient of the logarithm of a decay is the sum of step_s Z[t, s] over all pairs that it
lies between.
"""

import triton
import triton.language as tl

from ssmpretrain.kernels.ssd.inputs import MIN_LOG_DECAY
from ssmpretrain.kernels.ssd.triton_kernels.blocks import (
    LENGTHS,
    column_weights,
    load_rows,
    load_steps,
    product,
    row_logs,
    store_rows,
    sums_from,
    sums_to,
    times_states,
    weights_inside,
)

_SMALLEST = tl.constexpr(MIN_LOG_DECAY)


@triton.jit(do_not_specialize=[*LENGTHS])
def pair_gradients(
    queries, keys, own_values, values, dt, A, dt_back, A_back, states, dqueries, sums, outside, dD, scale,
    L, H, R, K, BLOCKS, batch,
    queries_b, queries_l, queries_g, keys_b, keys_l, keys_g, own_b, own_l, own_h, values_b, values_l, values_h,
    dt_b, dt_l, dt_h, back_b, back_l, back_h,
    ADJOINT: tl.constexpr, PER_CHUNK: tl.constexpr, T: tl.constexpr,
    N: tl.constexpr, TILE_N: tl.constexpr, P: tl.constexpr, TILE_P: tl.constexpr, SLICE: tl.constexpr,
    MATH: tl.constexpr,
):  # fmt: skip
    """Write one head's share of dC, and the sums over pairs, for one block of tokens.

    Queries are C, keys B, own_values dy, values x, and states those that enter the chunks. With ADJOINT queries are B,
    keys C, own_values x, values dy, states the gradients of those that leave the chunks, and dqueries is dB.

    dqueries: (B, L, H, N).
    sums: (1 + directions, B, H, L), sums over the pairs of each token, as reader of step_s Z[t, s], with ADJOINT as the
        token that is read of Z[t, s]: first the pair with itself, then in each direction the pairs inside its chunk.
    outside: (directions, B, H, L), the same for the pairs with tokens outside of the chunk.
    dD: (B, BLOCKS, H), the block's part, only with ADJOINT.
    """
    i = tl.program_id(0)
    h, i = i % H, i // H
    block, b = i % BLOCKS, (i // BLOCKS).to(tl.int64)
    chunk = block // PER_CHUNK
    before, after = block - chunk * PER_CHUNK, tl.minimum((chunk + 1) * PER_CHUNK, BLOCKS) - block - 1
    own = block * T
    t = own + tl.arange(0, T)
    wide_h, group = h.to(tl.int64), (h // R).to(tl.int64)
    queries += b * queries_b + group * queries_g
    keys += b * keys_b + group * keys_g
    own_values += b * own_b + wide_h * own_h
    values += b * values_b + wide_h * values_h

    log, step, log_back, step_back = None, None, None, None
    if dt is not None:
        dt += b * dt_b + wide_h * dt_h
        rate = tl.load(A + h)
        step, log = load_steps(dt, rate, own, dt_l, L, T)
    if dt_back is not None:
        dt_back += b * back_b + wide_h * back_h
        rate_back = tl.load(A_back + h)
        step_back, log_back = load_steps(dt_back, rate_back, own, back_l, L, T)

    query = load_rows(queries, own, queries_l, L, 0, N, T, TILE_N)
    key = load_rows(keys, own, keys_l, L, 0, N, T, TILE_N)
    own_value = load_rows(own_values, own, own_l, L, 0, P, T, TILE_P)
    value = load_rows(values, own, values_l, L, 0, P, T, TILE_P)
    decay, steps = weights_inside(step, log, step_back, log_back, dt is not None, dt_back is not None, ADJOINT, T)
    row, column = tl.arange(0, T)[:, None], tl.arange(0, T)[None, :]
    pulled = product(own_value, tl.trans(value), None, MATH)
    if dD is not None:
        tl.store(dD + (b * BLOCKS + block) * H + h, tl.sum(tl.sum(tl.where(row == column, pulled, 0.0), 1), 0))
    pulled *= decay * scale
    seen = product(query, tl.trans(key), None, MATH)
    pairs = seen * pulled
    if not ADJOINT:
        pairs *= steps
    # sum at once: the pairs need not stay in registers
    with_earlier = tl.sum(tl.where(row > column, pairs, 0.0), 1)
    with_later = tl.sum(tl.where(row < column, pairs, 0.0), 1)
    if ADJOINT:
        tl.store(sums + (b * H + h) * L + t, tl.sum(tl.where(row == column, pairs, 0.0), 1), mask=t < L)
    dquery = product(pulled * steps, key, tl.zeros([T, TILE_N], tl.float32), MATH)

    plane, slot = batch.to(tl.int64) * H * L, (b * K + chunk) * H + h
    at = (b * H + h) * L + t
    sums += plane
    if dt is not None:
        dquery = _pair_with_others(
            dquery, with_later if ADJOINT else with_earlier, query, keys, keys_l, own_value, own_values, own_l,
            values, values_l, step, log, dt, rate, dt_l, states, slot, sums + at, outside + at, own,
            after if ADJOINT else before, L, scale, not ADJOINT, ADJOINT, T, N, TILE_N, P, TILE_P, SLICE, MATH,
        )  # fmt: skip
        slot += batch.to(tl.int64) * K * H
        at += plane
    if dt_back is not None:
        dquery = _pair_with_others(
            dquery, with_earlier if ADJOINT else with_later, query, keys, keys_l, own_value, own_values, own_l,
            values, values_l, step_back, log_back, dt_back, rate_back, back_l, states, slot, sums + at, outside + at,
            own, before if ADJOINT else after, L, scale, ADJOINT, ADJOINT, T, N, TILE_N, P, TILE_P, SLICE, MATH,
        )  # fmt: skip
    store_rows(dqueries + (b * L * H + h) * N, dquery, own, H * N, L, 0, N, T, TILE_N)


@triton.jit
def _pair_with_others(
    dquery, total, query, keys, keys_l, own_value, own_values, own_l, values, values_l,
    step, log, dt, rate, dt_l, states, slot, sums, outside, own, others, L, scale,
    EARLIER: tl.constexpr, ADJOINT: tl.constexpr, T: tl.constexpr,
    N: tl.constexpr, TILE_N: tl.constexpr, P: tl.constexpr, TILE_P: tl.constexpr, SLICE: tl.constexpr,
    MATH: tl.constexpr,
):  # fmt: skip
    """Add one direction's pairs with the other blocks of the chunk and, through the states, with other chunks."""
    inside = own + tl.arange(0, T) < L
    row = row_logs(log, EARLIER, ADJOINT)
    for n in tl.range(1, others + 1, num_stages=2):
        first = own - n * T if EARLIER else own + n * T
        other_step, other_log = load_steps(dt, rate, first, dt_l, L, T)
        key = load_rows(keys, first, keys_l, L, 0, N, T, TILE_N)
        value = load_rows(values, first, values_l, L, 0, P, T, TILE_P)
        weights = (tl.exp2(row) * scale)[:, None] * column_weights(other_step, other_log, EARLIER, ADJOINT)[None, :]
        pulled = product(own_value, tl.trans(value), None, MATH) * weights
        total += tl.sum(product(query, tl.trans(key), None, MATH) * pulled, 1)
        if ADJOINT:
            pulled *= step[:, None]
        dquery = product(pulled, key, dquery, MATH)
        row += tl.sum(other_log, 0)
    tl.store(sums, total, mask=inside)
    if states is not None:
        moved = times_states(own_values, own, own_l, L, states + slot * (N * P), 1, P, 0, T, P, N, SLICE, TILE_N, MATH)
        moved *= (tl.exp2(row) * scale)[:, None]
        tl.store(outside, tl.sum(moved * query.to(tl.float32), 1), mask=inside)
        if ADJOINT:
            moved *= step[:, None]
        dquery += moved
    return dquery


@triton.jit(do_not_specialize=["L", "K", "batch", "d", "dt_b", "dt_l", "dt_h"])
def step_gradients(
    dt, A, reader_sums, reader_outside, read_sums, read_outside, products, ddt, dA, scale,
    L, H, K, batch, d, dt_b, dt_l, dt_h,
    BACK: tl.constexpr, TILES: tl.constexpr, Q: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Write the gradients of the step sizes of one chunk, head and direction d, and the chunk's part of dA.

    In the forward direction a decay lies between the readers from its own token on and what is read before it.
    """
    i = tl.program_id(0)
    h, i = i % H, i // H
    chunk, b = i % K, (i // K).to(tl.int64)
    t = chunk * Q + tl.arange(0, TILE)
    inside = (tl.arange(0, TILE) < Q) & (t < L)
    rate = tl.load(A + h)
    step = tl.load(dt + b * dt_b + h.to(tl.int64) * dt_h + t.to(tl.int64) * dt_l, mask=inside, other=0.0)
    at = (b * H + h) * L + t
    direct = tl.load(read_sums + at, mask=inside, other=0.0)
    at += (b * 0 + d) * batch * H * L
    plane = (b * 0 + batch) * H * L
    read = tl.load(read_sums + plane + at, mask=inside, other=0.0)
    between = tl.load(reader_sums + plane + at, mask=inside, other=0.0) - step * read
    direct += read
    if products is not None:
        between += tl.load(reader_outside + at, mask=inside, other=0.0)
        read = tl.load(read_outside + at, mask=inside, other=0.0)
        direct += read
        leaving = step * read
    dlog = sums_to(between) if BACK else sums_from(between)
    if products is not None:
        dlog += (sums_from(leaving) if BACK else sums_to(leaving)) - leaving
        slot = ((d * batch + b) * K + chunk) * H + h
        for tile in tl.static_range(TILES):
            dlog += scale * tl.load(products + slot * TILES + tile)
    dlog = tl.where(inside & (step * rate > _SMALLEST), dlog, 0.0)
    tl.store(ddt + (b * L + t) * H + h, direct + rate * dlog, mask=inside)
    tl.store(dA + (b * K + chunk) * H + h, tl.sum(step * dlog, 0))
