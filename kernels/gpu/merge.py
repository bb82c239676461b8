"""Launch the sum over the routes of a scan on the GPU."""

# B batch, K routes, E channels, L positions

from torch import Tensor

from ssmpretrain.kernels.gpu.launch import launch
from ssmpretrain.kernels.gpu.triton_kernels.merge_routes import merge_routes


def merge(parts: Tensor, out: Tensor, scale: float = 1.0, z: Tensor | None = None) -> None:
    """Write scale silu(z) sum_k parts[k] into out, accumulated in float32; without z, scale sum_k parts[k].

    Args:
        parts: (K, B, L, E), contiguous.
        out: (B, L, E), any dtype and strides.
        scale: Factor.
        z: (B, L, E), any dtype and strides, or None.
    """
    routes, batch, tokens, channels = parts.shape
    rows, width = 16, min(128, max(16, 1 << (channels - 1).bit_length()))
    blocks = -(-channels // width)
    z_strides = (0, 0, 0) if z is None else z.stride()
    launch(
        merge_routes, (blocks * -(-batch * tokens // rows),), 4,
        parts=parts, z=z, out=out, tokens=batch * tokens, E=channels,
        parts_k=parts.stride(0), parts_t=channels, parts_e=1, z_b=z_strides[0], z_l=z_strides[1], z_e=z_strides[2],
        out_b=out.stride(0), out_l=out.stride(1), out_e=out.stride(2), L=tokens, scale=scale,
        BLOCKS=blocks, K=routes, T=rows, BE=width,
    )  # fmt: skip
