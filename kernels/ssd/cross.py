"""The SSD along the routes of a map: `cross_ssd` reads the whole map, `packed_cross_ssd` its visible positions.

Rows of the map are read in place. For any other order, the positions are permuted, scanned and permuted back. Routes
that read one order forwards and backwards share a pass over it.
"""

# B batch, Y x X map, L positions, K routes, H heads, P channels of a head, G groups of heads, N state

from collections.abc import Callable, Mapping
from functools import reduce
from itertools import zip_longest
from typing import NamedTuple

import torch
from torch import Tensor

from ssmpretrain.kernels.cross_scan.orders import (
    PackedOrder,
    by_base,
    check_orders,
    reordered,
    routes_without_cascade,
)
from ssmpretrain.kernels.cross_scan.routes import Mode, split_flip, visiting_order
from ssmpretrain.kernels.dispatch import Impl
from ssmpretrain.kernels.ssd.api import check, run
from ssmpretrain.kernels.ssd.inputs import SSDInputs


def cross_ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    mode: Mode = "cross",
    chunk: int | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Scan a map by `ssd` along several routes and add the results: VMamba's scan with the recurrence of Mamba-2.

    The routes share x, B and C. Each has its own step sizes and decays. D x is added once:

        y = sum over k of ssd(x, dt[k], A[k], B, C) along route k, put back on the map, + D x

    Memory: as `bidirectional_ssd` for every order of the routes, and permuted copies of x, B and C for every order but
    that of the rows. "cross" makes two passes, one over rows and one over columns.

    Args:
        x: Map, channels last, (B, Y, X, H, P), float32, bfloat16, float16 or float64.
        dt: Step size of every route, (B, Y, X, K, H), not negative, after bias and softplus; any of these dtypes.
        A: (K, H), float32; negative for a decaying state.
        B: Input projection, (B, Y, X, G, N), where G divides H and head h reads group h // (H / G); in x's dtype.
        C: Output projection, shaped like B; in x's dtype.
        D: Skip weight, (H,), or None for no skip.
        mode: "cross", "unidirectional", "bidirectional" or a sequence of K routes; see `cross_scan.routes`.
        chunk: As for `ssd`.
        impl: As for `selective_scan`.

    Returns:
        y, (B, Y, X, H, P), float32 (float64 for a float64 x). The sum of K routes may be too large for x's dtype, so it
        is not rounded before the norm that follows it.

    Raises:
        ValueError: If a shape, dtype or device does not fit, the mode does not exist or is "cascade", or impl is
            unknown or cannot run here.

    Source: the routes are those of Liu et al., "VMamba: Visual State Space Model" (arXiv:2401.10166), sec. 4.2; the
    recurrence is that of `ssd`.
    """
    routes = routes_without_cascade("cross_ssd", mode)
    check("cross_ssd", x, {"dt": dt}, {"A": A}, B, C, D, None, chunk, "B, Y, X", routes)
    height, width = x.shape[1:3]
    orders = {base: _order_of_map(base, height, width, x.device) for base in by_base(routes)}
    return _sum_over_routes("cross_ssd", x, dt, A, B, C, D, orders, routes, chunk, impl)


def packed_cross_ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    orders: Mapping[str, PackedOrder],
    *,
    mode: Mode = "cross",
    chunk: int | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Scan the visible positions of a map by `ssd` along several routes and add the results; skip the hidden positions.

    Route k visits the visible positions in the order in which it would visit the map. The state passes from one visible
    position to the next. With all positions visible the result is that of `cross_ssd`.

    Args:
        x: The visible positions in raster order, (B, L, H, P), float32, bfloat16, float16 or float64.
        dt: Step size of every route, (B, L, K, H), not negative, after bias and softplus; any of these dtypes.
        A, D: As for `cross_ssd`.
        B, C: Projections, (B, L, G, N); in x's dtype.
        orders: The result of `packed_orders` for these positions and this mode. Compute it once for all blocks of a
            stage.
        mode, chunk, impl: As for `cross_ssd`.

    Returns:
        y, (B, L, H, P), float32 (float64 for a float64 x).

    Raises:
        ValueError: As for `cross_ssd`, or if the orders are those of other positions or another mode.
    """
    routes = routes_without_cascade("packed_cross_ssd", mode)
    check("packed_cross_ssd", x, {"dt": dt}, {"A": A}, B, C, D, None, chunk, "B, L", routes)
    check_orders("packed_cross_ssd", orders, routes, x, x.shape[0] * x.shape[1])
    along = {base: _order_of_rows(orders.get(base)) for base in by_base(routes)}
    return _sum_over_routes("packed_cross_ssd", x, dt, A, B, C, D, along, routes, chunk, impl)


class _Order(NamedTuple):
    """How an order reads positions (B, positions..., ...) as a sequence (B, L, ...), and writes a sequence back."""

    read: Callable[[Tensor], Tensor]
    write: Callable[[Tensor], Tensor]


def _order_of_map(base: str, height: int, width: int, device: torch.device) -> _Order:
    if base == "h":
        return _Order(lambda t: t.flatten(1, 2), lambda y: y.view(-1, height, width, *y.shape[2:]))
    if base == "v":
        return _Order(
            lambda t: t.transpose(1, 2).flatten(1, 2),
            lambda y: y.view(-1, width, height, *y.shape[2:]).transpose(1, 2),
        )
    positions = visiting_order(base, height, width, device)
    steps = positions.argsort()
    return _Order(
        lambda t: reordered(t.flatten(1, 2), positions, steps, dim=1),
        lambda y: reordered(y, steps, positions, dim=1).view(-1, height, width, *y.shape[2:]),
    )


def _order_of_rows(order: PackedOrder | None) -> _Order:
    if order is None:
        return _Order(lambda t: t, lambda y: y)
    rows, steps = order
    return _Order(
        lambda t: reordered(t.flatten(0, 1), rows, steps).view(t.shape),
        lambda y: reordered(y.flatten(0, 1), steps, rows).view(y.shape),
    )


def _sum_over_routes(
    op: str,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    orders: Mapping[str, _Order],
    routes: tuple[str, ...],
    chunk: int | None,
    impl: Impl,
) -> Tensor:
    """Scan along the orders of all routes and add the results, in float32; D x joins the first pass."""
    steps, decays = dt.unbind(-2), A.unbind(0)  # the gradient of unbind is one stack
    parts = []
    for base, members in by_base(routes).items():
        order = orders[base]
        x_o, B_o, C_o = (order.read(t) for t in (x, B, C))
        passes = []
        ahead, back = ([k for k in members if split_flip(routes[k])[1] is flip] for flip in (False, True))
        for pair in zip_longest(ahead, back):
            (dt_a, A_a), (dt_b, A_b) = ((None, None) if k is None else (order.read(steps[k]), decays[k]) for k in pair)
            passes.append(run(op, SSDInputs(x_o, B_o, C_o, D, dt_a, A_a, dt_b, A_b, 1.0, chunk, True), impl))
            D = None
        parts.append(order.write(reduce(torch.add, passes)))
    return reduce(torch.add, parts)
