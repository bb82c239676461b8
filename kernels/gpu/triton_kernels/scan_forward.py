"""Device code of the scan over time, forward."""

import triton
import triton.language as tl

from ssmpretrain.kernels.gpu.triton_kernels.functions import sigmoid, softplus
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


@triton.jit(do_not_specialize=[*LENGTHS, "SEGMENTS"])
def scan_forward(
    u, delta, A, rows, D, bias, z, partial, y, states, last,
    E, L, height, width,
    u_b, u_k, u_e, u_l,
    delta_b, delta_k, delta_e, delta_l,
    z_b, z_k, z_e, z_l,
    y_b, y_k, y_e, y_l,
    rows_b, rows_k, rows_l, rows_c,
    A_k, A_e, A_n, D_k, bias_k,
    states_c, last_e,
    BLOCKS, CHUNKS, SEGMENTS, K,
    ROUTES: tl.constexpr, MAPPED: tl.constexpr, SOFTPLUS: tl.constexpr,
    FROM_STATES: tl.constexpr,
    CHUNK: tl.constexpr, N: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    block, segment, k, b = unravel(BLOCKS, SEGMENTS, K)
    e = block * BE + tl.arange(0, BE)
    mask = e < E
    wide_e = e.to(tl.int64)
    route = route_of(k, ROUTES)
    sign = (1 - 2 * (route % 2)).to(tl.int64)

    A2 = rates(A + k * A_k + e * A_e, A_n, mask, N)
    if D is not None:
        D += k * D_k + e
    if bias is not None:
        bias += k * bias_k + e
    skip = load_or_zero(D, mask, BE)
    shift = load_or_zero(bias, mask, BE)

    u += b * u_b + k * u_k + wide_e * u_e
    delta += b * delta_b + k * delta_k + wide_e * delta_e
    y += b * y_b + k * y_k + wide_e * y_e
    if z is not None:
        z += b * z_b + k * z_k + wide_e * z_e
    if partial is not None:
        partial += b * y_b + k * y_k + wide_e * y_e
    rows += b * rows_b + k * rows_k
    if states is not None:
        states += e

    h = ()
    for n in tl.static_range(N):
        h = h + (tl.zeros([BE], tl.float32),)
    first, end = 0, CHUNKS
    if FROM_STATES:
        first, end = segment, segment + 1
    for chunk in range(first, end):
        if FROM_STATES:
            h = load_states(states + ((b * K + k) * CHUNKS + chunk) * states_c, E, mask, N)
        elif states is not None:
            store_states(states + ((b * K + k) * CHUNKS + chunk) * states_c, h, E, mask, N)
        start = chunk * CHUNK
        stop = tl.minimum(L, start + CHUNK)
        at = position_of(start, route, L, height, width, MAPPED)
        u_at, delta_at, y_at, row = u + at * u_l, delta + at * delta_l, y + at * y_l, rows + at * rows_l
        if z is not None:
            z_at = z + at * z_l
        if partial is not None:
            partial_at = partial + at * y_l
        next_x = tl.load(u_at, mask=mask, other=0.0)
        next_step = tl.load(delta_at, mask=mask, other=0.0)
        for ahead in range(start + 1, stop + 1):
            if MAPPED:
                y_at, row = y + at * y_l, rows + at * rows_l
                if z is not None:
                    z_at = z + at * z_l
                if partial is not None:
                    partial_at = partial + at * y_l
                at = position_of(tl.minimum(ahead, L - 1), route, L, height, width, MAPPED)
                u_at, delta_at = u + at * u_l, delta + at * delta_l
            else:
                u_at += sign * u_l
                delta_at += sign * delta_l
            x = next_x.to(tl.float32)
            step = next_step.to(tl.float32) + shift
            # the next step's inputs, so that memory has this step's time to answer; if they were not volatile, ptxas
            # would move the loads to where the next step uses them
            more = mask & (ahead < stop)
            next_x = tl.load(u_at, mask=more, other=0.0, volatile=True)
            next_step = tl.load(delta_at, mask=more, other=0.0, volatile=True)
            if SOFTPLUS:
                step = softplus(step)
            drive = step * x
            out = skip * x
            if partial is not None:
                out += tl.load(partial_at, mask=mask, other=0.0)
            h, out = step_states(h, A2, step, drive, row, rows_c, out, N)
            if z is not None:
                gate = tl.load(z_at, mask=mask, other=0.0).to(tl.float32)
                out = out * (gate * sigmoid(gate))
            tl.store(y_at, out.to(y.dtype.element_ty), mask=mask)
            if not MAPPED:
                y_at += sign * y_l
                row += sign * rows_l
                if z is not None:
                    z_at += sign * z_l
                if partial is not None:
                    partial_at += sign * y_l
    if last is not None:
        last += ((b * K + k) * E + e) * last_e
        for n in tl.static_range(N):
            tl.store(last + n, h[n], mask=mask)
