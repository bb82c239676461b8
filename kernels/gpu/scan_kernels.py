"""The scan over time on the GPU, for K routes over one set of positions at once; forward.

B batch, K routes, E channels, L tokens, N state, NP = N rounded up to even, BE channels of one program

A route visits the L positions in its own order and direction, and has its own A, B, C, D and bias. A program owns BE
neighbouring channels of one sequence and one route; each thread holds all N states of its channels in registers, and
time is sequential. B_t and C_t come as rows of float32, read by every thread alike, two at a time.

Sequences are cut into chunks of CHUNK steps. The states at the starts of chunks are what the backward pass keeps, and
what lets a long sequence run in parallel: `chunk_ends` scans each chunk from zero, `carry_states` passes the results on
from chunk to chunk, and `scan_forward` with FROM_STATES starts every chunk where it belongs.
"""

import triton
import triton.language as tl

from ssmpretrain.kernels.gpu.functions import LN2, LOG2E, load_pair, sigmoid, silu_slope, softplus, window_position

# What follows from the length: the compiler is not to look at its value, so that no length compiles anew.
_LENGTHS = ("L", "height", "width", "rows_b", "rows_k", "CHUNKS")


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
    """Code of route k: 2 order + flip. A single code stands for all routes."""
    code = k * 0 + ROUTES[0]
    for i in tl.static_range(1, len(ROUTES)):
        code = tl.where(k == i, ROUTES[i], code)
    return code


@triton.jit
def position_of(t, route, L, height, width, MAPPED: tl.constexpr):
    """Position that a route visits at step t: row * width + column.

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


@triton.jit(do_not_specialize=[*_LENGTHS, "SEGMENTS"])
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

    A2 = _rates(A + k * A_k + e * A_e, A_n, mask, N)
    if D is not None:
        D += k * D_k + e
    if bias is not None:
        bias += k * bias_k + e
    skip = _load_or_zero(D, mask, BE)
    shift = _load_or_zero(bias, mask, BE)

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
            # the next step's inputs, so that memory has this step's time to answer
            more = mask & (ahead < stop)
            next_x = tl.load(u_at, mask=more, other=0.0)
            next_step = tl.load(delta_at, mask=more, other=0.0)
            if SOFTPLUS:
                step = softplus(step)
            drive = step * x
            out = skip * x
            if partial is not None:
                out += tl.load(partial_at, mask=mask, other=0.0)
            h, out = _step(h, A2, step, drive, row, rows_c, out, N)
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


@triton.jit
def _rates(A, A_n, mask, N: tl.constexpr):
    """A of every state, for powers of two."""
    A2 = ()
    for n in tl.static_range(N):
        A2 = A2 + (tl.load(A + n * A_n, mask=mask, other=0.0) * LOG2E,)
    return A2


@triton.jit
def _step(h, A2, step, drive, row, rows_c, out, N: tl.constexpr):
    """One step of all states, and their output added to out."""
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
def _load_or_zero(pointer, mask, BE: tl.constexpr):
    if pointer is None:
        return tl.zeros([BE], tl.float32)
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


@triton.jit(do_not_specialize=[*_LENGTHS])
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
    """Scan one chunk from a zero state and leave its last state and the sum of its steps.

    With ADJOINT, u is the gradient of the output, rows point at C, and the recurrence is that of the state's gradient,
    from the chunk's last step to its first.
    """
    block, chunk, k, b = unravel(BLOCKS, CHUNKS, K)
    e = block * BE + tl.arange(0, BE)
    mask = e < E
    wide_e = e.to(tl.int64)
    route = route_of(k, ROUTES)
    A2 = _rates(A + k * A_k + e * A_e, A_n, mask, N)
    h = ()
    for n in tl.static_range(N):
        h = h + (tl.zeros([BE], tl.float32),)
    if bias is not None:
        bias += k * bias_k + e
    shift = _load_or_zero(bias, mask, BE)
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


@triton.jit(do_not_specialize=[*_LENGTHS, "SEGMENTS", "packed_size", "dpacked_block"])
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

    A chunk is scanned again from its state, leaving the states before every tile of T steps in `scratch`; then its
    tiles are taken from the last to the first. In a tile the states are taken one by one: for each, T steps forward,
    all in registers, and T steps back. What flows from tile to tile, the gradient of the state (`carry`) and of A,
    lies in memory of this program alone.

    Gradients of B and C are sums over this program's channels, one row of `drows` for each block of channels; those of
    A, D and the bias are sums over this program's steps.
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

        A2 = _rates(A, A_n, mask, N)
        skip = _load_or_zero(D, mask, BE)
        shift = _load_or_zero(bias, mask, BE)
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
            h, y = _step(h, A2, step, drive, row, rows_c, y, N)
            if z is not None:
                gate = tl.load(z + at * z_l, mask=mask, other=0.0).to(tl.float32)
                dgate = tl.load(dout + at * dout_l, mask=mask, other=0.0).to(tl.float32) * scale
                dgate = dgate * y * silu_slope(gate, sigmoid(gate))
                if ADD:
                    dgate += tl.load(dz + at * dz_l, mask=mask, other=0.0)
                tl.store(dz + at * dz_l, dgate.to(dz.dtype.element_ty), mask=mask)

        tiles = tl.cdiv(stop - start, T)
        for j in range(0, tiles):
            tl.debug_barrier()  # what one thread wrote to memory, another may read
            tile = tiles - 1 - j
            t0 = start + tile * T
            tile_shift = _load_or_zero(bias, mask, BE)
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
            # loaded again, so that they hold no registers while the states are walked through
            end_skip = _load_or_zero(D, mask, BE)
            end_shift = _load_or_zero(bias, mask, BE)
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


@triton.jit(do_not_specialize=["L", "tokens"])
def merge_routes(
    parts, z, out,
    tokens, E,
    parts_k, parts_t, parts_e,
    z_b, z_l, z_e,
    out_b, out_l, out_e,
    L, scale,
    BLOCKS, K: tl.constexpr, T: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """Sum what K routes leave for each token of a batch, in float32, times scale and, with z, times silu(z)."""
    e = (tl.program_id(0) % BLOCKS * BE + tl.arange(0, BE)[None, :]).to(tl.int64)
    t = (tl.program_id(0) // BLOCKS).to(tl.int64) * T + tl.arange(0, T)[:, None]
    mask = (t < tokens) & (e < E)
    total = tl.zeros([T, BE], tl.float32)
    for _ in tl.static_range(K):
        total += tl.load(parts + t * parts_t + e * parts_e, mask=mask, other=0.0).to(tl.float32)
        parts += parts_k
    total *= scale
    b, i = t // L, t % L
    if z is not None:
        gate = tl.load(z + b * z_b + i * z_l + e * z_e, mask=mask, other=0.0).to(tl.float32)
        total *= gate * sigmoid(gate)
    tl.store(out + b * out_b + i * out_l + e * out_e, total.to(out.dtype.element_ty), mask=mask)
