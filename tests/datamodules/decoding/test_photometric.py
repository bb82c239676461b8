"""Jitter with hue, grayscale, blur and solarising, as published augmentations state them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageOps
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from ssmpretrain.base.seeds import random_state_kept, seed_transforms
from ssmpretrain.datamodules import ImageShards
from ssmpretrain.datamodules.decoding.photometric import Photometric

CLIP_MAMBA = Photometric(
    brightness=0.4,
    contrast=0.4,
    saturation=0.2,
    hue=0.1,
    jitter_probability=0.8,
    grayscale_probability=0.2,
    blur_probability=0.1,
    solarize_probability=0.2,
)
IMAGE = torch.randint(0, 256, (3, 20, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))


def applied(policy: Photometric, number: int, image: torch.Tensor = IMAGE) -> torch.Tensor:
    with random_state_kept():
        seed_transforms(number)
        return policy(image)


def test_the_published_policy_is_torchvisions_own_steps_with_its_random_numbers() -> None:
    theirs = v2.Compose(
        [
            v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
            v2.RandomApply([v2.Grayscale(3)], p=0.2),
            v2.RandomApply([v2.GaussianBlur(17, (0.1, 2.0))], p=0.1),
            v2.RandomApply([v2.RandomSolarize(128, p=1)], p=0.2),
        ]
    )
    for number in range(60):
        with random_state_kept():
            seed_transforms(number)
            expected = theirs(IMAGE)
        off = (applied(CLIP_MAMBA, number).int() - expected.int()).abs()
        assert off.max() <= 1 and off.float().mean() < 1e-2  # rounding of hue and blur


def test_solarising_is_that_of_pillow() -> None:
    expected = F.pil_to_tensor(ImageOps.solarize(Image.fromarray(IMAGE.permute(1, 2, 0).numpy())))
    assert torch.equal(applied(Photometric(solarize_probability=1), 0), expected)


@pytest.mark.parametrize(
    ("name", "happened"),
    [
        ("grayscale", lambda image: torch.equal(image[0], image[1])),
        ("blur", lambda image: image.float().std() < 0.9 * IMAGE.float().std()),
        ("solarize", lambda image: image.max() < 128),
    ],
)
def test_a_step_happens_as_often_as_it_says(name: str, happened: Callable[[torch.Tensor], bool]) -> None:
    policy = Photometric(**{f"{name}_probability": 0.3}, blur_sigma=(1.0, 2.0))
    count = sum(bool(happened(applied(policy, number))) for number in range(300))
    assert 65 <= count <= 115  # 90 expected, three deviations


def test_nothing_is_done_by_default() -> None:
    assert torch.equal(applied(Photometric(), 0), IMAGE)


def test_a_blur_that_is_wider_than_the_image_is_cut_to_it() -> None:
    small = IMAGE[:, :3, :2].contiguous()
    assert applied(Photometric(blur_probability=1, blur_sigma=(2.0, 2.0)), 0, small).shape == small.shape


def images(folder: Path, **options: Any) -> dict[str, torch.Tensor]:
    options = {"batch_size": 4, "num_workers": 0, "image_size": 16, "horizontal_flip": False, **options}
    loader = ImageShards(f"{folder}/train-*.tar", **options).train_dataloader()
    loader.sampler.set_epoch(0)
    return {key: image for batch in loader for key, image in zip(batch["key"], batch["image"], strict=True)}


def test_the_policy_of_a_data_module_changes_colours_and_not_the_crop(make_shards) -> None:
    folder = make_shards([8, 8])
    plain, again, two = (images(folder, photometric=Photometric(solarize_probability=1)), *(
        images(folder, photometric=CLIP_MAMBA, num_workers=workers) for workers in (0, 2)))  # fmt: skip
    assert all(torch.equal(again[key], two[key]) for key in again)
    assert any(not torch.equal(plain[key], again[key]) for key in plain)
    inverted = images(folder)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    for key, image in inverted.items():
        pixels = ((image * std + mean) * 255).round()
        expected = torch.where(pixels >= 128, 255 - pixels, pixels)
        assert torch.equal(((plain[key] * std + mean) * 255).round(), expected)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"hue": 0.6}, "hue is in [0, 0.5]; got 0.6"),
        ({"contrast": float("nan")}, "contrast is a number of at least 0; got nan"),
        ({"brightness": float("inf")}, "brightness is a number of at least 0; got inf"),
        ({"blur_probability": 1.5}, "blur_probability is in [0, 1]; got 1.5"),
        ({"blur_sigma": [2.0, 1.0]}, "blur_sigma is (least, most) with 0 < least <= most; got [2.0, 1.0]"),
    ],
)
def test_an_argument_out_of_range_is_named(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError) as error:
        Photometric(**options)
    assert str(error.value) == f"Photometric: {words}. Correct it in data.photometric or data.views."


def test_two_statements_of_the_jitter_are_refused() -> None:
    with pytest.raises(ValueError, match="both set the jitter; one of them is left out"):
        ImageShards("a.tar", color_jitter=0.4, photometric=CLIP_MAMBA)
