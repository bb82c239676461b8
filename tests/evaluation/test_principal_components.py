"""Principal components against NumPy's SVD and by hand, and their colours."""

import numpy as np
import pytest
import torch
from torch import Tensor

from ssmpretrain.evaluation.principal_components import component_colours, foreground, principal_components


def maps_of(*patches: list[list[float]]) -> Tensor:
    """Maps (B, D, 1, w) of patches with D features each."""
    return torch.tensor(patches).mT.unsqueeze(2)


def test_components_are_those_of_a_singular_value_decomposition() -> None:
    features = torch.randn(40, 7, generator=torch.Generator().manual_seed(0)) * torch.arange(1.0, 8.0)
    found = principal_components(features, 3)
    centred = features.double().numpy() - features.double().numpy().mean(0)
    left, values, _ = np.linalg.svd(centred, full_matrices=False)
    np.testing.assert_allclose(found.scores.abs().numpy(), np.abs(left * values)[:, :3], atol=1e-9)
    np.testing.assert_allclose(found.shares.numpy(), (values**2 / (values**2).sum())[:3], atol=1e-12)
    assert (found.scores.pow(3).mean(dim=0) > 0).all()


def test_the_sign_does_not_depend_on_the_order_of_the_images() -> None:
    features = torch.randn(50, 5, generator=torch.Generator().manual_seed(1)).exp()
    order = torch.randperm(50, generator=torch.Generator().manual_seed(2))
    here, there = principal_components(features, 3), principal_components(features[order], 3)
    torch.testing.assert_close(here.scores[order], there.scores)


def test_features_on_a_line_have_one_component() -> None:
    found = principal_components(torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 0.0]]), 3)
    third = 5 / 3
    torch.testing.assert_close(found.scores[:, 0], torch.tensor([-third, 2 * third, -third], dtype=torch.float64))
    assert found.scores[:, 1:].eq(0).all() and found.shares.tolist() == pytest.approx([1, 0, 0])


@pytest.mark.parametrize("shape", [(1, 4, 1, 1), (2, 4, 3, 3), (1, 2, 5, 1)])
def test_equal_patches_are_grey(shape: tuple[int, ...]) -> None:
    colours, shares = component_colours(torch.full(shape, 0.3))
    assert colours.shape == (shape[0], 3, *shape[2:]) and colours.eq(0.5).all() and shares.eq(0).all()


def test_colours_follow_the_components_of_all_images_together() -> None:
    first, second = [[0.0, 0.0], [10.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [10.0, 0.0], [0.0, 0.0]]
    colours, shares = component_colours(maps_of(first, second), cut=0.0)
    assert colours[0, 0].flatten().tolist() == pytest.approx([0, 1, 0], abs=0.02)  # red: the first feature
    assert torch.equal(colours[0].flip(-1), colours[1])
    assert colours[0, 2].eq(0.5).all() and shares[0] > 0.98  # there is no third feature


def test_outliers_do_not_take_the_contrast() -> None:
    values = [[float(number)] for number in range(100)] + [[1e6]]
    colours, _ = component_colours(maps_of(values), cut=0.02)
    red = colours[0, 0, 0].tolist()
    assert red[:3] == [0, 0, 0] and red[-3:] == [1, 1, 1] and red[50] == pytest.approx(0.5, abs=0.02)


def test_the_foreground_is_the_side_with_less_of_the_border() -> None:
    maps = torch.zeros(2, 3, 4, 4)
    maps[:, :, 1:3, 1:3] = 5
    assert torch.equal(foreground(maps), maps[:, 0] > 0) and torch.equal(foreground(-maps), maps[:, 0] > 0)
    colours, _ = component_colours(maps + torch.rand(maps.shape), foreground(maps))
    background = colours.permute(0, 2, 3, 1)[maps[:, 0] == 0]
    assert background.unique().tolist() == pytest.approx([0.93])


def test_equal_patches_are_all_foreground() -> None:
    assert foreground(torch.ones(1, 3, 2, 2)).all()
