"""Device code of the gated norm: one read and one write of every tensor, forward and backward.

B batch, L tokens, D channels in G groups

A tile is ROWS tokens of one sequence, each with the channels of one group, COLUMNS of them with those past the group
masked off. Forward, a program owns a tile; backward, it walks over every programs-th tile of its group and keeps its
share of the gradient of weight in registers.
"""

import triton
import triton.language as tl

from ssmpretrain.kernels.gpu.triton_kernels.functions import load_float32, rows_of_tile, sigmoid, silu, silu_slope


@triton.jit(do_not_specialize=["tokens", "tiles"])
def gated_norm(
    x, z, weight, out,
    tokens, size, groups, eps,
    x_b, x_l, z_b, z_l,
    tiles,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    b, rows, is_token = rows_of_tile(tl.program_id(0) // groups, tiles, tokens, ROWS)
    columns = tl.arange(0, COLUMNS)
    is_channel = columns < size
    columns += tl.program_id(0) % groups * size
    mask = is_token[:, None] & is_channel[None, :]

    h = load_float32(x + b * x_b + rows[:, None] * x_l + columns[None, :], mask)
    h *= silu(load_float32(z + b * z_b + rows[:, None] * z_l + columns[None, :], mask))
    r = tl.rsqrt(tl.sum(h * h, axis=1) / size + eps)
    y = h * r[:, None] * load_float32(weight + columns, is_channel)[None, :]
    row = b * tokens + rows
    at = row[:, None] * (groups * size) + columns[None, :]
    tl.store(out + at, y.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["tokens", "tiles", "all_tiles", "programs"])
def gated_norm_backward(
    dout, x, z, weight, dx, dz, partial,
    tokens, size, groups, eps,
    dout_b, dout_l, x_b, x_l, z_b, z_l,
    tiles, all_tiles, programs,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """With g = dout weight and n = h r the normed h: dh = (g - mean(g n) n) r, dx = dh silu(z), dz = dh x silu'(z)."""
    columns = tl.arange(0, COLUMNS)
    is_channel = columns < size
    columns += tl.program_id(0) % groups * size
    w = load_float32(weight + columns, is_channel)[None, :]
    dweight = tl.zeros([ROWS, COLUMNS], tl.float32)
    for tile in range(tl.program_id(0) // groups, all_tiles, programs):
        b, rows, is_token = rows_of_tile(tile, tiles, tokens, ROWS)
        mask = is_token[:, None] & is_channel[None, :]
        value = load_float32(x + b * x_b + rows[:, None] * x_l + columns[None, :], mask)
        gate = load_float32(z + b * z_b + rows[:, None] * z_l + columns[None, :], mask)
        dy = load_float32(dout + b * dout_b + rows[:, None] * dout_l + columns[None, :], mask)
        s = sigmoid(gate)
        n = value * gate * s
        r = tl.rsqrt(tl.sum(n * n, axis=1) / size + eps)[:, None]
        n *= r
        dweight += dy * n
        g = dy * w
        dh = (g - n * (tl.sum(g * n, axis=1) / size)[:, None]) * r
        row = b * tokens + rows
        at = row[:, None] * (groups * size) + columns[None, :]
        tl.store(dx + at, (dh * gate * s).to(dx.dtype.element_ty), mask=mask)
        tl.store(dz + at, (dh * value * silu_slope(gate, s)).to(dz.dtype.element_ty), mask=mask)

    partial += (tl.program_id(0) // groups).to(tl.int64) * (groups * size) + columns
    tl.store(partial, tl.sum(dweight, axis=0), mask=is_channel)
