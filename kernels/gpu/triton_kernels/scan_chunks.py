"""Device code for chunks in parallel: scan each chunk from zero, then carry the states from chunk to chunk."""

import triton
import triton.language as tl

from ssmpretrain.kernels.gpu.triton_kernels.functions import LOG2E, load_pair, sigmoid, softplus
from ssmpretrain.kernels.gpu.triton_kernels.scan_steps import (
    LENGTHS,
    load_or_zero,
    position_of,
    rates,
    route_of,
    store_states,
    unravel,
)


@triton.jit(do_not_specialize=[*LENGTHS])
def chunk_ends(
    u, delta, A, rows, bias, z, ends, sums,
    E, L, height, width,
    u_b, u_k, u_e, u_l,
    delta_b, delta_k, delta_e, delta_l,
    z_b, z_k, z_e, z_l,
    rows_b, rows_k, rows_l,
    A_k, A_e, A_n, bias_k,
    states_c, scale,
    BLOCKS, CHUNKS, K,
    ROUTES: tl.constexpr, MAPPED: tl.constexpr, SOFTPLUS: tl.constexpr, ADJOINT: tl.constexpr,
    CHUNK: tl.constexpr, N: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """Scan one chunk from a zero state; write its last state and the sum of its steps.

    With ADJOINT, u is the gradient of the output, rows point at C, and the recurrence is that of the state's gradient,
    from the chunk's last step to its first.
    """
    block, chunk, k, b = unravel(BLOCKS, CHUNKS, K)
    e = block * BE + tl.arange(0, BE)
    mask = e < E
    wide_e = e.to(tl.int64)
    route = route_of(k, ROUTES)
    A2 = rates(A + k * A_k + e * A_e, A_n, mask, N)
    h = ()
    for n in tl.static_range(N):
        h = h + (tl.zeros([BE], tl.float32),)
    if bias is not None:
        bias += k * bias_k + e
    shift = load_or_zero(bias, mask, BE)
    u += b * u_b + k * u_k + wide_e * u_e
    delta += b * delta_b + k * delta_k + wide_e * delta_e
    if z is not None:
        z += b * z_b + k * z_k + wide_e * z_e
    rows += b * rows_b + k * rows_k

    total = tl.zeros([BE], tl.float32)
    start = chunk * CHUNK
    end = tl.minimum(L, start + CHUNK)
    for i in range(0, end - start):
        t = end - 1 - i if ADJOINT else start + i
        at = position_of(t, route, L, height, width, MAPPED)
        x = tl.load(u + at * u_l, mask=mask, other=0.0).to(tl.float32)
        step = tl.load(delta + at * delta_l, mask=mask, other=0.0).to(tl.float32) + shift
        if SOFTPLUS:
            step = softplus(step)
        total += step
        if ADJOINT:
            drive = x * scale
            if z is not None:
                gate = tl.load(z + at * z_l, mask=mask, other=0.0).to(tl.float32)
                drive = drive * (gate * sigmoid(gate))
        else:
            drive = step * x
        row = rows + at * rows_l
        new = ()
        for n in tl.static_range(0, N, 2):
            b0, b1 = load_pair(row + n)
            new = new + (_advance(h[n], drive * b0, tl.exp2(step * A2[n]), ADJOINT),)
            if n + 1 < N:
                new = new + (_advance(h[n + 1], drive * b1, tl.exp2(step * A2[n + 1]), ADJOINT),)
        h = new
    ends += ((b * K + k) * CHUNKS + chunk) * states_c + e
    store_states(ends, h, E, mask, N)
    tl.store(sums + ((b * K + k) * CHUNKS + chunk) * E + e, total, mask=mask)


@triton.jit
def _advance(h, source, decay, ADJOINT: tl.constexpr):
    return decay * (h + source) if ADJOINT else decay * h + source


@triton.jit(do_not_specialize=["CHUNKS"])
def carry_states(
    A, ends, sums, initial, last,
    E, A_k, A_e, A_n, states_c, initial_e, last_e,
    BLOCKS, CHUNKS, K,
    ADJOINT: tl.constexpr, N: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """Turn the ends of chunks, scanned from zero, into the states that chunks start from, in place.

    The decay over a chunk is 2^(A2 sum of its steps). With ADJOINT from the last chunk to the first.
    """
    block, n, k, b = unravel(BLOCKS, N, K)
    e = block * BE + tl.arange(0, BE)
    mask = e < E
    A2 = tl.load(A + k * A_k + e * A_e + n * A_n, mask=mask, other=0.0) * LOG2E
    sequence = b * K + k
    h = tl.zeros([BE], tl.float32)
    if initial is not None:
        h = tl.load(initial + (sequence * E + e) * initial_e + n, mask=mask, other=0.0)
    for i in range(CHUNKS):
        chunk = sequence * CHUNKS + (CHUNKS - 1 - i if ADJOINT else i)
        end = ends + chunk * states_c + n * E + e
        reached = tl.load(end, mask=mask, other=0.0)
        tl.store(end, h, mask=mask)
        h = tl.exp2(A2 * tl.load(sums + chunk * E + e, mask=mask, other=0.0)) * h + reached
    if last is not None:
        tl.store(last + (sequence * E + e) * last_e + n, h, mask=mask)
