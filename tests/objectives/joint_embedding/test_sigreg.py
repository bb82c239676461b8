"""SIGReg: values and gradients by hand, its scale, its directions, half precision, memory."""

import math

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from ssmpretrain.base.errors import UserError
from ssmpretrain.objectives.joint_embedding.sigreg import random_slices, sigreg

CPU = torch.device("cpu")


def statistic_by_hand(z: Tensor, slices: Tensor, num_knots: int, knot_range: float) -> tuple[float, Tensor]:
    """The mean statistic over views and slices, and its gradient, from numbers alone, one term after the other."""
    views, images, _ = z.shape
    dt, total, gradient = knot_range / (num_knots - 1), 0.0, torch.zeros_like(z)
    for view in range(views):
        for direction in slices.T:
            x = [float(one @ direction) for one in z[view]]
            for j in range(num_knots):
                t = j * dt
                phi = math.exp(-(t**2) / 2)
                weight = dt * phi * (1 if j in (0, num_knots - 1) else 2)
                real = sum(math.cos(t * one) for one in x) / images - phi
                imaginary = sum(math.sin(t * one) for one in x) / images
                total += images * weight * (real**2 + imaginary**2)
                for n, one in enumerate(x):
                    slope = 2 * weight * t * (imaginary * math.cos(t * one) - real * math.sin(t * one))
                    gradient[view, n] += slope * direction
    count = views * slices.shape[1]
    return total / count, gradient / count


@pytest.mark.parametrize(("num_knots", "knot_range"), [(17, 3.0), (2, 1.0), (5, 5.0)])
def test_value_and_gradient_are_those_worked_by_hand_in_float64(num_knots: int, knot_range: float) -> None:
    drawn = torch.Generator().manual_seed(0)
    z = torch.randn(2, 5, 3, generator=drawn, dtype=torch.float64).requires_grad_()
    slices = random_slices(3, 4, step=7, device=CPU).double()
    ours = sigreg(z, slices, num_knots, knot_range)
    (gradient,) = torch.autograd.grad(ours, z)
    value, slope = statistic_by_hand(z.detach(), slices, num_knots, knot_range)
    assert ours.item() == pytest.approx(value, rel=1e-13)
    torch.testing.assert_close(gradient, slope, rtol=1e-12, atol=1e-14)


def test_one_view_may_be_given_alone_and_shapes_that_do_not_fit_are_refused() -> None:
    z, slices = torch.randn(5, 3), random_slices(3, 4, step=0, device=CPU)
    assert torch.equal(sigreg(z, slices), sigreg(z[None], slices))
    for wrong in (z[0], z[:, :2], z.long()):
        with pytest.raises(UserError, match=r"got z \("):
            sigreg(wrong, slices)


def test_gradient_is_that_of_finite_differences() -> None:
    z = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
    slices = random_slices(3, 2, step=0, device=CPU).double()
    assert torch.autograd.gradcheck(lambda z: sigreg(z, slices, 5, 2.0), z)


@pytest.mark.parametrize("images", [64, 512])
def test_a_gaussian_gives_about_1_and_a_point_a_share_of_the_images(images: int) -> None:
    """The values of a Gaussian and of its multiples were computed elsewhere, for 64 dimensions."""
    z = torch.randn(1, images, 64, generator=torch.Generator().manual_seed(0))
    slices = random_slices(64, 1024, step=0, device=CPU)
    assert 0.95 < sigreg(z, slices) < 1.2
    for factor, share in ((0.0, 0.402), (0.1, 0.388), (3.0, 0.52)):
        assert float(sigreg(factor * z, slices)) / images == pytest.approx(share, rel=0.04), factor
    far = torch.full((1, images, 64), 10.0)
    assert sigreg(far, slices) > 3 * images


def test_half_precision_is_computed_in_float32() -> None:
    z = torch.randn(2, 256, 64, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
    slices = random_slices(64, 256, step=0, device=CPU)
    expected = sigreg(z.detach().double(), slices)
    with torch.autocast("cpu", torch.bfloat16):
        value = sigreg(z, slices)
    value.backward()
    assert value.dtype == torch.float32 and z.grad is not None and z.grad.dtype == torch.bfloat16
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)


def test_directions_have_length_1_and_are_new_in_each_step_and_the_same_again() -> None:
    state = torch.get_rng_state()
    first, again, other = (random_slices(8, 5, step, CPU) for step in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(first.norm(dim=0), torch.ones(5))
    assert torch.equal(first, again) and not torch.isclose(first, other).any()


def saved_bytes(num_knots: int) -> int:
    """Bytes of the tensors that the backward pass keeps, for 2 x 512 projections on 64 slices."""
    z, slices = torch.randn(2, 512, 8, requires_grad=True), random_slices(8, 64, step=0, device=CPU)
    kept: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel() * tensor.element_size())
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        sigreg(z, slices, num_knots)
    return sum(kept)


def test_the_backward_pass_keeps_the_projections_once_whatever_the_number_of_knots() -> None:
    projections = 4 * 2 * 512 * 64
    assert saved_bytes(5) < 1.2 * projections and saved_bytes(17) < 1.3 * projections
