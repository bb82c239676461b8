"""Device code that all scan kernels share: a program's channels and route, positions, states in registers."""

import triton
import triton.language as tl

from ssmpretrain.kernels.gpu.triton_kernels.functions import LOG2E, load_pair, window_position

LENGTHS = ("L", "height", "width", "rows_b", "rows_k", "CHUNKS")  # no value of these compiles a kernel anew


@triton.jit
def unravel(BLOCKS, CHUNKS, K):
    """Return (block, chunk, route, batch) of this program: blocks of channels vary fastest, int64 where they scale."""
    i = tl.program_id(0)
    block = i % BLOCKS
    i = i // BLOCKS
    chunk = i % CHUNKS
    i = i // CHUNKS
    return block, chunk, (i % K).to(tl.int64), (i // K).to(tl.int64)


@triton.jit
def route_of(k, ROUTES: tl.constexpr):
    """Return the code of route k, 2 order + flip. A single code stands for all routes."""
    code = k * 0 + ROUTES[0]
    for i in tl.static_range(1, len(ROUTES)):
        code = tl.where(k == i, ROUTES[i], code)
    return code


@triton.jit
def position_of(t, route, L, height, width, MAPPED: tl.constexpr):
    """Return the position that a route visits at step t, row * width + column.

    Order 0 goes along rows, 1 along columns, w >= 2 through windows of w x w (smaller at the border), row by row
    inside a window and from window to window.
    """
    t = tl.where(route % 2 == 1, L - 1 - t, t)
    if MAPPED:
        order = route // 2
        by_column = t % height * width + t // height
        windowed = window_position(t, height, width, tl.maximum(order, 2))
        t = tl.where(order == 0, t, tl.where(order == 1, by_column, windowed))
    return t.to(tl.int64)


@triton.jit
def rates(A, A_n, mask, N: tl.constexpr):
    """Return A of every state times log2(e), for powers of two."""
    A2 = ()
    for n in tl.static_range(N):
        A2 = A2 + (tl.load(A + n * A_n, mask=mask, other=0.0) * LOG2E,)
    return A2


@triton.jit
def step_states(h, A2, step, drive, row, rows_c, out, N: tl.constexpr):
    """Return all states after one step, and out plus their output."""
    new = ()
    for n in tl.static_range(0, N, 2):
        b0, b1 = load_pair(row + n)
        c0, c1 = load_pair(row + rows_c + n)
        h0 = tl.exp2(step * A2[n]) * h[n] + drive * b0
        out += h0 * c0
        new = new + (h0,)
        if n + 1 < N:
            h1 = tl.exp2(step * A2[n + 1]) * h[n + 1] + drive * b1
            out += h1 * c1
            new = new + (h1,)
    return new, out


@triton.jit
def load_or_zero(pointer, mask, BE: tl.constexpr):
    if pointer is None:
        return tl.zeros([BE], tl.float32)
    else:  # a compiler still reads what follows a return, and cannot load from None
        return tl.load(pointer, mask=mask, other=0.0)


@triton.jit
def load_states(pointer, E, mask, N: tl.constexpr):
    h = ()
    for n in tl.static_range(N):
        h = h + (tl.load(pointer + n * E, mask=mask, other=0.0),)
    return h


@triton.jit
def store_states(pointer, h, E, mask, N: tl.constexpr):
    for n in tl.static_range(N):
        tl.store(pointer + n * E, h[n], mask=mask)
