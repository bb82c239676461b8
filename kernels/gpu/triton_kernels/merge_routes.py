"""Device code of the sum over routes, scaled and gated."""

import triton
import triton.language as tl

from ssmpretrain.kernels.gpu.triton_kernels.functions import sigmoid


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
    """Sum the outputs of K routes for each token of a batch, in float32; multiply by scale and, with z, by silu(z)."""
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
