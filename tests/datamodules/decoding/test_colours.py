"""Hue and blur, compared with torchvision's functions on uint8 and with definitions in float64."""

import colorsys
import math

import pytest
import torch
from torchvision.transforms.v2 import functional as F

from ssmpretrain.datamodules.decoding import colours

GENERATOR = torch.Generator().manual_seed(5)
NOISE = torch.randint(0, 256, (3, 24, 37), dtype=torch.uint8, generator=GENERATOR)
CORNERS = torch.tensor([[0, 0, 0], [255, 255, 255], [255, 0, 0], [0, 255, 255], [7, 7, 7], [128, 127, 128]])
IMAGE = torch.cat([NOISE, CORNERS.to(torch.uint8).T[:, :, None].expand(3, 6, 37)], dim=1)


@pytest.mark.parametrize("turns", [-0.5, -0.1, 0.0, 0.03, 0.1, 0.5])
def test_the_hue_turns_as_in_torchvision_and_as_colorsys_defines_it(turns: float) -> None:
    ours = colours.turn_hue(IMAGE, turns)
    off = (ours.int() - F.adjust_hue(IMAGE, turns).int()).abs()
    assert off.max() <= 1 and off.float().mean() < 2e-3
    for place in range(0, 24 * 37, 31):
        pixel = IMAGE.flatten(1)[:, place].tolist()
        hue, saturation, value = colorsys.rgb_to_hsv(*(level / 255 for level in pixel))
        exact = colorsys.hsv_to_rgb((hue + turns) % 1, saturation, value)
        for level, fraction in zip(ours.flatten(1)[:, place].tolist(), exact, strict=True):
            assert level in {math.floor(255.999 * fraction + slip) for slip in (-1e-3, 1e-3)}


@pytest.mark.parametrize("sigma", [1e-300, 0.1, 0.5, 1.3, 2.0])
def test_the_blur_is_a_convolution_with_a_gaussian_of_reflected_borders(sigma: float) -> None:
    reach = max(1, math.ceil(5 * sigma))
    places = torch.arange(-reach, reach + 1, dtype=torch.float64)
    kernel = torch.exp(-0.5 * (places / sigma) ** 2)
    kernel = torch.outer(kernel, kernel) / kernel.sum() ** 2
    padded = torch.nn.functional.pad(IMAGE.double()[:, None], [reach] * 4, mode="reflect")
    exact = torch.nn.functional.conv2d(padded, kernel[None, None])[:, 0]
    assert (colours.blur(IMAGE, sigma).double() - exact).abs().max() <= 0.5 + 255 * 1.3e-4  # rounding, and the tails


def test_a_blur_is_cut_to_a_small_image() -> None:
    for height, width in ((1, 1), (1, 5), (3, 2)):
        small = NOISE[:, :height, :width]
        assert colours.blur(small, 2.0).shape == small.shape
    assert torch.equal(colours.blur(NOISE[:, :1, :1], 2.0), NOISE[:, :1, :1])
