"""Image and class map change together, and as the published pipeline does."""

from typing import Any

import numpy as np
import pytest
import torch

from ssmpretrain.base.errors import DataError
from ssmpretrain.datamodules.targets.distortion import Distortion
from ssmpretrain.datamodules.targets.padding import stack_images, stack_maps
from ssmpretrain.datamodules.targets.resizing import fitted_size, resize_map
from ssmpretrain.datamodules.targets.segmentation_transforms import (
    EvalSegmentation,
    SegmentationAugmentation,
    TrainSegmentation,
)


def transform(crop: int, short: int, **settings: Any) -> TrainSegmentation:
    settings = {"distortion": None, "scale": (1.0, 1.0), **settings}
    return TrainSegmentation(SegmentationAugmentation(**settings), (crop, crop), (short, 4 * short), antialias=False)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((512, 683), (512, 683)),
        ((256, 341), (512, 682)),
        ((300, 1500), (410, 2048)),  # the long side decides: 2048 / 1500 = 1.3653
        ((1, 20000), (1, 2048)),
        ((683, 512), (683, 512)),
    ],
)
def test_the_short_side_is_512_unless_the_long_one_passes_2048(
    size: tuple[int, int], expected: tuple[int, int]
) -> None:
    assert fitted_size(size, 512, 2048) == expected


def test_a_class_map_takes_the_nearest_pixel_centre() -> None:
    row = torch.tensor([[0, 1, 2, 3, 4]], dtype=torch.uint8)
    assert resize_map(row, (1, 3)).tolist() == [[0, 2, 4]]
    assert resize_map(row, (2, 10)).tolist() == [[0, 0, 1, 1, 2, 2, 3, 3, 4, 4]] * 2


def test_image_and_class_map_stay_aligned() -> None:
    classes = torch.arange(6, dtype=torch.uint8).repeat_interleave(8).repeat(40, 1)  # columns of 8 pixels
    image = (classes * 40).expand(3, -1, -1)
    augment = transform(24, 40, scale=(0.5, 2.0), redraws=0)
    flipped = set()
    for seed in range(20):
        changed, mask = augment(image, classes, seed)
        assert changed.shape[1:] == mask.shape and max(mask.shape) <= 24
        inner = mask[:, 1:-1] == mask[:, :-2]  # away from edges, where bilinear mixes two classes
        inner &= mask[:, 1:-1] == mask[:, 2:]
        assert torch.equal(changed[0][:, 1:-1][inner], (mask[:, 1:-1] * 40)[inner])
        flipped.add(bool(mask[0, 0] > mask[0, -1]))
    assert flipped == {False, True}


def test_the_result_depends_on_the_seed_alone() -> None:
    image = torch.randint(0, 256, (3, 40, 50), dtype=torch.uint8)
    classes = torch.randint(0, 3, (40, 50), dtype=torch.uint8)
    augment = transform(24, 32, scale=(0.5, 2.0), distortion=Distortion())
    first = augment(image, classes, 7)
    torch.manual_seed(1)
    np.random.seed(1)
    again = augment(image, classes, 7)
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    assert not torch.equal(first[0], augment(image, classes, 8)[0])


def test_a_crop_of_one_class_is_drawn_again() -> None:
    classes = torch.zeros(16, 160, dtype=torch.uint8)
    classes[:, 72:88] = 1
    classes[:, :40] = 255  # unlabelled pixels do not count
    image = torch.zeros(3, 16, 160, dtype=torch.uint8)

    def mixed(**settings: Any) -> int:
        augment = transform(16, 40, horizontal_flip=False, **settings)  # 160 is the longest side: no resizing
        masks = [augment(image, classes, seed)[1] for seed in range(100)]
        labelled = [mask[mask < 255] for mask in masks]
        return sum(0.25 < float(part.float().mean()) < 0.75 for part in labelled if len(part))

    # Of 145 places, 2 * 7 show 5 to 11 columns of each class, a tenth; one of eleven draws does with chance 0.67.
    assert mixed(redraws=0) < 30 and 50 < mixed(redraws=10) < 90 and mixed(redraws=1000) == 100


