"""Device code of residual sum and norm: one read and one write of every tensor, forward and backward.

B batch, L tokens, D channels

A tile is ROWS tokens of one sequence, each with all its channels, COLUMNS of them with D masked off. Forward, a program
owns a tile; backward, it walks over every programs-th tile and keeps its share of the gradients of weight and bias in
registers.
"""

import triton
import triton.language as tl

from ssmpretrain.kernels.gpu.triton_kernels.functions import load_float32, rows_of_tile


@triton.jit(do_not_specialize=["tokens", "tiles"])
def add_norm(
    x, residual, weight, bias, scale, normed, total, rstd, mean,
    tokens, channels, eps,
    x_b, x_l, residual_b, residual_l,
    tiles,
    LAYER: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    b, rows, is_token = rows_of_tile(tl.program_id(0), tiles, tokens, ROWS)
    columns = tl.arange(0, COLUMNS)
    is_channel = columns < channels
    mask = is_token[:, None] & is_channel[None, :]

    h = load_float32(x + b * x_b + rows[:, None] * x_l + columns[None, :], mask)
    if scale is not None:
        h *= tl.load(scale + b)
    if residual is not None:
        h += load_float32(residual + b * residual_b + rows[:, None] * residual_l + columns[None, :], mask)
    row = b * tokens + rows
    at = row[:, None] * channels + columns[None, :]
    if total is not None:
        tl.store(total + at, h, mask=mask)

    if LAYER:
        m = tl.sum(h, axis=1) / channels
        tl.store(mean + row, m, mask=is_token)
        h = tl.where(is_channel[None, :], h - m[:, None], 0.0)
    r = tl.rsqrt(tl.sum(h * h, axis=1) / channels + eps)
    tl.store(rstd + row, r, mask=is_token)
    y = h * r[:, None] * load_float32(weight + columns, is_channel)[None, :]
    if bias is not None:
        y += load_float32(bias + columns, is_channel)[None, :]
    tl.store(normed + at, y.to(normed.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["tokens", "tiles", "all_tiles", "programs"])
def add_norm_backward(
    dnormed, dtotal, total, rstd, mean, weight, scale, dx, dresidual, partial,
    tokens, channels,
    dnormed_b, dnormed_l, dtotal_b, dtotal_l,
    tiles, all_tiles, programs,
    LAYER: tl.constexpr, BIAS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """With g = dnormed weight and n the normalised token: dtotal += (g - mean(g n) n [- mean(g)]) rstd."""
    columns = tl.arange(0, COLUMNS)
    is_channel = columns < channels
    w = load_float32(weight + columns, is_channel)[None, :]
    dweight = tl.zeros([ROWS, COLUMNS], tl.float32)
    dbias = tl.zeros([ROWS, COLUMNS], tl.float32)
    for tile in range(tl.program_id(0), all_tiles, programs):
        b, rows, is_token = rows_of_tile(tile, tiles, tokens, ROWS)
        mask = is_token[:, None] & is_channel[None, :]
        row = b * tokens + rows
        at = row[:, None] * channels + columns[None, :]
        dy = load_float32(dnormed + b * dnormed_b + rows[:, None] * dnormed_l + columns[None, :], mask)
        n = load_float32(total + at, mask)
        r = load_float32(rstd + row, is_token)[:, None]
        if LAYER:
            n -= load_float32(mean + row, is_token)[:, None]  # beyond D it meets g = 0
        n *= r
        g = dy * w
        h = g - n * (tl.sum(g * n, axis=1) / channels)[:, None]
        if LAYER:
            h -= (tl.sum(g, axis=1) / channels)[:, None]
        h *= r
        if dtotal is not None:
            h += load_float32(dtotal + b * dtotal_b + rows[:, None] * dtotal_l + columns[None, :], mask)
        if dresidual is not None:
            tl.store(dresidual + at, h.to(dresidual.dtype.element_ty), mask=mask)
        if scale is not None:
            h *= tl.load(scale + b)
        tl.store(dx + at, h.to(dx.dtype.element_ty), mask=mask)
        dweight += dy * n
        if BIAS:
            dbias += dy

    partial += tl.program_id(0).to(tl.int64) * ((2 if BIAS else 1) * channels) + columns
    tl.store(partial, tl.sum(dweight, axis=0), mask=is_channel)
    if BIAS:
        tl.store(partial + channels, tl.sum(dbias, axis=0), mask=is_channel)
