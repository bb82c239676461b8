"""Images changed together with their objects: numbers by hand, boxes of masks, crowds and thin masks."""

from typing import Any

import numpy as np
import pytest
import torch

from ssmpretrain.base.errors import DataError
from ssmpretrain.datamodules.targets import LargeScaleJitter, MultiScaleResize
from ssmpretrain.datamodules.targets.detection_transforms import EvalDetection, TrainDetection
from ssmpretrain.datamodules.targets.framing import Frame
from ssmpretrain.datamodules.targets.run_lengths import encode_mask


def thing(mask: np.ndarray, category: int = 0, crowd: int = 0) -> dict[str, Any]:
    rows, columns = np.nonzero(mask)
    x, y = (int(each.min()) if each.size else 0 for each in (columns, rows))
    width, height = (int(np.ptp(each)) + 1 if each.size else 1 for each in (columns, rows))
    return {
        "category": category, "bbox": [x, y, width, height], "area": float(mask.sum()), "iscrowd": crowd,
        "segmentation": encode_mask(mask),
    }  # fmt: skip


def rectangle(h: int, w: int, x1: int, y1: int, x2: int, y2: int) -> np.ndarray:
    mask = np.zeros((h, w), dtype=bool)
    mask[y1:y2, x1:x2] = True
    return mask


def frame(*things: dict[str, Any], h: int = 10, w: int = 20) -> Frame:
    image = torch.zeros(3, h, w, dtype=torch.uint8)
    return Frame(image, {"height": h, "width": w, "objects": list(things)}, antialias=False)


def test_a_flip_by_hand() -> None:
    one = frame(thing(rectangle(10, 20, 2, 3, 6, 8)))
    one.flip()
    objects = one.objects(masks=True)
    assert objects["boxes"].tolist() == [[14, 3, 18, 8]]
    assert (objects["masks"][0].numpy() == rectangle(10, 20, 14, 3, 18, 8)).all()


def test_a_resize_by_hand() -> None:
    one = frame(thing(rectangle(10, 20, 2, 3, 6, 8)))
    one.resize((20, 60))
    objects = one.objects(masks=True)
    assert one.image.shape == (3, 20, 60) and objects["boxes"].tolist() == [[6, 6, 18, 16]]
    assert (objects["masks"][0].numpy() == rectangle(20, 60, 6, 6, 18, 16)).all()


def test_a_crop_gives_the_box_of_the_pixels_that_are_left() -> None:
    mask = rectangle(10, 20, 2, 3, 6, 8)
    mask[:7, 4:6] = False  # an L: below y = 7 it is 4 wide, above it 2
    one = frame(thing(mask), thing(rectangle(10, 20, 15, 0, 20, 2), 1), thing(rectangle(10, 20, 0, 0, 20, 4), 2, 1))
    one.crop(0, 1, 6, 10)
    objects = one.objects(masks=True)
    assert objects["boxes"].tolist() == [[1, 3, 3, 6], [0, 0, 10, 4]]  # the box alone would be [1, 3, 5, 6]
    assert objects["classes"].tolist() == [0, 2] and objects["crowd"].tolist() == [False, True]
    assert (objects["masks"][0].numpy() == rectangle(6, 10, 1, 3, 3, 6)).all()
    assert one.objects(masks=False)["boxes"].tolist() == [[1, 3, 5, 6], [0, 0, 10, 4]]


def test_without_a_crop_the_box_is_that_of_the_annotation() -> None:
    drawn = {**thing(rectangle(10, 20, 2, 3, 6, 8)), "bbox": [1.5, 2.5, 5, 30]}
    assert frame(drawn).objects(masks=True)["boxes"].tolist() == [[1.5, 2.5, 6.5, 10]]


def test_masks_of_one_pixel_have_a_box_and_empty_masks_are_left_out() -> None:
    one = frame(thing(rectangle(10, 20, 7, 4, 8, 5)), thing(np.zeros((10, 20), bool)))
    one.crop(0, 0, 10, 19)
    objects = one.objects(masks=True)
    assert objects["boxes"].tolist() == [[7, 4, 8, 5]] and objects["masks"].sum() == 1


