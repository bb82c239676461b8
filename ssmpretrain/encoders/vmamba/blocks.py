"""VMamba's parts: scanning mixer, block, stem, and the layers between two stages.

Attributes have the names of the official state dicts, so published weights load without renaming. Every map is
contiguous with the channels last, (B, H, W, C). The inputs and outputs of convolutions are views of such maps. If only
some positions of a map are visible, they form a map of one row, (B, 1, L, C), and a `VisibleMap` holds their places.

    B batch, H x W positions, L = H * W, C channels, E = ssm_ratio * C inner channels, N state, R rank of the step size,
    K routes of the scan
"""

import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from timm.layers.drop import DropPath
from torch import Tensor, nn
from torch.fx import Proxy

from ssmpretrain.encoders.layers.fx_tracing import one_node
from ssmpretrain.encoders.layers.projection import Mlp, Projection
from ssmpretrain.encoders.layers.state_space import LayerNorm, add_branch, decay, init_decay, init_step_size
from ssmpretrain.encoders.masking.visible_map import VisibleMap
from ssmpretrain.kernels.cross_scan import Mode, cross_selective_scan, packed_cross_selective_scan
from ssmpretrain.kernels.cross_scan.routes import routes_of

Stem = Literal["patch", "conv"]
Downsample = Literal["merge", "conv2", "conv3"]
NormLayer = Callable[[int], nn.Module]


class Permute(nn.Module):
    """Return a view of a tensor with its axes in another order."""

    def __init__(self, *order: int) -> None:
        super().__init__()
        self.order = order

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(self.order)


def to_channels_first() -> Permute:
    """Return a module that views (B, H, W, C) as (B, C, H, W) with channels last in memory, before a convolution."""
    return Permute(0, 3, 1, 2)


def channels_last(images: Tensor) -> Tensor:
    """Return images, (B, C, height, width), with channels last in memory.

    It permutes the axes, because `vmap` does not support memory formats.
    """
    return images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


def to_channels_last() -> Permute:
    """Return a module that views (B, C, H, W) with channels last in memory as (B, H, W, C), after a convolution."""
    return Permute(0, 2, 3, 1)


class StreamConv2d(nn.Conv2d):
    """Convolve the residual stream, cast to the dtype of the weight."""

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(x.to(weight.dtype), weight, bias)  # type: ignore[no-any-return]


