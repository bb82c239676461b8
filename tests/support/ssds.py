"""Inputs of the SSD, an independent recurrence in float64 with all its gradients, and the comparison with it."""

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ssmpretrain.kernels.ssd import bidirectional_ssd, ssd

# Norm of the error over norm of the truth, which rounds nothing but the inputs. float32: sums of products, each
# rounded to 6e-8, exponentials good to 1e-7, and differences of both. Else: the result and the gradients of x, B, C and
# z are rounded to 2^-9 (bfloat16) or 2^-11 (float16), and a kernel may round what enters a matrix product.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 4e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}

KINDS = ("ahead", "back", "both")
Inputs = dict[str, Tensor]


class Sizes(NamedTuple):
    batch: int
    tokens: int
    heads: int
    channels: int
    groups: int
    state: int


SHAPES = [
    Sizes(2, 1, 3, 5, 1, 3),
    Sizes(1, 63, 4, 7, 2, 5),
    Sizes(2, 64, 6, 16, 3, 16),
    Sizes(1, 65, 5, 9, 5, 17),
    Sizes(2, 200, 3, 33, 1, 20),
]


def make_inputs(sizes: Sizes, kind: str = "both", *, large_steps: bool = False) -> Inputs:
    """Inputs by name, in float64. x, B and C are slices of one tensor, as a convolution leaves them."""
    batch, tokens, heads, channels, groups, state = sizes
    generator = torch.Generator().manual_seed(sum(sizes) + KINDS.index(kind))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def step() -> Tensor:
        uniform, choice = torch.rand(2, batch, tokens, heads, generator=generator, dtype=torch.float64)
        if not large_steps:
            return 0.001 + 0.2 * uniform
        return torch.where(choice < 0.3, 1000 * uniform, 0.1 * uniform)

    def decay() -> Tensor:
        return -1 - 15 * torch.rand(heads, generator=generator, dtype=torch.float64)

    sizes_of_slices = (heads * channels, groups * state, groups * state)
    x, B, C = normal(batch, tokens, sum(sizes_of_slices)).split(sizes_of_slices, dim=-1)
    inputs = {
        "x": x.unflatten(-1, (heads, channels)),
        "dt": step(),
        "A": decay(),
        "B": B.unflatten(-1, (groups, state)),
        "C": C.unflatten(-1, (groups, state)),
        "D": normal(heads),
        "z": normal(batch, tokens, heads, channels),
    }
    return {**inputs, "dt_backward": step(), "A_backward": decay()} if kind == "both" else inputs


def rounded(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    """Inputs in the dtypes that an operation reads: x, B, C and z in dtype, the rest in float32 (or float64)."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return {name: t.to(dtype if name in ("x", "B", "C", "z") else wide) for name, t in inputs.items()}


def run(kind: str, inputs: Inputs, **options: Any) -> Tensor:
    if kind == "both":
        return bidirectional_ssd(**inputs, **options)
    return ssd(**inputs, reverse=kind == "back", **options)


def recurrence(inputs: Inputs, kind: str, scale: float) -> tuple[Tensor, list[Tensor]]:
    """y in float64, one token after the other, and the logarithms of the decays of every direction."""
    x, B, C, D, z = (inputs.get(name) for name in ("x", "B", "C", "D", "z"))
    assert x is not None and B is not None and C is not None
    group = torch.arange(x.shape[2]) * B.shape[2] // x.shape[2]  # of every head
    B, C = B[:, :, group], C[:, :, group]
    directions = [("dt", "A", kind == "back")] + [("dt_backward", "A_backward", True)] * (kind == "both")
    y, logarithms = torch.zeros_like(x), []
    for dt_name, A_name, backward in directions:
        dt = inputs[dt_name]
        logarithms.append(dt * inputs[A_name])
        decay, state = logarithms[-1].exp(), x.new_zeros(x.shape[0], x.shape[2], B.shape[3], x.shape[3])
        reads = [torch.empty(0)] * x.shape[1]
        for t in range(x.shape[1])[:: -1 if backward else 1]:
            written = torch.einsum("bh,bhn,bhp->bhnp", dt[:, t], B[:, t], x[:, t])
            state = decay[:, t, :, None, None] * state + written
            reads[t] = torch.einsum("bhn,bhnp->bhp", C[:, t], state)
        y = y + scale * torch.stack(reads, 1)
    if D is not None:
        y = y + D[:, None] * x
    return y if z is None else y * z * z.sigmoid(), logarithms


def truth_of(inputs: Inputs, kind: str, dy: Tensor, scale: float) -> dict[str, tuple[Tensor, Tensor]]:
    """y and the gradient of every input, each with what its error is measured against.

    That is the value itself, but for A the sum of the absolute values of its terms: they have both signs and may cancel
    to any small number, which the rounding of a single term then exceeds.
    """
    leaves = {name: t.detach().double().requires_grad_() for name, t in inputs.items()}
    y, logarithms = recurrence(leaves, kind, scale)
    gradients = torch.autograd.grad(y, [*leaves.values(), *logarithms], dy.double())
    y = y.detach()
    found = {name: (g, g) for name, g in zip(leaves, gradients, strict=False)}
    for (dt, A), of_log in zip((("dt", "A"), ("dt_backward", "A_backward")), gradients[len(leaves) :], strict=False):
        found[A] = (found[A][0], (of_log * leaves[dt].detach()).abs().sum((0, 1)))
    return {"y": (y, y), **found}


class Case(NamedTuple):
    inputs: Inputs
    kind: str
    dy: Tensor
    truth: dict[str, tuple[Tensor, Tensor]]
    scale: float


def make_case(inputs: Inputs, kind: str, dtype: torch.dtype = torch.float32, scale: float = 0.5) -> Case:
    inputs = rounded(inputs, dtype)
    dy = torch.randn(inputs["x"].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    scale = scale if kind == "both" else 1.0
    return Case(inputs, kind, dy, truth_of(inputs, kind, dy, scale), scale)


@cache
def drawn_case(sizes: Sizes, kind: str, dtype: torch.dtype = torch.float32, large_steps: bool = False) -> Case:
    return make_case(make_inputs(sizes, kind, large_steps=large_steps), kind, dtype)


def leaves_of(inputs: Inputs) -> Inputs:
    return {name: t.detach().requires_grad_() for name, t in inputs.items()}


def compare(case: Case, **options: Any) -> None:
    """Compare y and the gradient of every input with the recurrence."""
    leaves = leaves_of(case.inputs)
    y = run(case.kind, leaves, **options)
    assert y.shape == case.dy.shape and y.dtype == leaves["x"].dtype and y.is_contiguous()
    check_against(case.truth, {**gradients_of(y, leaves, case.dy), "y": y})


def gradients_of(y: Tensor, leaves: Inputs, dy: Tensor) -> Inputs:
    gradients = torch.autograd.grad(y, list(leaves.values()), dy)
    for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True):
        assert gradient.dtype == leaf.dtype and gradient.shape == leaf.shape, name
    return dict(zip(leaves, gradients, strict=True))


def check_against(truth: dict[str, tuple[Tensor, Tensor]], found: Inputs) -> None:
    tolerance = TOLERANCES[found["x"].dtype]
    errors = {name: error(found[name], *truth[name]) for name in truth}
    assert all(e <= tolerance for e in errors.values()), f"an error is above {tolerance}: {errors}"


def error(ours: Tensor, truth: Tensor, measure: Tensor) -> float:
    scale = measure.norm() if measure.norm() > 0 else torch.ones(())
    return float((ours.detach().double() - truth).norm() / scale)
