"""The projector of LeJEPA and its batch normalisation."""

import pytest
import torch
from torch import nn

from ssmpretrain.objectives.joint_embedding.projector import GlobalBatchNorm, Projector


def test_batch_norm_has_the_values_and_gradients_of_torchs() -> None:
    drawn = torch.Generator().manual_seed(0)
    x = (3 + 2 * torch.randn(7, 5, generator=drawn, dtype=torch.float64)).requires_grad_()
    ours, theirs = GlobalBatchNorm(5).double(), nn.BatchNorm1d(5).double()
    for norm in (ours, theirs):
        with torch.no_grad():
            norm.weight.copy_(torch.arange(1, 6))
            norm.bias.copy_(torch.arange(5))
    slope = torch.randn(7, 5, generator=drawn, dtype=torch.float64)
    results = []
    for norm in (ours, theirs):
        y = norm(x)
        results.append((y, *torch.autograd.grad((y * slope).sum(), [x, norm.weight, norm.bias])))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-13)


def test_half_precision_is_normalised_in_float32_also_far_from_zero() -> None:
    x = (100 + torch.randn(512, 3, generator=torch.Generator().manual_seed(0))).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        y = GlobalBatchNorm(3)(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), nn.BatchNorm1d(3)(x.float()), rtol=0.01, atol=0.01)


def test_evaluation_takes_the_statistics_of_the_batch_too() -> None:
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    norm = GlobalBatchNorm(3)
    assert torch.equal(norm(x), norm.eval()(x)) and not list(norm.buffers())


@pytest.mark.parametrize("hidden", [[64], [64, 128]])
def test_projections_start_with_a_mean_square_of_1(hidden: list[int]) -> None:
    torch.manual_seed(0)
    projector = Projector(32, hidden, 64)
    z = projector(torch.randn(512, 32))
    assert z.shape == (512, 64) and 0.8 < z.square().mean() < 1.25
    assert [type(one).__name__ for one in projector][-1] == "Linear" and len(projector) == 3 * len(hidden) + 1
