"""The orders in which routes visit the visible positions of a map, and rows that are put into an order and back."""

# B batch, L visible positions of an H x W map, E channels

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ssmpretrain.base.errors import UserError
from ssmpretrain.kernels.cross_scan.routes import MODES, Mode, routes_of, split_flip, visiting_order
from ssmpretrain.kernels.dispatch import check_tensors
from ssmpretrain.kernels.transforms import inside_transform


class PackedOrder(NamedTuple):
    """One order of the visible positions of every image, as rows of (B L, E).

    Attributes:
        rows: The row that is visited at every step, (B L,), int64.
        steps: The step at which every row is visited, (B L,), int64: the inverse.
    """

    rows: Tensor
    steps: Tensor


def packed_orders(positions: Tensor, height: int, width: int, mode: Mode = "cross") -> dict[str, PackedOrder]:
    """Return the orders in which the routes of a mode visit the visible positions.

    `packed_cross_selective_scan` and `packed_cross_ssd` read them.

    Args:
        positions: Raster indices row * W + col of the visible positions, ascending in every image, (B, L), int64. Their
            values are not checked.
        height, width: H and W.
        mode: "cross", "unidirectional", "bidirectional" or a sequence of routes; see `routes`.

    Returns:
        An order for every kind of route but "h", which reads the positions as they are. A flipped route reads the same
        order backwards.

    Raises:
        ValueError: If positions are not (B, L) int64, there are more than the map has, or the mode does not exist or is
            "cascade".
    """
    bases = by_base(routes_without_cascade("packed_orders", mode)).keys() - {"h"}
    check_tensors("packed_orders", {"positions": positions})
    if positions.ndim != 2 or positions.dtype != torch.int64 or not 0 < positions.shape[1] <= height * width:
        raise UserError(
            f"packed_orders: positions are int64 (B, L), L from 1 to H W = {height * width}; "
            f"got {positions.dtype} {tuple(positions.shape)}. Change the shape."
        )
    return {base: _order(base, positions, height, width) for base in sorted(bases)}


def check_orders(op: str, orders: Mapping[str, PackedOrder], routes: tuple[str, ...], x: Tensor, num_rows: int) -> None:
    """Raise unless the orders are those of these routes and of x's positions.

    Args:
        op: The operation's name, which opens the messages.
        orders: The orders that were given.
        routes: The routes of the operation.
        x: The operation's main input.
        num_rows: Its number of positions in all images, B L.
    """
    wanted = sorted(by_base(routes).keys() - {"h"})
    if sorted(orders) != wanted:
        raise UserError(
            f"{op}: the routes {', '.join(routes)} need the orders {wanted}; got {sorted(orders)}. "
            f"Give packed_orders the same mode."
        )
    for base, order in orders.items():
        if len(order.rows) != num_rows or order.rows.device != x.device:
            raise UserError(
                f"{op}: orders are those of x's B L = {num_rows} positions on {x.device}; "
                f"got {len(order.rows)} on {order.rows.device} for {base!r}. Give packed_orders x's positions."
            )


def by_base(routes: tuple[str, ...]) -> dict[str, list[int]]:
    """Group the numbers of the routes by the order that they read, forwards or backwards."""
    members: dict[str, list[int]] = {}
    for k, route in enumerate(routes):
        members.setdefault(split_flip(route)[0], []).append(k)
    return members


def routes_without_cascade(op: str, mode: Mode) -> tuple[str, ...]:
    """Return the routes of a mode as `routes_of` does, but refuse "cascade"."""
    if mode == "cascade":
        raise UserError(
            f"{op}: 'cascade' starts anew in every row and column, which only cross_selective_scan does. "
            f"Use {', '.join(m for m in MODES if m != 'cascade')} or a sequence of routes such as ('h', 'v_flip')."
        )
    return routes_of(op, mode)


class _Reorder(torch.autograd.Function):
    """Put rows into another order. The gradient is a permutation too: it reads each row once and adds nothing up."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, inverse: Tensor, dim: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.dim = dim
        return rows.index_select(dim, order)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (inverse,) = ctx.saved_tensors
        return grad.index_select(ctx.dim, inverse), None, None, None


def reordered(rows: Tensor, order: Tensor, inverse: Tensor, dim: int = 0) -> Tensor:
    """Return the rows of a tensor in another order; the inverse serves the gradient.

    Args:
        rows: A tensor whose dimension dim holds the rows.
        order: The row that comes at every step, int64, each row once.
        inverse: The step at which every row comes, int64.
        dim: The dimension of the rows.
    """
    if inside_transform():
        return rows.index_select(dim, order)
    return _Reorder.apply(rows, order, inverse, dim)  # type: ignore[no-any-return, no-untyped-call]


def _order(base: str, positions: Tensor, height: int, width: int) -> PackedOrder:
    step_of_map = visiting_order(base, height, width, positions.device).argsort()
    rows = step_of_map[positions].argsort(dim=1)
    first_row = torch.arange(len(rows), device=rows.device).unsqueeze(1) * rows.shape[1]
    return PackedOrder((first_row + rows).flatten(), (first_row + rows.argsort(dim=1)).flatten())
