"""Inputs of the SSD along routes, an independent walk over the map in float64, and the comparison with it."""

import torch
from ssds import TOLERANCES, Inputs, error, leaves_of
from torch import Tensor

from ssmpretrain.kernels.cross_scan import MODES, Mode


def routes_of(mode: Mode) -> tuple[str, ...]:
    return MODES[mode] if isinstance(mode, str) else tuple(mode)


def make_map(size: tuple[int, int], mode: Mode, *, batch: int = 2, groups: int = 2) -> Inputs:
    """Inputs by name, in float64, with 2 heads in each group. x, B and C are slices of one tensor."""
    height, width = size
    heads, channels, state, routes = 2 * groups, 5, 3, len(routes_of(mode))
    generator = torch.Generator().manual_seed(height * width + routes)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    slices = (heads * channels, groups * state, groups * state)
    x, B, C = normal(batch, height, width, sum(slices)).split(slices, dim=-1)
    return {
        "x": x.unflatten(-1, (heads, channels)),
        "dt": 0.3 * normal(batch, height, width, routes, heads).abs(),
        "A": -normal(routes, heads).exp(),
        "B": B.unflatten(-1, (groups, state)),
        "C": C.unflatten(-1, (groups, state)),
        "D": normal(heads),
    }


def visits(route: str, height: int, width: int) -> list[tuple[int, int]]:
    """(row, column) of all positions in the order in which a route visits a map, found by sorting."""
    base = route.removesuffix("_flip")

    def key(at: tuple[int, int]) -> tuple[int, ...]:
        if base == "h":
            return at
        if base == "v":
            return at[::-1]
        size = int(base[1:])
        return (at[0] // size, at[1] // size, *at)

    everywhere = [(row, column) for row in range(height) for column in range(width)]
    return sorted(everywhere, key=key, reverse=route.endswith("_flip"))


def walk(inputs: Inputs, mode: Mode, visible: Tensor | None = None) -> Tensor:
    """y of the map, (B, Y, X, H, P), one position after the other; 0 where a position is hidden.

    Args:
        inputs: Inputs by name, in float64.
        mode: The routes.
        visible: Which positions each image shows, (B, Y, X), bool; None for all.
    """
    x, dt, A, B, C, D = inputs.values()
    batch, height, width, heads, _ = x.shape
    group = torch.arange(heads) * B.shape[3] // heads
    y = [[[D[:, None] * x[b, row, column] for column in range(width)] for row in range(height)] for b in range(batch)]
    for k, route in enumerate(routes_of(mode)):
        for b in range(batch):
            state = x.new_zeros(heads, B.shape[4], x.shape[4])
            for row, column in visits(route, height, width):
                if visible is not None and not visible[b, row, column]:
                    continue
                step, here = dt[b, row, column, k], (b, row, column)
                written = B[here][group, :, None] * x[here][:, None, :] * step[:, None, None]
                state = (step * A[k]).exp()[:, None, None] * state + written
                y[b][row][column] = y[b][row][column] + torch.einsum("hn,hnp->hp", C[here][group], state)
    result = torch.stack([torch.stack([torch.stack(row) for row in image]) for image in y])
    return result if visible is None else result * visible[..., None, None]


def compare(given: Inputs, y: Tensor, exact: Inputs, truth: Tensor) -> None:
    """Compare y and the gradients of the inputs with the truth and those of the same numbers in float64.

    Args:
        given: The operation's inputs, which require gradients.
        y: Its result.
        exact: The same inputs in float64, which require gradients.
        truth: The result of the walk from them.
    """
    dtype = given["x"].dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert y.dtype == wide and y.shape == truth.shape
    assert error(y, truth.detach(), truth.detach()) <= TOLERANCES[wide]  # y is not rounded to x's dtype
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ours = torch.autograd.grad(y, list(given.values()), dy.to(wide))
    theirs = torch.autograd.grad(truth, list(exact.values()), dy)
    for (name, leaf), gradient, expected in zip(given.items(), ours, theirs, strict=True):
        assert gradient.dtype == leaf.dtype
        assert error(gradient, expected, expected) <= TOLERANCES[dtype], name


def as_leaves(inputs: Inputs, dtype: torch.dtype) -> tuple[Inputs, Inputs]:
    """Inputs in the dtypes that an operation reads, and the same numbers in float64; both require gradients."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    given = {name: t.to(dtype if name in ("x", "B", "C") else wide) for name, t in inputs.items()}
    return leaves_of(given), leaves_of({name: t.double() for name, t in given.items()})
