"""Device functions: exponentials by powers of two, softplus and SiLU without a division, loads and positions.

Reciprocals are squares of `rsqrt`, one instruction of the special-function unit, where `/` costs five.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def softplus(x):
    """Return log(1 + e^x); the relative error is below 5e-7 for either sign of x."""
    return tl.maximum(x, 0.0) + _log1p_of_unit(tl.exp2(tl.abs(x) * -LOG2E))


@triton.jit
def _log1p_of_unit(w):
    # log(1 + w) / w for w in [0, 1]: minimax polynomial of degree 7, relative error 3.5e-7 in float32
    q = w * -0.008539202623069286 + 0.04408961907029152
    q = q * w - 0.10768170654773712
    q = q * w + 0.17745241522789001
    q = q * w - 0.24495463073253632
    q = q * w + 0.33275479078292847
    q = q * w - 0.4999740421772003
    q = q * w + 0.9999998211860657
    return q * w


@triton.jit
def sigmoid(x):
    """Return 1 / (1 + e^-x)."""
    r = tl.rsqrt(1.0 + tl.exp2(x * -LOG2E))
    return r * r


@triton.jit
def silu(x):
    """Return x sigmoid(x)."""
    return x * sigmoid(x)


@triton.jit
def silu_slope(x, s):
    """Return the derivative of `silu` at x, where s = sigmoid(x)."""
    return s * (1.0 + x * (1.0 - s))


@triton.jit
def rows_of_tile(tile, tiles, tokens, ROWS: tl.constexpr):
    """Return the sequence and the tokens of a tile, int64, and which of the tokens exist."""
    rows = tile % tiles * ROWS + tl.arange(0, ROWS)
    return (tile // tiles).to(tl.int64), rows.to(tl.int64), rows < tokens


@triton.jit
def load_float32(pointer, mask):
    """Return values in float32, zeros where the mask is False."""
    return tl.load(pointer, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_pair(pointer):
    """Return two neighbouring float32 from an address divisible by 8, in one load."""
    both = tl.load(pointer.to(tl.pointer_type(tl.int64)))
    return both.to(tl.int32).to(tl.float32, bitcast=True), (both >> 32).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def window_position(t, height, width, window):
    """Return the position of step t through windows, row * width + column; the arithmetic is in `cross_scan.routes`."""
    band = t // (window * width)
    rows = tl.minimum(window, height - band * window)
    t -= band * window * width
    j = t // (rows * window)
    columns = tl.minimum(window, width - j * window)
    t -= j * rows * window
    return (band * window + t // columns) * width + j * window + t % columns
