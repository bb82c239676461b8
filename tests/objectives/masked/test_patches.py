"""Patches of images, and the draw of the hidden ones."""

import pytest
import torch

from ssmpretrain.objectives.masked.patches import on_pixels, patchify, random_mask, unit_in_patches, unpatchify

CPU = torch.device("cpu")


def seed(number: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(number)


@pytest.mark.parametrize(
    ("grid", "ratio", "K"),
    [((14, 14), 0.75, 49), ((4, 4), 0.75, 4), ((2, 5), 0.99, 1), ((5, 2), 0.01, 9), ((1, 2), 0.5, 1)],
)
def test_kept_patches_ascend_and_are_the_ones_not_hidden(grid: tuple[int, int], ratio: float, K: int) -> None:
    mask = random_mask(50, grid, ratio, CPU, seed())
    assert mask.keep.shape == (50, K) and mask.hidden.shape == (50, grid[0] * grid[1])
    assert (mask.keep.diff(dim=1) > 0).all()
    assert not mask.hidden.gather(1, mask.keep).any() and (~mask.hidden).sum() == 50 * K


def test_every_patch_is_hidden_equally_often() -> None:
    share = random_mask(4000, (2, 4), 0.75, CPU, seed()).hidden.float().mean(dim=0)
    assert share == pytest.approx(torch.full((8,), 0.75), abs=0.03)  # 4 standard deviations of 0.0068


def test_units_are_hidden_as_a_whole() -> None:
    mask = random_mask(20, (4, 6), 0.6, CPU, seed(), unit=2)
    squares = mask.hidden.view(20, 2, 2, 3, 2).transpose(2, 3).flatten(3).float().mean(dim=3)
    assert set(squares.flatten().tolist()) == {0.0, 1.0}
    assert (squares.sum(dim=(1, 2)) == 4).all()  # 0.6 of 6, rounded
    assert mask.keep.shape == (20, 8)


def test_patches_are_raster_order_and_come_back() -> None:
    picture = torch.randn(2, 3, 64, 32, generator=seed())
    patches = patchify(picture, 16)
    assert patches.shape == (2, 8, 768)
    assert torch.equal(patches[1, 3].reshape(16, 16, 3), picture[1, :, 16:32, 16:32].permute(1, 2, 0))
    assert torch.equal(unpatchify(patches, 16, (64, 32)), picture)


def test_mask_on_pixels_covers_the_hidden_patches() -> None:
    hidden = torch.zeros(1, 6, dtype=torch.bool)
    hidden[0, 4] = True
    pixels = on_pixels(hidden, (2, 3), 8)
    assert pixels.shape == (1, 1, 16, 24) and pixels.sum() == 64 and pixels[0, 0, 8:, 8:16].all()


def test_unit_that_is_no_multiple_of_the_patch_is_refused_with_one_that_is() -> None:
    assert unit_in_patches("MAE", None, 16) == 1 and unit_in_patches("MAE", 32, 16) == 2
    with pytest.raises(ValueError, match=r"multiple of the encoder.s patch, 16 pixels; got 40\. Set it to 32"):
        unit_in_patches("MAE", 40, 16)
