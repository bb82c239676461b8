"""Device code of the SSD's output, and of the gradient of its input, which is an SSD of the output's gradient."""

import triton
import triton.language as tl

from ssmpretrain.kernels.ssd.triton_kernels.blocks import (
    LENGTHS,
    column_weights,
    load_rows,
    load_steps,
    product,
    row_logs,
    store_rows,
    times_states,
    weights_inside,
)


@triton.jit(do_not_specialize=[*LENGTHS])
def outputs(
    queries, keys, values, D, dt, A, dt_back, A_back, states, y, scale,
    L, H, R, K, BLOCKS, batch,
    queries_b, queries_l, queries_g, keys_b, keys_l, keys_g, values_b, values_l, values_h,
    dt_b, dt_l, dt_h, back_b, back_l, back_h,
    ADJOINT: tl.constexpr, PER_CHUNK: tl.constexpr, T: tl.constexpr,
    N: tl.constexpr, TILE_N: tl.constexpr, P: tl.constexpr, TILE_P: tl.constexpr, SLICE: tl.constexpr,
    MATH: tl.constexpr,
):  # fmt: skip
    """Write TILE_P channels of the output of one block of tokens and one head.

    Queries are C, keys B, values x, and states those that enter the chunks. With ADJOINT queries are B, keys C, values
    dy, states the gradients of those that leave the chunks, and y is dx.
    """
    p_tiles: tl.constexpr = (P + TILE_P - 1) // TILE_P
    i = tl.program_id(0)
    p0, i = i % p_tiles * TILE_P, i // p_tiles
    h, i = i % H, i // H
    block, b = i % BLOCKS, (i // BLOCKS).to(tl.int64)
    chunk = block // PER_CHUNK
    before, after = block - chunk * PER_CHUNK, tl.minimum((chunk + 1) * PER_CHUNK, BLOCKS) - block - 1
    own = block * T
    wide_h, group = h.to(tl.int64), (h // R).to(tl.int64)
    queries += b * queries_b + group * queries_g
    keys += b * keys_b + group * keys_g
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
    value = load_rows(values, own, values_l, L, p0, P, T, TILE_P)
    decay, steps = weights_inside(step, log, step_back, log_back, dt is not None, dt_back is not None, ADJOINT, T)
    weights = product(query, tl.trans(key), None, MATH) * (decay * steps)
    acc = tl.zeros([T, TILE_P], tl.float32)
    if D is not None:
        acc += value.to(tl.float32) * (tl.load(D + h) / scale)
    acc = product(weights, value, acc, MATH)

    slot = (b * K + chunk) * H + h
    if dt is not None:
        acc = _read_others(
            acc, query, queries, queries_l, keys, keys_l, values, values_l, step, log, dt, rate, dt_l,
            states, slot, own, after if ADJOINT else before, L, p0,
            not ADJOINT, ADJOINT, T, N, TILE_N, P, TILE_P, SLICE, MATH,
        )  # fmt: skip
        slot += batch.to(tl.int64) * K * H
    if dt_back is not None:
        acc = _read_others(
            acc, query, queries, queries_l, keys, keys_l, values, values_l, step_back, log_back, dt_back, rate_back,
            back_l, states, slot, own, before if ADJOINT else after, L, p0,
            ADJOINT, ADJOINT, T, N, TILE_N, P, TILE_P, SLICE, MATH,
        )  # fmt: skip
    store_rows(y + (b * L * H + h) * P, acc * scale, own, H * P, L, p0, P, T, TILE_P)


@triton.jit
def _read_others(
    acc, query, queries, queries_l, keys, keys_l, values, values_l, step, log, dt, rate, dt_l,
    states, slot, own, others, L, p0,
    EARLIER: tl.constexpr, ADJOINT: tl.constexpr, T: tl.constexpr,
    N: tl.constexpr, TILE_N: tl.constexpr, P: tl.constexpr, TILE_P: tl.constexpr, SLICE: tl.constexpr,
    MATH: tl.constexpr,
):  # fmt: skip
    """Add what one direction reads of the other blocks of the chunk and of the states."""
    row = row_logs(log, EARLIER, ADJOINT)
    for n in tl.range(1, others + 1, num_stages=2):
        first = own - n * T if EARLIER else own + n * T
        other_step, other_log = load_steps(dt, rate, first, dt_l, L, T)
        key = load_rows(keys, first, keys_l, L, 0, N, T, TILE_N)
        value = load_rows(values, first, values_l, L, p0, P, T, TILE_P)
        weight = tl.exp2(row)
        if ADJOINT:
            weight *= step
        weights = weight[:, None] * column_weights(other_step, other_log, EARLIER, ADJOINT)[None, :]
        acc = product(product(query, tl.trans(key), None, MATH) * weights, value, acc, MATH)
        row += tl.sum(other_log, 0)
    if states is not None:
        read = times_states(queries, own, queries_l, L, states + slot * (N * P), P, 1, p0, T, N, P, SLICE, TILE_P, MATH)
        weight = tl.exp2(row)
        if ADJOINT:
            weight *= step
        acc += weight[:, None] * read
    return acc
