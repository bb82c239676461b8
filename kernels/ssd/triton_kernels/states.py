"""Device code of the states between chunks: what each chunk leaves, and the carry from chunk to chunk."""

import triton
import triton.language as tl

from ssmpretrain.kernels.ssd.triton_kernels.blocks import (
    LENGTHS,
    load_rows,
    load_steps,
    product,
    sums_from,
    sums_to,
)


@triton.jit(do_not_specialize=[*LENGTHS])
def chunk_states(
    x, rows, dt, A, dt_back, A_back, states, totals,
    L, H, R, K, BLOCKS, batch,
    x_b, x_l, x_h, rows_b, rows_l, rows_g,
    dt_b, dt_l, dt_h, back_b, back_l, back_h,
    ADJOINT: tl.constexpr, PER_CHUNK: tl.constexpr, T: tl.constexpr,
    N: tl.constexpr, TILE_N: tl.constexpr, P: tl.constexpr, TILE_P: tl.constexpr,
    MATH: tl.constexpr,
):  # fmt: skip
    """Write the states that a chunk leaves if none enters it, one tile of N x P, and log2 of the decay across it.

    With ADJOINT, rows are C, x is the gradient of the output, and the result is the gradient of the states that enter
    the chunk, from the outputs of this chunk.
    """
    p_tiles: tl.constexpr = (P + TILE_P - 1) // TILE_P
    n_tiles: tl.constexpr = (N + TILE_N - 1) // TILE_N
    i = tl.program_id(0)
    p0, i = i % p_tiles * TILE_P, i // p_tiles
    n0, i = i % n_tiles * TILE_N, i // n_tiles
    h, i = i % H, i // H
    chunk, b = i % K, (i // K).to(tl.int64)
    wide_h = h.to(tl.int64)
    x += b * x_b + wide_h * x_h
    rows += b * rows_b + (h // R).to(tl.int64) * rows_g
    if dt is not None:
        dt += b * dt_b + wide_h * dt_h
        rate = tl.load(A + h)
        ahead = tl.zeros([TILE_N, TILE_P], tl.float32)
        passed = 0.0
    if dt_back is not None:
        dt_back += b * back_b + wide_h * back_h
        rate_back = tl.load(A_back + h)
        behind = tl.zeros([TILE_N, TILE_P], tl.float32)
        passed_back = 0.0

    for block in range(chunk * PER_CHUNK, tl.minimum((chunk + 1) * PER_CHUNK, BLOCKS)):
        values = load_rows(x, block * T, x_l, L, p0, P, T, TILE_P)
        keys = tl.trans(load_rows(rows, block * T, rows_l, L, n0, N, T, TILE_N)).to(tl.float32)
        if dt is not None:
            step, log = load_steps(dt, rate, block * T, dt_l, L, T)
            total = tl.sum(log, 0)
            if ADJOINT:
                weight = tl.exp2(passed + sums_to(log))
            else:
                weight = tl.exp2(sums_from(log) - log) * step
                ahead *= tl.exp2(total)
            ahead = product(keys * weight[None, :], values, ahead, MATH)
            passed += total
        if dt_back is not None:
            step, log = load_steps(dt_back, rate_back, block * T, back_l, L, T)
            total = tl.sum(log, 0)
            if ADJOINT:
                weight = tl.exp2(sums_from(log))
                behind *= tl.exp2(total)
            else:
                weight = tl.exp2(passed_back + sums_to(log) - log) * step
            behind = product(keys * weight[None, :], values, behind, MATH)
            passed_back += total

    n = n0 + tl.arange(0, TILE_N)[:, None]
    p = p0 + tl.arange(0, TILE_P)[None, :]
    mask = (n < N) & (p < P)
    slot = (b * K + chunk) * H + h
    if dt is not None:
        tl.store(states + slot * (N * P) + n * P + p, ahead, mask=mask)
        tl.store(totals + slot, passed)
        slot += batch * K * H
    if dt_back is not None:
        tl.store(states + slot * (N * P) + n * P + p, behind, mask=mask)
        tl.store(totals + slot, passed_back)


@triton.jit(do_not_specialize=["K", "batch"])
def carry(
    states, totals, kept, products,
    K, H, batch,
    BACK_FIRST: tl.constexpr, ADJOINT: tl.constexpr, SIZE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Replace the states that chunks leave by those that enter them, in place, for one tile of a head's states.

    The forward direction goes from the first chunk to the last, the backward direction from the last to the first.
    With ADJOINT each goes the other way: gradients of entering states become gradients of leaving states. Then kept
    are the states that entered, and products the gradients of log(decay across the chunk), a part for each tile.
    """
    tiles: tl.constexpr = (SIZE + TILE - 1) // TILE
    i = tl.program_id(0)
    tile, i = i % tiles, i // tiles
    h, i = i % H, i // H
    b, d = (i % batch).to(tl.int64), (i // batch).to(tl.int64)
    at = tile * TILE + tl.arange(0, TILE)
    mask = at < SIZE
    from_last = (d == 1) | BACK_FIRST
    if ADJOINT:
        from_last = from_last == 0
    state = tl.zeros([TILE], tl.float32)
    for step in range(K):
        chunk = tl.where(from_last, K - 1 - step, step)
        slot = ((d * batch + b) * K + chunk) * H + h
        own = tl.load(states + slot * SIZE + at, mask=mask, other=0.0)
        decay = tl.exp2(tl.load(totals + slot))
        if ADJOINT:
            entered = tl.load(kept + slot * SIZE + at, mask=mask, other=0.0)
            tl.store(products + slot * tiles + tile, decay * tl.sum(state * entered, 0))
        tl.store(states + slot * SIZE + at, state, mask=mask)
        state = decay * state + own
