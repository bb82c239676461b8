"""The visible positions of a map: where they lie, and a convolution that sees nothing else.

B images, K visible patches of each, u x u positions a patch, L = K u^2, H x W positions of the map, C channels
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
    """The positions of a map that lie in visible patches, in raster order for every image.

    Packed, a map is what is at these positions, one row of them, (B, 1, L, C): layers that treat every position by
    itself need not know.

    Args:
        keep: Raster indices of the visible patches, ascending, as many for every image, (B, K), int64.
        grid: Rows and columns of patches.
        scale: u, positions of this map along a patch's side.
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
        """Return the orders of a scan's routes over the visible positions; they are made once."""
        if mode not in self._orders:
            self._orders[mode] = packed_orders(self.positions, *self.size, mode)
        return self._orders[mode]

    def pack(self, x: Tensor) -> Tensor:
        """Take the visible positions of a map (B, H, W, C): (B, 1, L, C)."""
        rows = x.flatten(0, 2)
        packed: Tensor = (
            rows.index_select(0, self.rows) if inside_transform() else _Pack.apply(rows, self.rows)  # type: ignore[no-untyped-call]
        )
        return packed.view(len(x), 1, -1, x.shape[3])

    def unpack(self, x: Tensor) -> Tensor:
        """Return the map (B, H, W, C) with x, (B, 1, L, C), at the visible positions and zeros at the hidden ones."""
        rows = _spread(x.flatten(0, 2), self.rows, len(x) * self.size[0] * self.size[1])
        return rows.view(len(x), *self.size, x.shape[3])

    def convolve(self, conv: nn.Conv2d, x: Tensor, target: "VisibleMap") -> Tensor:
        """Convolve the map that is zero at the hidden positions, as it is beyond its border.

        Takes the place of conv(x), under autocast too, and reads x in the convolution's dtype. For the backward pass
        the packed input alone is kept. A module with an adapter or a hook is called, on the whole map.

        Args:
            conv: The convolution; its output is a map of `target`'s size.
            x: (B, C, 1, L), channels last in memory.
            target: The visible positions of the output.

        Returns:
            (B, C', 1, L'), channels last in memory.
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
        others = None if target is self else target.rows  # a graph takes no tensor twice (torch 2.15)
        y: Tensor = _Convolve.apply(  # type: ignore[no-untyped-call]
            rows, weight, bias, self.rows, others, (len(x), *self.size), target.size, settings
        )
        return y.view(len(x), 1, -1, y.shape[1]).permute(0, 3, 1, 2)


def blank_hidden(images: Tensor, keep: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return images (B, C, height, width) with zeros for all pixels of hidden patches, whatever these hold.

    Args:
        images: Their sides are multiples of the grid's.
        keep, grid: As in `VisibleMap`.
    """
    visible = torch.zeros(len(keep), grid[0] * grid[1], dtype=torch.bool, device=keep.device).scatter(1, keep, True)
    height, width = images.shape[2] // grid[0], images.shape[3] // grid[1]
    pixels = visible.view(-1, 1, *grid).repeat_interleave(height, dim=2).repeat_interleave(width, dim=3)
    return torch.where(pixels, images, images.new_zeros(()))


class _Pack(torch.autograd.Function):
    """Chosen rows. The gradient writes every row once: no sums, so no order of sums."""

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
    """A convolution from the visible positions of one map to those of another, or, for no target, to its own; whole
    maps exist inside alone."""

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
    """Return `count` rows, those named holding x and the others zeros. (index_copy_ would keep x for its backward.)"""
    return x.new_zeros(count, x.shape[1]).index_put_((rows,), x)


def _whole(x: Tensor, rows: Tensor, size: tuple[int, int, int]) -> Tensor:
    """Return rows (B L, C) as a map (B, C, H, W), channels last in memory, zero where there is none."""
    return _spread(x, rows, size[0] * size[1] * size[2]).view(*size, -1).permute(0, 3, 1, 2)