def test_a_mask_that_vanishes_when_it_becomes_smaller_is_left_out() -> None:
    one = frame(thing(rectangle(10, 20, 4, 4, 5, 5)), thing(rectangle(10, 20, 10, 0, 20, 10), 1))
    one.resize((2, 4))
    assert one.objects(masks=True)["classes"].tolist() == [1]


def test_an_image_without_objects_stays_one() -> None:
    one = frame()
    one.flip()
    one.resize((30, 30))
    one.crop(5, 5, 10, 10)
    objects = one.objects(masks=True)
    assert {name: tuple(values.shape) for name, values in objects.items()} == {
        "boxes": (0, 4), "classes": (0,), "crowd": (0,), "masks": (0, 10, 10),
    }  # fmt: skip


def scenes(rng: np.random.Generator) -> dict[str, Any]:
    h, w = (int(side) for side in rng.integers(10, 60, 2))
    masks = [rng.random((h, w)) < 0.02 for _ in range(6)]
    return {"height": h, "width": w, "objects": [thing(mask, k, k % 2) for k, mask in enumerate(masks) if mask.any()]}


MULTI = MultiScaleResize(
    short_sides=[20, 30], longest=50, crop_probability=1.0, crop_short_sides=[25], crop_sides=(10, 25)
)


@pytest.mark.parametrize("augmentation", [LargeScaleJitter(), MULTI])
def test_masks_lie_in_their_boxes_whatever_is_drawn(augmentation: Any) -> None:
    rng = np.random.default_rng(0)
    is_cut = isinstance(augmentation, LargeScaleJitter)
    transform = TrainDetection(augmentation, (32, 32) if is_cut else None, False, True)
    total = 0
    for seed in range(60):
        annotation = scenes(rng)
        image = torch.zeros(3, annotation["height"], annotation["width"], dtype=torch.uint8)
        image, objects = transform(image, annotation, seed)
        h, w = image.shape[1:]
        if is_cut:
            assert h <= 32 and w <= 32
        for box, mask in zip(objects["boxes"], objects["masks"], strict=True):
            rows, columns = mask.nonzero().T
            tight = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            assert (torch.stack(tight[:2]) >= box[:2] - 1).all() and (torch.stack(tight[2:]) <= box[2:] + 1).all()
            assert (box[2:] > box[:2]).all()
            total += 1
    assert total > 100


def test_the_result_depends_on_the_seed_alone() -> None:
    annotation = scenes(np.random.default_rng(3))
    image = torch.randint(0, 255, (3, annotation["height"], annotation["width"]), dtype=torch.uint8)
    transform = TrainDetection(LargeScaleJitter(), (32, 32), False, True)
    torch.manual_seed(0)
    first = transform(image, annotation, 7)
    torch.manual_seed(1)
    np.random.seed(1)  # the global generator must not matter
    again, other = transform(image, annotation, 7), transform(image, annotation, 8)
    assert torch.equal(first[0], again[0]) and torch.equal(first[1]["boxes"], again[1]["boxes"])
    assert first[0].shape != other[0].shape or not torch.equal(first[0], other[0])


def test_evaluation_resizes_and_cuts_nothing() -> None:
    image, annotation = torch.zeros(3, 10, 20, dtype=torch.uint8), thing(rectangle(10, 20, 2, 3, 6, 8))
    whole, objects = EvalDetection((30, 50), False)(image, {"height": 10, "width": 20, "objects": [annotation]}, 0)
    assert whole.shape == (3, 25, 50) and objects["boxes"].tolist() == [[5, 7.5, 15, 20]] and "masks" not in objects


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: LargeScaleJitter(scale=(0, 1)), "scale is"),
        (lambda: LargeScaleJitter(scale=(2, 1)), "scale is"),
        (lambda: LargeScaleJitter(scale=(0.1, float("nan"))), "scale is"),
        (lambda: MultiScaleResize(short_sides=[]), "short_sides are a list"),
        (lambda: MultiScaleResize(short_sides=[0]), "short_sides are a list"),
        (lambda: MultiScaleResize(short_sides=[2000]), "longest is at least"),
        (lambda: MultiScaleResize(crop_probability=1.5), r"crop_probability is in \[0, 1\]"),
        (lambda: MultiScaleResize(crop_sides=(9, 3)), "crop_sides is"),
    ],
)
def test_a_wrong_setting_gives_one_message(make: Any, text: str) -> None:
    with pytest.raises(DataError, match=text):
        make()
