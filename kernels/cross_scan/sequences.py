"""`cross_scan` and `cross_merge`: from a map to its sequences and back, in plain PyTorch on every device."""

# B batch, K routes, E channels, H x W map, L = H W

import torch
from torch import Tensor

from ssmpretrain.base.errors import UserError
from ssmpretrain.kernels.cross_scan.routes import Mode, routes_of, split_flip, visiting_order
from ssmpretrain.kernels.dispatch import check_tensors


def cross_scan(x: Tensor, mode: Mode = "cross") -> Tensor:
    """Read a map along every route.

    Args:
        x: Map, (B, E, H, W), any strides and dtype.
        mode: "cross", "unidirectional", "bidirectional" or a sequence of routes; see `routes`.

    Returns:
        The sequences, (B, K, E, H W), contiguous: step t of route k is the t-th position that the route visits.

    Raises:
        ValueError: If x is not (B, E, H, W), or the mode does not exist or is "cascade".

    Source: Liu et al., "VMamba: Visual State Space Model" (arXiv:2401.10166), sec. 4.2.
    """
    routes = _routes("cross_scan", mode)
    check_tensors("cross_scan", {"x": x})
    if x.ndim != 4 or 0 in x.shape[1:]:
        raise UserError(f"cross_scan: x is (B, E, H, W), none but B 0; got {tuple(x.shape)}. Change the shape.")
    return torch.stack([_read(x, route) for route in routes], dim=1)


def cross_merge(y: Tensor, size: tuple[int, int] | None = None, mode: Mode = "cross") -> Tensor:
    """Put the sequences of every route back into the map and add them up: the adjoint of `cross_scan`.

    Args:
        y: Sequences, (B, K, E, H W), or (B, K, E, H, W), whose last two sizes are those of the map.
        size: Height and width of the map; optional if y has both.
        mode: As for `cross_scan`.

    Returns:
        The sum over the routes, (B, E, H, W), in y's dtype, accumulated in float32 (float64 for a float64 y).

    Raises:
        ValueError: If the shapes do not fit together or the mode does not exist or is "cascade".
    """
    routes = _routes("cross_merge", mode)
    check_tensors("cross_merge", {"y": y})
    if y.ndim not in (4, 5) or y.shape[1] != len(routes) or 0 in y.shape[1:]:
        raise UserError(
            f"cross_merge: y is (B, K, E, L) or (B, K, E, H, W) with one sequence for each of the {len(routes)} routes "
            f"{', '.join(routes)}, no size but B 0; got {tuple(y.shape)}. Change the shape."
        )
    if y.ndim == 5:
        given = (y.shape[3], y.shape[4])
        if size is not None and tuple(size) != given:
            raise UserError(f"cross_merge: size is that of y's last two sizes, {given}; got {size}. Leave it out.")
        size = given
        y = y.flatten(3)
    elif size is None:
        raise UserError(f"cross_merge: y of shape {tuple(y.shape)} does not say its map. Give size=(H, W).")
    height, width = size
    if height * width != y.shape[3]:
        raise UserError(
            f"cross_merge: H W is the length of the sequences, {y.shape[3]}; got size {(height, width)}. Correct it."
        )
    dtype = torch.float64 if y.dtype == torch.float64 else torch.float32
    total = _write(y[:, 0].to(dtype), routes[0], height, width)
    for k in range(1, len(routes)):
        total = total + _write(y[:, k].to(dtype), routes[k], height, width)
    return total.to(y.dtype)


def _routes(op: str, mode: Mode) -> tuple[str, ...]:
    if mode == "cascade":
        raise UserError(
            f"{op}: in 'cascade' the columns are read from the result of scanning the rows, so there is no one set of "
            f"sequences. Use cross_selective_scan(..., mode='cascade')."
        )
    return routes_of(op, mode)


def _read(x: Tensor, route: str) -> Tensor:
    """Return (B, E, H, W) as the sequence of one route, (B, E, L)."""
    base, flipped = split_flip(route)
    if base == "h":
        sequence = x.flatten(2)
    elif base == "v":
        sequence = x.mT.flatten(2)
    else:
        sequence = x.flatten(2).index_select(2, visiting_order(base, x.shape[2], x.shape[3], x.device))
    return sequence.flip(2) if flipped else sequence


def _write(sequence: Tensor, route: str, height: int, width: int) -> Tensor:
    """Return the sequence of one route, (B, E, L), as the map it was read from, (B, E, H, W)."""
    base, flipped = split_flip(route)
    if flipped:
        sequence = sequence.flip(2)
    if base == "v":
        return sequence.reshape(*sequence.shape[:2], width, height).mT
    if base != "h":
        step_at = visiting_order(base, height, width, sequence.device).argsort()
        sequence = sequence.index_select(2, step_at)
    return sequence.reshape(*sequence.shape[:2], height, width)