class CrossScanMixer(nn.Module):
    """Mix the positions of a map by selective scans along K routes: (B, H, W, C) to (B, H, W, C).

    With a `VisibleMap` it mixes only the visible positions, (B, 1, L, C) to (B, 1, L, C). The convolution takes hidden
    positions as zeros, like those beyond the border, and the scans skip them.

    Args:
        dim: C.
        ssm_ratio: E / C; E is rounded down.
        d_state: N, states per inner channel and route.
        dt_rank: R; "auto" is C / 16, rounded up.
        d_conv: Side of the depthwise convolution, odd.
        conv_bias: Whether the depthwise convolution has a bias.
        gate: Multiply the normalised sum of the routes by SiLU of a second projection of the input.
        scan: As in `VMamba`.
        norm_layer: Function that takes a width and returns the norm of the scan's output.

    Source: Liu et al., "VMamba: Visual State Space Model" (arXiv:2401.10166), section 4.
    """

    def __init__(
        self,
        dim: int,
        ssm_ratio: float = 1,
        d_state: int = 1,
        dt_rank: int | Literal["auto"] = "auto",
        d_conv: int = 3,
        conv_bias: bool = False,
        gate: bool = False,
        scan: Mode = "cross",
        norm_layer: NormLayer = LayerNorm,
    ) -> None:
        super().__init__()
        self.d_state = d_state
        self.dt_rank = math.ceil(dim / 16) if dt_rank == "auto" else dt_rank
        self.gate = gate
        self.scan = scan if isinstance(scan, str) else tuple(scan)
        routes = len(routes_of("VMamba's scan", scan))
        inner = int(ssm_ratio * dim)

        self.in_proj = Projection(dim, 2 * inner if gate else inner, bias=False)
        self.conv2d = nn.Conv2d(inner, inner, d_conv, groups=inner, padding=d_conv // 2, bias=conv_bias)
        self.x_proj_weight = nn.Parameter(torch.empty(routes, self.dt_rank + 2 * d_state, inner))
        self.dt_projs_weight = nn.Parameter(torch.empty(routes, inner, self.dt_rank))
        self.dt_projs_bias = nn.Parameter(torch.empty(routes, inner))
        self.A_logs = nn.Parameter(torch.empty(routes * inner, d_state))
        self.Ds = nn.Parameter(torch.empty(routes * inner))
        self.out_norm = norm_layer(inner)
        self.out_proj = Projection(inner, dim, bias=False)
        self.init_state_space()

    @torch.no_grad()
    def init_state_space(self) -> None:
        """Set the initial values of Mamba in place: A = -1, ..., -N; D = 1; step sizes log-uniform in [0.001, 0.1]."""
        init_decay(self.A_logs)
        self.Ds.fill_(1.0)
        for weight in (self.x_proj_weight, self.dt_projs_weight):
            bound = weight.shape[-1] ** -0.5
            nn.init.uniform_(weight, -bound, bound)
        init_step_size(self.dt_projs_bias)

    def forward(self, x: Tensor, visible: VisibleMap | None = None) -> Tensor:
        z = None
        x = self.in_proj(x)
        if self.gate:
            x, z = x.chunk(2, dim=-1)
        x = x.permute(0, 3, 1, 2)
        x = F.silu(self.conv2d(x) if visible is None else visible.convolve(self.conv2d, x, visible))
        x = self.out_norm(self._scanned(x, visible).permute(0, 2, 3, 1))
        if z is not None:
            x = x * F.silu(z)
        return self.out_proj(x)  # type: ignore[no-any-return]

    def _scanned(self, x: Tensor, visible: VisibleMap | None) -> Tensor:
        """Return the sum of the scans along all routes of a map (B, E, H, W), or of visible positions (B, E, 1, L)."""
        routes = self.x_proj_weight.shape[0]
        parameters = (
            self.x_proj_weight,
            self.dt_projs_weight,
            self.dt_projs_bias,
            decay(self.A_logs).view(routes, -1, self.d_state),
            self.Ds.view(routes, -1),
        )
        if visible is None:
            return cross_selective_scan(x, *parameters, mode=self.scan)
        orders = visible.orders(self.scan)
        return packed_cross_selective_scan(x.squeeze(2), *parameters, orders, mode=self.scan).unsqueeze(2)


class VMambaBlock(nn.Module):
    """Compute x + mixer(norm(x)), then x + mlp(norm2(x)), of a map (B, H, W, C) or of visible positions (B, 1, L, C).

    The residual stream x stays in its dtype, float32 or float64, for every dtype of the branches.
    """

    def __init__(self, mixer: nn.Module, dim: int, mlp_ratio: float, drop_path: float, norm_layer: NormLayer) -> None:
        super().__init__()
        self.norm = norm_layer(dim)
        self.op = mixer
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.mlp = None
        if mlp_ratio > 0:
            self.norm2 = norm_layer(dim)
            self.mlp = Mlp(dim, int(mlp_ratio * dim))

    def forward(self, x: Tensor, visible: VisibleMap | None = None) -> Tensor:
        if isinstance(x, Proxy):
            return one_node(self, x, visible)  # type: ignore[no-any-return]
        x = add_branch(self.drop_path(self.op(self.norm(x), visible)), x)
        return x if self.mlp is None else add_branch(self.drop_path(self.mlp(self.norm2(x))), x)


class VMambaStage(nn.Module):
    """Hold the blocks of one stage, and the layers that halve the height and width for the next stage."""

    def __init__(self, blocks: list[VMambaBlock], downsample: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample


class PatchMerging(nn.Module):
    """Concatenate the channels of 2 x 2 neighbours, normalise them and project them to 2C channels.

    A map (B, H, W, C) becomes (B, ceil(H / 2), ceil(W / 2), 2C). An odd side gets a row or column of zeros.

    Source: Liu et al., "Swin Transformer" (arXiv:2103.14030), section 3.1.
    """

    def __init__(self, dim: int, out_dim: int, norm_layer: NormLayer) -> None:
        super().__init__()
        self.norm = norm_layer(4 * dim)
        self.reduction = Projection(4 * dim, out_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, Proxy):
            return one_node(self, x)  # type: ignore[no-any-return]
        return self._reduced(self._neighbours(x))

    def forward_visible(self, x: Tensor, source: VisibleMap, target: VisibleMap) -> Tensor:
        """Merge the visible positions of a map, (B, 1, L, C), into those of the next map, (B, 1, L / 4, 2C).

        Args:
            x: Features at the visible positions.
            source: The visible positions of this map. Four neighbours are all visible or all hidden.
            target: The visible positions of the next map.
        """
        return self._reduced(target.pack(self._neighbours(source.unpack(x))))

    def _neighbours(self, x: Tensor) -> Tensor:
        H, W = x.shape[1:3]
        if H % 2 or W % 2:
            x = F.pad(x, (0, 0, 0, W % 2, 0, H % 2))
        # The neighbour below comes before the one to the right.
        below_and_right = x.view(x.shape[0], x.shape[1] // 2, 2, x.shape[2] // 2, 2, x.shape[3])
        return below_and_right.permute(0, 1, 3, 4, 2, 5).flatten(3)

    def _reduced(self, neighbours: Tensor) -> Tensor:
        return self.reduction(self.norm(neighbours))  # type: ignore[no-any-return]


def make_stem(kind: Stem, in_chans: int, dim: int, norm_layer: NormLayer) -> nn.Sequential:
    """Build a stem, which turns images (B, in_chans, height, width) into a map (B, height / 4, width / 4, C).

    Args:
        kind: "patch" for one convolution with 4 x 4 taps and stride 4; "conv" for two convolutions with 3 x 3 taps and
            stride 2.
        in_chans: Channels of the images.
        dim: C.
        norm_layer: Function that takes a width and returns a norm.
    """
    if kind == "patch":
        return nn.Sequential(nn.Conv2d(in_chans, dim, 4, 4), to_channels_last(), norm_layer(dim))
    return nn.Sequential(
        nn.Conv2d(in_chans, dim // 2, 3, 2, 1),
        to_channels_last(),
        norm_layer(dim // 2),
        to_channels_first(),
        nn.GELU(),
        nn.Conv2d(dim // 2, dim, 3, 2, 1),
        to_channels_last(),
        norm_layer(dim),
    )


def make_downsample(kind: Downsample, dim: int, out_dim: int, norm_layer: NormLayer) -> nn.Module:
    """Build the layers between two stages: (B, H, W, dim) to (B, H / 2, W / 2, out_dim).

    Args:
        kind: "merge" for `PatchMerging`; "conv2" or "conv3" for a convolution with 2 x 2 or 3 x 3 taps and stride 2.
        dim, out_dim: Channels of the input and of the output.
        norm_layer: Function that takes a width and returns a norm.
    """
    if kind == "merge":
        return PatchMerging(dim, out_dim, norm_layer)
    conv = StreamConv2d(dim, out_dim, 2, 2) if kind == "conv2" else StreamConv2d(dim, out_dim, 3, 2, 1)
    return nn.Sequential(to_channels_first(), conv, to_channels_last(), norm_layer(out_dim))
