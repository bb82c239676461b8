"""Device code of the causal convolution: a window in registers moves over time, so that each token is read once.

B batch, E channels, L tokens, W taps, K directions

A program owns BE neighbouring channels and a span of tokens, and walks over it with the last W tokens in registers. At
step t the window x[t - W + 1 .. t] holds what the causal output at t needs, and also what the anti-causal output at
t - W + 1 needs: both directions come from one read of x. Neighbouring spans read W - 1 tokens twice. A centred
convolution is the causal one, AHEAD tokens later.

A body of the loop reads UNROLL tokens before it writes any: a compiler cannot move a read before a write that might
alias it.
"""

import triton
import triton.language as tl

from ssmpretrain.kernels.gpu.triton_kernels.functions import sigmoid, silu, silu_slope


@triton.jit
def _unravel(blocks, spans, span, channels, BE: tl.constexpr):
    """Return the channels (int64), which of them exist, the sequence (int64), and the first token of this program."""
    i = tl.program_id(0)
    e = i % blocks * BE + tl.arange(0, BE)
    i = i // blocks
    return e.to(tl.int64), e < channels, (i // spans).to(tl.int64), i % spans * span


@triton.jit
def _load(pointer, mask):
    return tl.load(pointer, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _is_within(t, first, end):
    """Return whether first <= t < end, in one comparison: a negative number is huge if read as unsigned."""
    return tl.cast(t - first, tl.uint32) < tl.cast(end - first, tl.uint32)


@triton.jit
def _load_tokens(pointer, stride, first, tokens, mask, COUNT: tl.constexpr):
    """Return COUNT tokens from the first on, zeros outside the sequence."""
    window = ()
    at = pointer + tl.cast(first, tl.int64) * stride
    for i in tl.static_range(COUNT):
        window = window + (_load(at, mask & _is_within(first + i, 0, tokens)),)
        at += stride
    return window


@triton.jit
def _load_taps(pointer, stride, mask, TAPS: tl.constexpr):
    taps = ()
    for w in tl.static_range(TAPS):
        taps = taps + (_load(pointer + w * stride, mask),)
    return taps


@triton.jit
def _dot(start, taps, window, TAPS: tl.constexpr, MIRRORED: tl.constexpr):
    """Return start + sum over w of taps[w] window[w], or window[TAPS - 1 - w] if MIRRORED."""
    for w in tl.static_range(TAPS):
        start += taps[w] * window[TAPS - 1 - w if MIRRORED else w]
    return start


@triton.jit
def _add_outer(sums, factor, window, TAPS: tl.constexpr, MIRRORED: tl.constexpr):
    """Return sums[w] + factor window[w] for each w, or window[TAPS - 1 - w] if MIRRORED."""
    new = ()
    for w in tl.static_range(TAPS):
        new = new + (sums[w] + factor * window[TAPS - 1 - w if MIRRORED else w],)
    return new


@triton.jit
def _zeros(COUNT: tl.constexpr, BE: tl.constexpr):
    zeros = ()
    for _ in tl.static_range(COUNT):
        zeros = zeros + (tl.zeros([BE], tl.float32),)
    return zeros


@triton.jit(do_not_specialize=["tokens", "blocks", "spans", "span"])
def convolve(
    x, weight, bias, out,
    channels, tokens,
    x_b, x_e, x_l,
    weight_k, weight_e, weight_w, bias_k, bias_e,
    out_k, out_b, out_e, out_l,
    blocks, spans, span,
    CAUSAL: tl.constexpr, ANTICAUSAL: tl.constexpr, AHEAD: tl.constexpr,
    TAPS: tl.constexpr, SILU: tl.constexpr, UNROLL: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    e, mask, b, first = _unravel(blocks, spans, span, channels, BE)
    HALO: tl.constexpr = TAPS - 1
    x += b * x_b + e * x_e
    out += b * out_b + e * out_e
    weight += e * weight_e
    second = weight
    bias_0 = tl.zeros([BE], tl.float32)
    bias_1 = bias_0
    out_1 = out
    if CAUSAL and ANTICAUSAL:
        second += weight_k
        out_1 += out_k
    if bias is not None:
        bias_0 = _load(bias + e * bias_e, mask)
        bias_1 = bias_0
        if CAUSAL and ANTICAUSAL:
            bias_1 = _load(bias + bias_k + e * bias_e, mask)
    taps_0 = _load_taps(weight, weight_w, mask, TAPS)
    taps_1 = _load_taps(second, weight_w, mask, TAPS)

    end = tl.minimum(first + span, tokens)
    begin, stop = first, end
    if not CAUSAL:
        begin += HALO
    if ANTICAUSAL:
        stop += HALO
    window = _load_tokens(x, x_l, begin - HALO + AHEAD, tokens, mask, HALO)
    for start in range(begin, stop, UNROLL):
        window = window + _load_tokens(x, x_l, start + AHEAD, tokens, mask, UNROLL)
        at_0 = out + tl.cast(start, tl.int64) * out_l
        at_1 = out_1 + tl.cast(start - HALO, tl.int64) * out_l
        for i in tl.static_range(UNROLL):
            if CAUSAL:
                y = _dot(bias_0, taps_0, window[i : i + TAPS], TAPS, False)
                if SILU:
                    y = silu(y)
                tl.store(at_0, y.to(out.dtype.element_ty), mask=mask & (start + i < end))
                at_0 += out_l
            if ANTICAUSAL:
                y = _dot(bias_1, taps_1, window[i : i + TAPS], TAPS, True)
                if SILU:
                    y = silu(y)
                s = start + i - HALO
                tl.store(at_1, y.to(out.dtype.element_ty), mask=mask & (s >= first) & (s < end))
                at_1 += out_l
        window = window[UNROLL:]


@triton.jit(do_not_specialize=["tokens", "blocks", "spans", "span"])
def convolve_backward(
    dout, x, weight, bias, dx, partial,
    channels, tokens,
    dout_k, dout_b, dout_e, dout_l,
    x_b, x_e, x_l,
    weight_k, weight_e, weight_w, bias_k, bias_e,
    dx_b, dx_e, dx_l,
    blocks, spans, span,
    CAUSAL: tl.constexpr, ANTICAUSAL: tl.constexpr, AHEAD: tl.constexpr,
    TAPS: tl.constexpr, SILU: tl.constexpr, UNROLL: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """Write the gradient of x, and this span's part of the gradients of weight and bias.

    g is the gradient before the SiLU. At step t the window of x gives g_0 at t - AHEAD and g_1 at t - HALO. The last W
    values of each complete the gradient of x at t - HALO.
    """
    e, mask, b, first = _unravel(blocks, spans, span, channels, BE)
    HALO: tl.constexpr = TAPS - 1
    x += b * x_b + e * x_e
    dx += b * dx_b + e * dx_e
    dout += b * dout_b + e * dout_e
    dout_1 = dout
    weight += e * weight_e
    second = weight
    bias_0 = tl.zeros([BE], tl.float32)
    bias_1 = bias_0
    if CAUSAL and ANTICAUSAL:
        second += weight_k
        dout_1 += dout_k
    if bias is not None:
        bias_0 = _load(bias + e * bias_e, mask)
        bias_1 = bias_0
        if CAUSAL and ANTICAUSAL:
            bias_1 = _load(bias + bias_k + e * bias_e, mask)
    taps_0 = _load_taps(weight, weight_w, mask, TAPS)
    taps_1 = _load_taps(second, weight_w, mask, TAPS)

    end = tl.minimum(first + span, tokens)
    g_0 = _zeros(HALO, BE)
    g_1 = _zeros(HALO, BE)
    dweight_0 = _zeros(TAPS, BE)
    dweight_1 = _zeros(TAPS, BE)
    dbias_0 = tl.zeros([BE], tl.float32)
    dbias_1 = tl.zeros([BE], tl.float32)
    window = _load_tokens(x, x_l, first - HALO, tokens, mask, HALO)
    for start in range(first, end + HALO, UNROLL):
        window = window + _load_tokens(x, x_l, start, tokens, mask, UNROLL)
        if CAUSAL:
            douts_0 = _load_tokens(dout, dout_l, start - AHEAD, tokens, mask, UNROLL)
        if ANTICAUSAL:
            douts_1 = _load_tokens(dout_1, dout_l, start - HALO, tokens, mask, UNROLL)
        at = dx + tl.cast(start - HALO, tl.int64) * dx_l
        for i in tl.static_range(UNROLL):
            t = start + i
            inside = mask & _is_within(t - HALO, first, end)
            now = window[i : i + TAPS]
            total = tl.zeros([BE], tl.float32)
            if CAUSAL:
                g = douts_0[i]
                if SILU:
                    pre = _dot(bias_0, taps_0, now, TAPS, False)
                    g *= silu_slope(pre, sigmoid(pre))
                g_0 = g_0 + (g,)
                total = _dot(total, taps_0, g_0, TAPS, True)
                g_0 = g_0[1:]
                is_own = t < end
                if AHEAD > 0:
                    is_own = _is_within(t - AHEAD, first, end)
                own = tl.where(is_own, g, 0.0)
                dweight_0 = _add_outer(dweight_0, own, now, TAPS, False)
                dbias_0 += own
            if ANTICAUSAL:
                g = douts_1[i]
                if SILU:
                    pre = _dot(bias_1, taps_1, now, TAPS, True)
                    g *= silu_slope(pre, sigmoid(pre))
                g_1 = g_1 + (g,)
                total = _dot(total, taps_1, g_1, TAPS, False)
                g_1 = g_1[1:]
                own = tl.where(inside, g, 0.0)
                dweight_1 = _add_outer(dweight_1, own, now, TAPS, True)
                dbias_1 += own
            tl.store(at, total.to(dx.dtype.element_ty), mask=inside)
            at += dx_l
        window = window[UNROLL:]

    DIRECTIONS: tl.constexpr = 2 if CAUSAL and ANTICAUSAL else 1
    row = (tl.program_id(0) // blocks).to(tl.int64) * (DIRECTIONS * (TAPS + 1))
    partial += row * channels + e
    if CAUSAL:
        partial = _store_sums(partial, dweight_0, dbias_0, channels, mask, TAPS)
    if ANTICAUSAL:
        _store_sums(partial, dweight_1, dbias_1, channels, mask, TAPS)


@triton.jit
def _store_sums(partial, dweight, dbias, channels, mask, TAPS: tl.constexpr):
    for w in tl.static_range(TAPS):
        tl.store(partial + w * channels, dweight[w], mask=mask)
    tl.store(partial + TAPS * channels, dbias, mask=mask)
    return partial + (TAPS + 1) * channels
