"""The scan along routes over the visible positions of a map alone, as a masked autoencoder needs it.

The visible positions lie in raster order, which a route along rows reads directly. For any other order, the positions
of each image are permuted, scanned as a map of one row, and permuted back. No kernel is needed for this alone.
"""

# B batch, K routes, E channels, H x W map, L visible positions of it, N state, R rank of the step size

from collections.abc import Iterable, Mapping
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ssmpretrain.base.errors import UserError
from ssmpretrain.kernels.cross_scan.api import check_parameters, cross_selective_scan
from ssmpretrain.kernels.cross_scan.inputs import CrossScanInputs
from ssmpretrain.kernels.cross_scan.routes import MODES, Mode, routes_of, split_flip, visiting_order
from ssmpretrain.kernels.dispatch import Impl, check_tensors
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
    """Return the orders in which the routes of a mode visit the visible positions, for `packed_cross_selective_scan`.

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
    bases = _by_base(_routes("packed_orders", mode)).keys() - {"h"}
    check_tensors("packed_orders", {"positions": positions})
    if positions.ndim != 2 or positions.dtype != torch.int64 or not 0 < positions.shape[1] <= height * width:
        raise UserError(
            f"packed_orders: positions are int64 (B, L), L from 1 to H W = {height * width}; "
            f"got {positions.dtype} {tuple(positions.shape)}. Change the shape."
        )
    return {base: _order(base, positions, height, width) for base in sorted(bases)}


def packed_cross_selective_scan(
    x: Tensor,
    x_proj: Tensor,
    dt_proj: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    orders: Mapping[str, PackedOrder],
    *,
    mode: Mode = "cross",
    impl: Impl = "auto",
) -> Tensor:
    """Scan the visible positions of a map along several routes and add the results; skip the hidden positions.

    Route k visits the visible positions in the order in which it would visit the map. The state passes from one visible
    position to the next. With all positions visible the result is that of `cross_selective_scan`.

    Memory: as `cross_selective_scan` with H W = L, and a permuted copy of x for every order but "h".

    Args:
        x: The visible positions in raster order, (B, E, L), float32, bfloat16, float16 or float64. Channels last in
            memory are read without a copy.
        x_proj, dt_proj, dt_bias, A, D: As in `cross_selective_scan`.
        orders: The result of `packed_orders` for these positions and this mode. Compute it once for all blocks of a
            stage.
        mode: "cross", "unidirectional", "bidirectional" or a sequence of K routes; see `routes`.
        impl: As for `selective_scan`.

    Returns:
        y, (B, E, L), float32 (float64 for a float64 x), channels last in memory.

    Raises:
        ValueError: If a shape, dtype or device does not fit, the orders are those of other positions or another mode,
            or the mode does not exist or is "cascade".

    Source: the scan is that of Liu et al., "VMamba: Visual State Space Model" (arXiv:2401.10166), sec. 4.2.
    """
    routes = _routes("packed_cross_selective_scan", mode)
    inputs = CrossScanInputs(x, x_proj, dt_proj, dt_bias, A, D, routes)
    _check(inputs, orders)
    rows = x.mT.flatten(0, 1)  # (B L, E)
    per_route = [p.unbind() for p in inputs.parameters]
    parts = []
    for base, members in _by_base(routes).items():
        weights = (torch.stack([p[k] for k in members]) for p in per_route)
        along_row = tuple("h_flip" if split_flip(routes[k])[1] else "h" for k in members)
        parts.append(_scan(rows, (len(x), x.shape[2]), orders.get(base), weights, along_row, impl))
    return reduce(torch.add, parts).view(x.mT.shape).mT


class _Reorder(torch.autograd.Function):
    """Put rows into another order. The gradient is a permutation too: it reads each row once and adds nothing up."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return rows.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return grad.index_select(0, inverse), None, None


def _reordered(rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    if inside_transform():
        return rows.index_select(0, order)
    return _Reorder.apply(rows, order, inverse)  # type: ignore[no-any-return, no-untyped-call]


def _scan(
    rows: Tensor,
    size: tuple[int, int],
    order: PackedOrder | None,
    weights: Iterable[Tensor],
    along_row: tuple[str, ...],
    impl: Impl,
) -> Tensor:
    """Scan rows (B L, E) in an order (None: as they are), forwards or backwards by `along_row`; undo the order in y.

    size is B and L.
    """
    batch, length = size
    if order is not None:
        rows = _reordered(rows, order.rows, order.steps)
    one_row = rows.view(batch, 1, length, rows.shape[1]).permute(0, 3, 1, 2)  # (B, E, 1, L)
    y = cross_selective_scan(one_row, *weights, mode=along_row, impl=impl).permute(0, 2, 3, 1).flatten(0, 2)
    return y if order is None else _reordered(y, order.steps, order.rows)


def _order(base: str, positions: Tensor, height: int, width: int) -> PackedOrder:
    step_of_map = visiting_order(base, height, width, positions.device).argsort()
    rows = step_of_map[positions].argsort(dim=1)
    first_row = torch.arange(len(rows), device=rows.device).unsqueeze(1) * rows.shape[1]
    return PackedOrder((first_row + rows).flatten(), (first_row + rows.argsort(dim=1)).flatten())


def _by_base(routes: tuple[str, ...]) -> dict[str, list[int]]:
    """Group the numbers of the routes by the order that they read, forwards or backwards."""
    members: dict[str, list[int]] = {}
    for k, route in enumerate(routes):
        members.setdefault(split_flip(route)[0], []).append(k)
    return members


def _routes(op: str, mode: Mode) -> tuple[str, ...]:
    if mode == "cascade":
        raise UserError(
            f"{op}: 'cascade' starts anew in every row and column, and only a whole map has those. "
            f"Use {', '.join(m for m in MODES if m != 'cascade')} or a sequence of routes such as ('h', 'v_flip')."
        )
    return routes_of(op, mode)


def _check(inputs: CrossScanInputs, orders: Mapping[str, PackedOrder]) -> None:
    op = "packed_cross_selective_scan"
    x, routes = inputs.x, inputs.routes
    check_tensors(op, inputs.tensors)
    if x.ndim != 3 or 0 in x.shape[1:]:
        raise UserError(f"{op}: x is (B, E, L), none but B 0; got {tuple(x.shape)}. Change the shape.")
    check_parameters(op, inputs)
    wanted = sorted(_by_base(routes).keys() - {"h"})
    if sorted(orders) != wanted:
        raise UserError(
            f"{op}: the routes {', '.join(routes)} need the orders {wanted}; got {sorted(orders)}. "
            f"Give packed_orders the same mode."
        )
    rows = x.shape[0] * x.shape[2]
    for base, order in orders.items():
        if len(order.rows) != rows or order.rows.device != x.device:
            raise UserError(
                f"{op}: orders are those of x's B L = {rows} positions on {x.device}; "
                f"got {len(order.rows)} on {order.rows.device} for {base!r}. Give packed_orders x's positions."
            )
