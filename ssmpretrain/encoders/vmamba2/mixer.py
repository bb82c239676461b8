"""VMamba2's mixer: the scan of Mamba-2 along the routes of a map.

B batch, H x W positions, L visible positions, C channels, E = ssm_ratio * C inner channels, M heads of P channels,
N state, K routes of the scan
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmpretrain.base.errors import UserError
from ssmpretrain.encoders.layers.projection import Projection
from ssmpretrain.encoders.layers.state_space import LayerNorm, decay, init_head_decay, init_step_size, stream
from ssmpretrain.encoders.masking.visible_map import VisibleMap
from ssmpretrain.encoders.vmamba.blocks import NormLayer
from ssmpretrain.kernels.cross_scan import Mode
from ssmpretrain.kernels.cross_scan.routes import routes_of
from ssmpretrain.kernels.ssd import cross_ssd, packed_cross_ssd


class CrossSSDMixer(nn.Module):
    """Mix the positions of a map by scans of Mamba-2 along K routes: (B, H, W, C) to (B, H, W, C).

    All routes share the content, B and C. Each route has a step size for each head. With a `VisibleMap` the mixer mixes
    only the visible positions, (B, 1, L, C) to (B, 1, L, C). The convolution takes hidden positions as zeros, like
    those beyond the border, and the scans skip them.

    Args:
        dim: C.
        ssm_ratio: E / C; E is rounded down.
        d_state: N, states per channel.
        head_dim: P, channels that share one decay; it divides E.
        d_conv: Side of the depthwise convolution over the content, B and C, odd.
        conv_bias: Whether the depthwise convolution has a bias.
        gate: Multiply the normalised sum of the routes by SiLU of a further projection of the input.
        scan: As in `VMamba2`.
        norm_layer: Function that takes a width and returns the norm of the scan's output.

    Source: Dao & Gu, "Transformers are SSMs" (arXiv:2405.21060), section 7.1, along the routes of Liu et al., "VMamba:
    Visual State Space Model" (arXiv:2401.10166), section 4.
    """

    def __init__(
        self,
        dim: int,
        ssm_ratio: float = 1,
        d_state: int = 16,
        head_dim: int = 32,
        d_conv: int = 3,
        conv_bias: bool = False,
        gate: bool = False,
        scan: Mode = "cross",
        norm_layer: NormLayer = LayerNorm,
    ) -> None:
        super().__init__()
        if scan == "cascade":
            raise UserError("VMamba2: scan is cross, bidirectional, unidirectional or a list of routes, not 'cascade'.")
        self.inner = int(ssm_ratio * dim)
        if self.inner % head_dim:
            raise UserError(
                f"VMamba2: head_dim divides the inner channels of every stage; got {head_dim} for {self.inner}. "
                f"Choose a divisor."
            )
        self.d_state = d_state
        self.head_dim = head_dim
        self.gate = gate
        self.scan = scan if isinstance(scan, str) else tuple(scan)
        routes, heads = len(routes_of("VMamba2's scan", scan)), self.inner // head_dim

        # The order of Mamba-2's projection. The step sizes have a product of their own: one of odd width is slow.
        mixed = self.inner + 2 * d_state
        self.in_proj = Projection(dim, self.inner + mixed if gate else mixed, bias=False)  # z (with a gate), x, B, C
        self.dt_proj = Projection(dim, routes * heads, bias=False)
        self.conv2d = nn.Conv2d(mixed, mixed, d_conv, groups=mixed, padding=d_conv // 2, bias=conv_bias)
        self.dt_bias = nn.Parameter(torch.empty(routes, heads))
        self.A_logs = nn.Parameter(torch.empty(routes, heads))
        self.Ds = nn.Parameter(torch.empty(heads))
        self.out_norm = norm_layer(self.inner)
        self.out_proj = Projection(self.inner, dim, bias=False)
        self.init_state_space()

    @torch.no_grad()
    def init_state_space(self) -> None:
        """Set the initial values of Mamba-2 in place: A in [-16, -1]; D = 1; step sizes log-uniform in [0.001, 0.1]."""
        init_head_decay(self.A_logs)
        self.Ds.fill_(1.0)
        init_step_size(self.dt_bias)

    def forward(self, x: Tensor, visible: VisibleMap | None = None) -> Tensor:
        z, dt = None, self.dt_proj(x)
        x = self.in_proj(x)
        if self.gate:
            z, x = x[..., : self.inner], x[..., self.inner :]
        x = x.permute(0, 3, 1, 2)
        x = F.silu(self.conv2d(x) if visible is None else visible.convolve(self.conv2d, x, visible))
        y = self.out_norm(self._scanned(x.permute(0, 2, 3, 1), dt, visible))
        return self.out_proj(y if z is None else y * F.silu(z))  # type: ignore[no-any-return]

    def _scanned(self, mixed: Tensor, dt: Tensor, visible: VisibleMap | None) -> Tensor:
        """Return the sum of the scans along all routes, (B, H, W, E), from x, B and C, and the raw step sizes."""
        x = mixed[..., : self.inner].unflatten(-1, (-1, self.head_dim))  # type: ignore[no-untyped-call]
        B, C = mixed[..., self.inner :].unsqueeze(-2).chunk(2, dim=-1)
        dt = F.softplus(stream(dt).view(*dt.shape[:3], *self.dt_bias.shape) + self.dt_bias)
        A, D = decay(self.A_logs), self.Ds
        if visible is None:
            return cross_ssd(x, dt, A, B, C, D, mode=self.scan).flatten(-2)
        x, dt, B, C = (t.squeeze(1) for t in (x, dt, B, C))
        y = packed_cross_ssd(x, dt, A, B, C, D, visible.orders(self.scan), mode=self.scan)
        return y.flatten(-2).unsqueeze(1)