def test_what_is_smaller_than_the_crop_is_padded_at_the_right_and_below() -> None:
    mean, std = torch.full((3, 1, 1), 100.0), torch.full((3, 1, 1), 50.0)
    images = [torch.full((3, 2, 3), 200, dtype=torch.uint8), torch.full((3, 3, 2), 50, dtype=torch.uint8)]
    stacked, size = stack_images(images, mean, std, least=(4, 3))
    assert stacked[:, 0].tolist() == [
        [[2.0, 2.0, 2.0], [2.0, 2.0, 2.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]],
        [[-1.0, -1.0, 0.0], [-1.0, -1.0, 0.0], [-1.0, -1.0, 0.0], [0.0, 0.0, 0.0]],
    ]
    assert size.tolist() == [[2, 3], [3, 2]]
    maps = [torch.ones(2, 3, dtype=torch.uint8), torch.zeros(3, 2, dtype=torch.uint8)]
    assert stack_maps(maps, (3, 3), 255).tolist() == [
        [[1, 1, 1], [1, 1, 1], [255, 255, 255]],
        [[0, 0, 255], [0, 0, 255], [0, 0, 255]],
    ]


def test_evaluation_resizes_and_crops_nothing() -> None:
    image, mask = torch.zeros(3, 20, 30, dtype=torch.uint8), torch.zeros(20, 30, dtype=torch.uint8)
    resized, classes = EvalSegmentation((40, 160), antialias=False)(image, mask, 0)
    assert resized.shape == (3, 40, 60) and classes.shape == (40, 60)


@pytest.mark.parametrize(
    ("settings", "change"),
    [
        ({"brightness": 32.0}, lambda image, result: (result - image).flatten().unique()),
        ({"contrast": (0.5, 0.5)}, lambda image, result: (result / image).flatten().unique()),
    ],
)
def test_brightness_adds_and_contrast_multiplies(settings: dict[str, Any], change: Any) -> None:
    nothing = {"brightness": 0.0, "contrast": (1.0, 1.0), "saturation": (1.0, 1.0), "hue": 0.0, "probability": 1.0}
    image = torch.full((3, 4, 4), 100, dtype=torch.uint8)
    image[1] = 60
    result = Distortion(**{**nothing, **settings})(image, np.random.default_rng(0))
    found = change(image.float(), result.float())
    assert len(found) == 1 and float(found) not in (0.0, 1.0)


def test_saturation_and_hue_are_those_of_hsv() -> None:
    import colorsys

    nothing = {"brightness": 0.0, "contrast": (1.0, 1.0), "saturation": (1.0, 1.0), "hue": 0.0, "probability": 1.0}
    image = torch.randint(0, 256, (3, 5, 5), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    image[:, 0, 0] = 90  # grey has no saturation to change
    image[:, 0, 1] = 0
    before = [colorsys.rgb_to_hsv(*pixel) for pixel in (image.flatten(1).T / 255).tolist()]
    more = Distortion(**{**nothing, "saturation": (1.4, 1.4)})(image, np.random.default_rng(0))
    expected = [colorsys.hsv_to_rgb(h, min(1, 1.4 * s), v) for h, s, v in before]
    assert (more.flatten(1).T - torch.tensor(expected) * 255).abs().max() <= 1
    turned = Distortion(**{**nothing, "hue": 36.0})(image, np.random.default_rng(0))
    angle = {
        round(((colorsys.rgb_to_hsv(*pixel)[0] - h) * 360 + 180) % 360 - 180, -1)
        for pixel, (h, s, v) in zip((turned.flatten(1).T / 255).tolist(), before, strict=True)
        if s * v > 0.5
    }
    assert len(angle) == 1 and 0 < abs(angle.pop()) <= 40


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (SegmentationAugmentation, {"scale": (2.0, 0.5)}, "scale is"),
        (SegmentationAugmentation, {"category_ratio": 0}, "category_ratio is"),
        (SegmentationAugmentation, {"redraws": -1}, "redraws is"),
        (SegmentationAugmentation, {"resize": (512,)}, "resize is"),
        (Distortion, {"hue": 200}, "hue is in degrees"),
        (Distortion, {"contrast": (0, 1)}, "contrast is"),
        (Distortion, {"probability": 2}, "probability is"),
    ],
)
def test_settings_out_of_range_are_refused(kind: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        kind(**settings)
