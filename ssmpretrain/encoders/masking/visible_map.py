"""Visible positions of a map: their indices, and a convolution that reads and computes only them.

B images, K visible patches per image, u x u positions per patch, L = K u^2, H x W positions of the map, C channels
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmpretrain.encoders.layers.plain_modules import is_plain
from ssmpretrain.encoders.layers.state_space import compute_dtype
from ssmpretrain.kernels.cross_scan import PackedOrder, packed_orders
from ssmpretrain.kernels.transforms import inside_transform


class VisibleMap:
    """Positions of a map that lie in visible patches, in raster order, for each image.

    A packed map holds only these positions, in one row, (B, 1, L, C). Layers that compute each position separately can
    read a packed map without changes.

    Args:
        keep: Raster indices of the visible patches, (B, K), int64, ascending; the same number K for each image.
        grid: Numbers of rows and columns of patches.
        scale: u, positions of this map along the side of a patch.
    """

    def __init__(self, keep: Tensor, grid: tuple[int, int], scale: int) -> None:
        self.size = grid[0] * scale, grid[1] * scale
        rows, columns = ((index * scale).unsqueeze(-1) for index in (keep // grid[1], keep % grid[1]))
        step = torch.arange(scale, device=keep.device)
        raster = ((rows + step) * self.size[1]).unsqueeze(-1) + (columns + step).unsqueeze(-2)  # (B, K, u, u)
        self.positions = raster.flatten(1).sort(dim=1).values  # (B, L)
        first = torch.arange(len(keep), device=keep.device).unsqueeze(1) * (self.size[0] * self.size[1])
        self.rows = (first + self.positions).flatten()  # of (B H W, C)
        self._orders: dict[str | tuple[str, ...], dict[str, PackedOrder]] = {}

    def orders(self, mode: str | tuple[str, ...]) -> dict[str, PackedOrder]:
        """Return the order of the visible positions along each route of a scan; computed once per mode.

        Args:
            mode: Mode of the scan, as in `cross_selective_scan`.
        """
        if mode not in self._orders:
            self._orders[mode] = packed_orders(self.positions, *self.size, mode)
        return self._orders[mode]

    def pack(self, x: Tensor) -> Tensor:
        """Return the visible positions of a map: (B, H, W, C) to (B, 1, L, C)."""
        rows = x.flatten(0, 2)
        packed: Tensor = (
            rows.index_select(0, self.rows) if inside_transform() else _Pack.apply(rows, self.rows)  # type: ignore[no-untyped-call]
        )
        return packed.view(len(x), 1, -1, x.shape[3])

    def unpack(self, x: Tensor) -> Tensor:
        """Return the whole map, (B, H, W, C), of a packed map, (B, 1, L, C), with zeros at hidden positions."""
        rows = _spread(x.flatten(0, 2), self.rows, len(x) * self.size[0] * self.size[1])
        return rows.view(len(x), *self.size, x.shape[3])

    def convolve(self, conv: nn.Conv2d, x: Tensor, target: "VisibleMap") -> Tensor:
        """Compute a convolution of the whole map, with zeros at hidden positions, at the visible positions.

        The dtypes are those of `conv(x)`, also under autocast. Only the packed input is kept for the backward pass. If
        the module has an adapter or a hook, it is called on the whole map.

        Args:
            conv: The convolution. Its output has the size of `target`'s map.
            x: Packed map, (B, C, 1, L), channels last in memory.
            target: The visible positions of the output.

        Returns:
            Packed output, (B, C', 1, L'), channels last in memory.
        """
        plain = is_plain(conv, nn.Conv2d, bias=getattr(conv, "bias", None) is not None)
        if not plain or inside_transform():
            whole = self.unpack(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            return target.pack(conv(whole).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        assert conv.padding_mode == "zeros" and not isinstance(conv.padding, str)
        dtype = compute_dtype(x, conv.weight)
        weight, bias = conv.weight.to(dtype), None if conv.bias is None else conv.bias.to(dtype)
        rows = x.permute(0, 2, 3, 1).flatten(0, 2).to(dtype)
        settings = (conv.stride, conv.padding, conv.dilation, conv.groups)
        others = None if target is self else target.rows  # a graph must not get one tensor twice (torch 2.15)
        y: Tensor = _Convolve.apply(  # type: ignore[no-untyped-call]
            rows, weight, bias, self.rows, others, (len(x), *self.size), target.size, settings
        )
        return y.view(len(x), 1, -1, y.shape[1]).permute(0, 3, 1, 2)


def blank_hidden(images: Tensor, keep: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return images with all pixels of hidden patches set to zero, even if they are NaN.

    Args:
        images: Images, (B, C, height, width). The sides are multiples of the numbers of rows and columns of patches.
        keep, grid: As in `VisibleMap`.

    Returns:
        The images, (B, C, height, width).
    """
    visible = torch.zeros(len(keep), grid[0] * grid[1], dtype=torch.bool, device=keep.device).scatter(1, keep, True)
    height, width = images.shape[2] // grid[0], images.shape[3] // grid[1]
    pixels = visible.view(-1, 1, *grid).repeat_interleave(height, dim=2).repeat_interleave(width, dim=3)
    return torch.where(pixels, images, images.new_zeros(()))


class _Pack(torch.autograd.Function):
    """Select rows. The gradient writes each row once, so it sums nothing and is deterministic."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.count = len(x)
        return x.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (rows,) = ctx.saved_tensors
        return _spread(grad, rows, ctx.count), None


class _Convolve(torch.autograd.Function):
    """Convolve from the visible positions of one map to those of another map.

    If `target` is None, the output has the visible positions of the input. Whole maps exist only during the call.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        source: Tensor,
        target: Tensor | None,
        source_size: tuple[int, int, int],
        target_size: tuple[int, int],
        settings: tuple[Any, ...],
    ) -> Tensor:
        ctx.save_for_backward(x, weight, source, target)
        ctx.settings = settings
        ctx.source_size, ctx.target_size = source_size, (source_size[0], *target_size)
        y = F.conv2d(_whole(x, source, source_size), weight, bias, *settings)
        assert y.shape[2:] == target_size
        return y.permute(0, 2, 3, 1).flatten(0, 2).index_select(0, source if target is None else target)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, source, target = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.settings
        dx, dweight, dbias = torch.ops.aten.convolution_backward(
            _whole(grad, source if target is None else target, ctx.target_size),
            _whole(x, source, ctx.source_size),
            weight,
            [weight.shape[0]],
            stride,
            padding,
            dilation,
            False,
            [0, 0],
            groups,
            ctx.needs_input_grad[:3],
        )
        if dx is not None:
            dx = dx.permute(0, 2, 3, 1).flatten(0, 2).index_select(0, source)
        return dx, dweight, dbias, None, None, None, None, None


def _spread(x: Tensor, rows: Tensor, count: int) -> Tensor:
    """Return `count` rows: x at the given rows, zeros elsewhere. (index_copy_ would keep x for the backward pass.)"""
    return x.new_zeros(count, x.shape[1]).index_put_((rows,), x)


def _whole(x: Tensor, rows: Tensor, size: tuple[int, int, int]) -> Tensor:
    """Return rows (B L, C) as a map (B, C, H, W), channels last in memory, with zeros at all other positions."""
    return _spread(x, rows, size[0] * size[1] * size[2]).view(*size, -1).permute(0, 3, 1, 2)
