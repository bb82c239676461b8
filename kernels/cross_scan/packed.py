"""The scan along routes over the visible positions of a map alone, as a masked autoencoder needs it.

The visible positions lie in raster order, which a route along rows reads directly. For any other order, the positions
of each image are permuted, scanned as a map of one row, and permuted back. No kernel is needed for this alone.
"""

# B batch, K routes, E channels, H x W map, L visible positions of it, N state, R rank of the step size

from collections.abc import Iterable, Mapping
from functools import reduce

import torch
from torch import Tensor

from ssmpretrain.base.errors import UserError
from ssmpretrain.kernels.cross_scan.api import check_parameters, cross_selective_scan
from ssmpretrain.kernels.cross_scan.inputs import CrossScanInputs
from ssmpretrain.kernels.cross_scan.orders import (
    PackedOrder,
    by_base,
    check_orders,
    reordered,
    routes_without_cascade,
)
from ssmpretrain.kernels.cross_scan.routes import Mode, split_flip
from ssmpretrain.kernels.dispatch import Impl, check_tensors


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
    routes = routes_without_cascade("packed_cross_selective_scan", mode)
    inputs = CrossScanInputs(x, x_proj, dt_proj, dt_bias, A, D, routes)
    _check(inputs, orders)
    rows = x.mT.flatten(0, 1)  # (B L, E)
    per_route = [p.unbind() for p in inputs.parameters]
    parts = []
    for base, members in by_base(routes).items():
        weights = (torch.stack([p[k] for k in members]) for p in per_route)
        along_row = tuple("h_flip" if split_flip(routes[k])[1] else "h" for k in members)
        parts.append(_scan(rows, (len(x), x.shape[2]), orders.get(base), weights, along_row, impl))
    return reduce(torch.add, parts).view(x.mT.shape).mT


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
        rows = reordered(rows, order.rows, order.steps)
    one_row = rows.view(batch, 1, length, rows.shape[1]).permute(0, 3, 1, 2)  # (B, E, 1, L)
    y = cross_selective_scan(one_row, *weights, mode=along_row, impl=impl).permute(0, 2, 3, 1).flatten(0, 2)
    return y if order is None else reordered(y, order.steps, order.rows)


def _check(inputs: CrossScanInputs, orders: Mapping[str, PackedOrder]) -> None:
    op = "packed_cross_selective_scan"
    x, routes = inputs.x, inputs.routes
    check_tensors(op, inputs.tensors)
    if x.ndim != 3 or 0 in x.shape[1:]:
        raise UserError(f"{op}: x is (B, E, L), none but B 0; got {tuple(x.shape)}. Change the shape.")
    check_parameters(op, inputs)
    check_orders(op, orders, routes, x, x.shape[0] * x.shape[2])
