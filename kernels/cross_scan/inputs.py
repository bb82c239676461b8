"""The inputs of `cross_selective_scan`, named and described once for all its implementations."""

from typing import NamedTuple

from torch import Tensor


class CrossScanInputs(NamedTuple):
    """Tensors and routes of one call.

    B batch, K routes, E channels, H x W map, N states, R rank of the step size.
    """

    x: Tensor  # (B, E, H, W), any strides; float32, bfloat16 or float16
    x_proj: Tensor  # (K, R + 2N, E), rows in the order dt, B, C; float32 in a kernel, as all parameters
    dt_proj: Tensor  # (K, E, R)
    dt_bias: Tensor  # (K, E), added before the softplus
    A: Tensor  # (K, E, N), float32, diagonals of the state matrices
    D: Tensor  # (K, E), skip weight
    routes: tuple[str, ...]  # the route of each of the K sets of parameters

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All inputs but the routes, by name."""
        return dict(zip(self._fields[:-1], self[:-1], strict=True))

    @property
    def parameters(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """x_proj, dt_proj, dt_bias, A and D."""
        return self.x_proj, self.dt_proj, self.dt_bias, self.A, self.D
