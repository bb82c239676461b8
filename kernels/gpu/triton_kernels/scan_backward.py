"""Device code of the scan over time, backward: every gradient, chunk by chunk from the last to the first."""

import triton
import triton.language as tl

from ssmpretrain.kernels.gpu.triton_kernels.functions import LN2, LOG2E, load_pair, sigmoid, silu_slope, softplus
from ssmpretrain.kernels.gpu.triton_kernels.scan_steps import (
    LENGTHS,
    load_or_zero,
    load_states,
    position_of,
    rates,
    route_of,
    step_states,
    store_states,
    unravel,
)


@triton.jit(do_not_specialize=[*LENGTHS, "SEGMENTS", "packed_size", "dpacked_block"])
def scan_backward(
    dout, u, delta, A, rows, packed, D, bias, z, states, carry, scratch,
    du, ddelta, dz, dpacked, dA, dD, dbias,
    E, L, height, width,
    dout_b, dout_k, dout_e, dout_l,
    u_b, u_k, u_e, u_l,
    delta_b, delta_k, delta_e, delta_l,
    z_b, z_k, z_e, z_l,
    du_b, du_k, du_e, du_l,
    dz_b, dz_k, dz_e, dz_l,
    rows_b, rows_k, rows_l, rows_c,
    packed_size, dpacked_block,
    A_k, A_e, A_n, D_k, bias_k,
    states_c, scale,
    BLOCKS, CHUNKS, SEGMENTS, K,
    ROUTES: tl.constexpr, MAPPED: tl.constexpr, SOFTPLUS: tl.constexpr, ADD: tl.constexpr,
    FROM_STATES: tl.constexpr,
    CHUNK: tl.constexpr, N: tl.constexpr, T: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """Walk the chunks of a sequence back: every gradient of `scan_forward`.

    A chunk is scanned again from its state, and the states before every tile of T steps are written to `scratch`. Then
    the tiles run from the last to the first. In a tile the states run one by one: for each, T steps forward, all in
    registers, and T steps back. The gradients of the state (`carry`) and of A pass from tile to tile through memory of
    this program alone.

    Gradients of B and C are sums over this program's channels, one part of `dpacked` for each block of channels.
    Gradients of A, D and the bias are sums over this program's steps.
    """
    block, segment, k, b = unravel(BLOCKS, SEGMENTS, K)
    lane = tl.arange(0, BE)
    e = block * BE + lane
    mask = e < E
    wide_e = e.to(tl.int64)
    route = route_of(k, ROUTES)

    if D is not None:
        D += k * D_k + e
    if bias is not None:
        bias += k * bias_k + e
    A += k * A_k + e * A_e
    dout += b * dout_b + k * dout_k + wide_e * dout_e
    u += b * u_b + k * u_k + wide_e * u_e
    delta += b * delta_b + k * delta_k + wide_e * delta_e
    du += b * du_b + k * du_k + wide_e * du_e
    ddelta += b * du_b + k * du_k + wide_e * du_e
    if z is not None:
        z += b * z_b + k * z_k + wide_e * z_e
        dz += b * dz_b + k * dz_k + wide_e * dz_e
    rows += b * rows_b + k * rows_k
    packed += (b * K + k) * packed_size
    dpacked += block.to(tl.int64) * dpacked_block + (b * K + k) * packed_size
    states += e
    sequence = (b * K + k) * SEGMENTS + segment
    carry += sequence * N * E + e
    dA += sequence * N * E + e
    if D is not None:
        dD += sequence * E + e
    if bias is not None:
        dbias += sequence * E + e
    scratch += (sequence * BLOCKS + block) * (CHUNK // T * N * BE) + lane

    first, end = 0, CHUNKS
    if FROM_STATES:
        first, end = segment, segment + 1
    for i in range(0, end - first):
        chunk = end - 1 - i
        start = chunk * CHUNK
        stop = tl.minimum(L, start + CHUNK)

        tl.debug_barrier()  # every thread has read the scratch of the chunk before; it is written anew
        A2 = rates(A, A_n, mask, N)
        skip = load_or_zero(D, mask, BE)
        shift = load_or_zero(bias, mask, BE)
        h = load_states(states + ((b * K + k) * CHUNKS + chunk) * states_c, E, mask, N)
        for t in range(start, stop):
            if (t - start) % T == 0:
                store_states(scratch + (t - start) // T * (N * BE), h, BE, mask, N)
            at = position_of(t, route, L, height, width, MAPPED)
            x = tl.load(u + at * u_l, mask=mask, other=0.0).to(tl.float32)
            step = tl.load(delta + at * delta_l, mask=mask, other=0.0).to(tl.float32) + shift
            if SOFTPLUS:
                step = softplus(step)
            drive = step * x
            row = rows + at * rows_l
            y = skip * x
            h, y = step_states(h, A2, step, drive, row, rows_c, y, N)
            if z is not None:
                gate = tl.load(z + at * z_l, mask=mask, other=0.0).to(tl.float32)
                dgate = tl.load(dout + at * dout_l, mask=mask, other=0.0).to(tl.float32) * scale
                dgate = dgate * y * silu_slope(gate, sigmoid(gate))
                if ADD:
                    dgate += tl.load(dz + at * dz_l, mask=mask, other=0.0)
                tl.store(dz + at * dz_l, dgate.to(dz.dtype.element_ty), mask=mask)

        tiles = tl.cdiv(stop - start, T)
        for j in range(0, tiles):
            tl.debug_barrier()  # one thread may read what another wrote to memory
            tile = tiles - 1 - j
            t0 = start + tile * T
            tile_shift = load_or_zero(bias, mask, BE)
            steps = ()
            drives = ()
            dys = ()
            ddrives = ()
            dlogs = ()
            for s in tl.static_range(T):
                inside = mask & (t0 + s < L)
                at = position_of(tl.minimum(t0 + s, L - 1), route, L, height, width, MAPPED)
                x = tl.load(u + at * u_l, mask=inside, other=0.0).to(tl.float32)
                step = tl.load(delta + at * delta_l, mask=inside, other=0.0).to(tl.float32) + tile_shift
                if SOFTPLUS:
                    step = softplus(step)
                step = tl.where(inside, step, 0.0)
                dy = tl.load(dout + at * dout_l, mask=inside, other=0.0).to(tl.float32) * scale
                if z is not None:
                    gate = tl.load(z + at * z_l, mask=inside, other=0.0).to(tl.float32)
                    dy = dy * (gate * sigmoid(gate))
                steps = steps + (step,)
                drives = drives + (step * x,)
                dys = dys + (dy,)
                ddrives = ddrives + (tl.zeros([BE], tl.float32),)
                dlogs = dlogs + (tl.zeros([BE], tl.float32),)
            for state in range(N):
                A2n = tl.load(A + state * A_n, mask=mask, other=0.0) * LOG2E
                h_n = tl.load(scratch + tile * (N * BE) + state * BE, mask=mask, other=0.0)
                g = tl.load(carry + state * E, mask=mask, other=0.0)
                dA_n = tl.load(dA + state * E, mask=mask, other=0.0)
                row = packed + ((t0 // T) * N + state) * (2 * T)
                drow = dpacked + ((t0 // T) * N + state) * (2 * T)
                bs = ()
                decays = ()
                before = ()
                for s in tl.static_range(0, T, 2):
                    b0, b1 = load_pair(row + s)
                    bs = bs + (b0, b1)
                for s in tl.static_range(T):
                    decay = tl.exp2(steps[s] * A2n)
                    decays = decays + (decay,)
                    before = before + (h_n,)
                    h_n = decay * h_n + drives[s] * bs[s]
                ddrives_new = ()
                dlogs_new = ()
                for s in tl.static_range(T - 1, -1, -1):
                    if s % 2 == 1:
                        c0, c1 = load_pair(row + T + s - 1)
                    c_n = c1 if s % 2 == 1 else c0
                    after = h_n if s == T - 1 else before[s + 1]
                    g += dys[s] * c_n
                    tl.store(drow + s, tl.sum(g * drives[s]))
                    tl.store(drow + T + s, tl.sum(dys[s] * after))
                    ddrives_new = (ddrives[s] + g * bs[s],) + ddrives_new
                    g = g * decays[s]
                    q = g * before[s]
                    dlogs_new = (dlogs[s] + q * A2n,) + dlogs_new
                    dA_n += q * steps[s]
                ddrives = ddrives_new
                dlogs = dlogs_new
                tl.store(carry + state * E, g, mask=mask)
                tl.store(dA + state * E, dA_n, mask=mask)
            # loaded again, so that they hold no registers during the loop over states
            end_skip = load_or_zero(D, mask, BE)
            end_shift = load_or_zero(bias, mask, BE)
            dskip = tl.zeros([BE], tl.float32)
            dshift = tl.zeros([BE], tl.float32)
            for s in tl.static_range(T):
                inside = mask & (t0 + s < L)
                at = position_of(tl.minimum(t0 + s, L - 1), route, L, height, width, MAPPED)
                x = tl.load(u + at * u_l, mask=inside, other=0.0).to(tl.float32)
                dx = steps[s] * ddrives[s] + end_skip * dys[s]
                dstep = x * ddrives[s] + LN2 * dlogs[s]
                if SOFTPLUS:
                    raw = tl.load(delta + at * delta_l, mask=inside, other=0.0).to(tl.float32) + end_shift
                    dstep = dstep * sigmoid(raw)
                dskip += dys[s] * x
                dshift += tl.where(inside, dstep, 0.0)
                if ADD:
                    dx += tl.load(du + at * du_l, mask=inside, other=0.0)
                    dstep += tl.load(ddelta + at * du_l, mask=inside, other=0.0)
                tl.store(du + at * du_l, dx.to(du.dtype.element_ty), mask=inside)
                tl.store(ddelta + at * du_l, dstep.to(ddelta.dtype.element_ty), mask=inside)
            if D is not None:
                tl.store(dD, tl.load(dD, mask=mask) + dskip, mask=mask)
            if bias is not None:
                tl.store(dbias, tl.load(dbias, mask=mask) + dshift, mask=mask)
