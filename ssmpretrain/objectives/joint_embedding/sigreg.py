"""SIGReg: the distance of a batch of vectors to a standard Gaussian, along random directions.

Legend: V views, N images of all ranks, B images of this rank, K width, S slices, J knots
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ssmpretrain.base.errors import UserError
from ssmpretrain.base.seeds import stable_hash
from ssmpretrain.training.ranks.sums import sum_over_ranks


def sigreg(z: Tensor, slices: Tensor, num_knots: int = 17, knot_range: float = 3.0) -> Tensor:
    """Compute `N sum_j w_j [(mean cos t_j x - phi_j)^2 + (mean sin t_j x)^2]`, averaged over slices x and views.

    This is the Epps-Pulley statistic: the squared difference between the characteristic function of the data and that
    of a standard Gaussian, `phi_j = exp(-t_j^2 / 2)`, integrated over `t` in [-knot_range, knot_range] with the weight
    `phi`. The integrand is even, so the knots `t_j` lie on [0, knot_range], `dt = knot_range / (num_knots - 1)` apart,
    and the trapezoid weights are doubled: `w_j = 2 dt phi_j` inside, `dt phi_j` at both ends. Mean 0 and variance 1 are
    part of the test; `z` is not standardised first.

    Values of the default knots: about 1 for Gaussian vectors, whatever N; 0.40 N if all vectors are zero; above N if
    all are one vector far from zero, and then the gradient is small.

    The means are over the images of all ranks, which may hold different numbers. Every rank gets the same value, and
    the average over ranks of the gradients, as DDP takes it, is the gradient of that value.

    Args:
        z: Vectors of each view, (V, B, K), or of one view, (B, K), floating point. Half precision is cast to float32.
        slices: Directions of length 1 as columns, (K, S), the same on every rank; see `random_slices`.
        num_knots: J, at least 2.
        knot_range: Greatest knot, above 0.

    Returns:
        The statistic, a scalar in float32, or float64 for float64.

    Raises:
        UserError: If the shapes do not fit, or a number is out of range.

    Source: Balestriero & LeCun, "LeJEPA" (arXiv:2511.08544), sec. 4. Epps & Pulley, "A test for normality based on the
        empirical characteristic function", Biometrika 70 (1983).
    """
    _check_shapes(z, slices)
    check_knots("sigreg", num_knots, knot_range)
    with torch.autocast(z.device.type, enabled=False):
        z = z.unsqueeze(0) if z.ndim == 2 else z
        z = z if z.dtype == torch.float64 else z.float()
        t = torch.linspace(0, knot_range, num_knots, dtype=z.dtype, device=z.device)
        phi = torch.exp(-t.square() / 2)
        weights = torch.full_like(t, 2 * knot_range / (num_knots - 1)) * phi
        weights[0] /= 2
        weights[-1] /= 2
        sums = _characteristic_sums(z @ slices.to(z), knot_range / (num_knots - 1), num_knots)  # (2, J, V, S)
        total = sum_over_ranks(torch.cat([sums.flatten(), sums.new_full((1,), z.shape[1])]))
        n = total[-1]
        real, imaginary = (total[:-1] / n).view_as(sums)
        error = (real - phi.view(-1, 1, 1)).square() + imaginary.square()
        statistic: Tensor = n * (weights.view(-1, 1, 1) * error).sum(0).mean()
        return statistic


def random_slices(width: int, num_slices: int, step: int, device: torch.device) -> Tensor:
    """Draw directions of length 1, uniform on the sphere, as columns (K, S), float32.

    They are a function of the step alone, so all ranks and a resumed run draw the same, and no global generator moves.

    Args:
        width: K, at least 1.
        num_slices: S, at least 1.
        step: Optimizer steps that were taken.
        device: Device of the generator and of the result.
    """
    generator = torch.Generator(device).manual_seed(stable_hash("sigreg", step))
    drawn = torch.randn(width, num_slices, device=device, generator=generator)
    unit: Tensor = drawn / torch.linalg.vector_norm(drawn, dim=0)
    return unit


def check_knots(where: str, num_knots: int, knot_range: float) -> None:
    """Raise a `UserError`, which begins with `where`, if `sigreg` cannot integrate over such knots."""
    if num_knots < 2 or not 0 < knot_range < math.inf:
        raise UserError(
            f"{where}: num_knots is at least 2, and knot_range is finite and above 0; got {num_knots} and "
            f"{knot_range}. Published are 17 and 3."
        )


def _check_shapes(z: Tensor, slices: Tensor) -> None:
    if z.ndim not in (2, 3) or slices.ndim != 2 or z.shape[-1] != len(slices) or not z.is_floating_point():
        raise UserError(
            "sigreg: z is (V, B, K) or (B, K), floating point, and slices are (K, S); got z "
            f"{tuple(z.shape)}, {z.dtype}, and slices {tuple(slices.shape)}."
        )


def _characteristic_sums(x: Tensor, step: float, num_knots: int) -> Tensor:
    """Sum `cos(j step x)` and `sin(j step x)` over the images for j = 0 ... J-1.

    Args:
        x: Values (V, B, S).

    Returns:
        Sums (2, J, V, S): cosines, then sines.
    """
    sums: Tensor = _CharacteristicSums.apply(x, step, num_knots)  # type: ignore[no-untyped-call]
    return sums


class _CharacteristicSums(torch.autograd.Function):
    """Sums of cosines and sines. Only `x` is saved: autograd would keep 2 J tensors of its size."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: float, num_knots: int) -> Tensor:
        ctx.save_for_backward(x)
        ctx.step = step
        sums = x.new_empty(2, num_knots, x.shape[0], x.shape[2])
        for j in range(num_knots):
            angle = x * (j * step)
            sums[0, j] = angle.cos().sum(1)
            sums[1, j] = angle.sin_().sum(1)
        return sums

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        of_x = torch.zeros_like(x)
        for j in range(1, gradient.shape[1]):  # the knot at 0 has no gradient
            t = j * ctx.step
            angle = x * t
            of_x.addcmul_(angle.cos(), t * gradient[1, j].unsqueeze(1))
            of_x.addcmul_(angle.sin_(), -t * gradient[0, j].unsqueeze(1))
        return of_x, None, None
