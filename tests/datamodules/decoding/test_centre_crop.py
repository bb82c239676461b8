"""The centre crop of long images, against torchvision's resize and crop."""

import random
import resource

import pytest
import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from ssmpretrain.datamodules.decoding.centre_crop import strip_of_resized
from ssmpretrain.datamodules.decoding.transform import ImageTransform


def noise(h: int, w: int, *, extreme: bool = False) -> Tensor:
    """Return an image with the memory layout of the decoder."""
    generator = torch.Generator().manual_seed(h + w)
    image = torch.randint(0, 256, (h, w, 3), dtype=torch.uint8, generator=generator).permute(2, 0, 1)
    return (image > 127).to(torch.uint8) * 255 if extreme else image


def differing(crop: Tensor, image: Tensor, resized: tuple[int, int], size: tuple[int, int], mode: str) -> int:
    whole = F.resize(image, list(resized), InterpolationMode(mode), antialias=True)
    difference = (crop.int() - F.center_crop(whole, list(size)).int()).abs()
    if mode == "bilinear" and torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        difference -= 1  # torchvision resizes in floating point there
    return int((difference > 0).sum())


@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
def test_the_strip_has_the_pixels_of_the_whole(mode: str) -> None:
    draw = random.Random(0)
    for _ in range(250):
        short, long = draw.choice([1, 2, 3, 7, 31, 100, 250]), draw.choice([1, 5, 17, 100, 333, 1000, 2003])
        side = draw.choice([8, 24, 33, 100])
        resized, size = (side, min(round(side * max(1, long / short)), 4000)), (draw.randint(side // 2, side),) * 2
        image, extreme = (short, long), draw.random() < 0.5
        if draw.random() < 0.5:
            resized, image = resized[::-1], image[::-1]
        pixels = noise(*image, extreme=extreme)
        crop = strip_of_resized(pixels, resized, size, InterpolationMode(mode))
        assert crop.shape == (3, *size)
        assert differing(crop, pixels, resized, size, mode) == 0, (image, resized, size)


@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [(24, 24), (16, 40)])
def test_evaluation_of_a_long_image_sees_the_pixels_of_torchvision(size: tuple[int, int], mode: str) -> None:
    transform = ImageTransform(size, None, False, 0.875, mode)
    for shape in ((3000, 1), (1, 3000), (2999, 7), (11, 3001), (40, 9000), (9001, 41)):
        image, resized = noise(*shape), transform._resized(*shape)
        assert differing(transform(image, seed=0), image, resized, size, mode) == 0, shape


@pytest.mark.parametrize("shape", [(20_000, 1), (1, 20_000), (10_000_000, 2), (3, 10_000_000)])
def test_a_long_image_takes_no_more_memory_than_itself(shape: tuple[int, int]) -> None:
    transform, image = ImageTransform((224, 224), None, False, 0.875), noise(*shape)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert transform(image, seed=0).shape == (3, 224, 224)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB; the whole would be 4 GB
