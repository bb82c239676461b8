"""Pasted masks against torchvision's."""

import math
import tracemalloc

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.models.detection.roi_heads import paste_masks_in_image

from ssmpretrain.base.errors import UserError
from ssmpretrain.evaluation.dense import paste_masks
from ssmpretrain.evaluation.dense.masks import decode_mask


def drawn(seed: int, count: int = 8) -> tuple[Tensor, Tensor, int, int]:
    """Small masks, every other one binary, and boxes, of which some lie partly outside an image."""
    noise = torch.Generator().manual_seed(seed)
    height, width = (int(side) for side in torch.randint(20, 90, (2,), generator=noise))
    corner = torch.rand(count, 2, generator=noise) * torch.tensor([width + 10.0, height + 10.0]) - 20
    boxes = torch.cat([corner, corner + torch.rand(count, 2, generator=noise) * 60], dim=1)
    masks = torch.rand(count, 28, 28, generator=noise)
    masks[::2] = masks[::2].round()
    return masks, boxes, height, width


def overlaps(box: Tensor, height: int, width: int) -> bool:
    """Whether torchvision can paste a mask: it fails at a box beside the image."""
    return bool(box[0] < width - 2 and box[1] < height - 2 and box[2] > 2 and box[3] > 2)


def test_pixels_are_torchvisions_also_for_boxes_partly_outside() -> None:
    outside = 0
    for seed in range(60):
        masks, boxes, height, width = drawn(seed)
        codes = paste_masks(masks, boxes, height, width)
        for mask, box, code in zip(masks, boxes, codes, strict=True):
            assert code["size"] == [height, width]
            if overlaps(box, height, width):
                expected = paste_masks_in_image(mask[None, None], box[None], (height, width))[0, 0] > 0.5
                np.testing.assert_array_equal(decode_mask(code), expected.numpy())
                outside += bool(box.min() < 0)
    assert outside > 50


def test_a_full_mask_fills_its_box() -> None:
    (code,) = paste_masks(torch.ones(1, 28, 28), torch.tensor([[10.0, 20, 40, 60]]), 100, 80)
    rows, columns = np.nonzero(decode_mask(code))
    found = [columns.min(), rows.min(), columns.max(), rows.max()]
    assert found == pytest.approx([10, 20, 40, 60], abs=1)  # the border of the small mask may add a pixel
    assert len(rows) >= 30 * 40


@pytest.mark.parametrize("box", [[200.0, 5, 230, 20], [-90.0, 5, -60, 20], [5.0, 300, 20, 320], [5.0, -90, 20, -60]])
def test_a_box_beside_the_image_has_an_empty_mask(box: list[float]) -> None:
    (code,) = paste_masks(torch.ones(1, 28, 28), torch.tensor([box]), 100, 80)
    assert code["size"] == [100, 80] and not decode_mask(code).any()


def test_a_box_without_width_has_a_mask() -> None:
    (code,) = paste_masks(torch.ones(1, 28, 28), torch.tensor([[10.0, 10, 10, 30]]), 100, 80)
    assert 0 < decode_mask(code).sum() <= 2 * 25


def test_no_mask_gives_no_code() -> None:
    assert paste_masks(torch.zeros(0, 28, 28), torch.zeros(0, 4), 100, 80) == []


def test_low_precision_is_lifted() -> None:
    masks, boxes, height, width = drawn(1)
    low = masks.bfloat16()
    assert paste_masks(low, boxes, height, width) == paste_masks(low.float(), boxes, height, width)


def test_memory_is_that_of_one_mask() -> None:
    masks, boxes = torch.rand(50, 28, 28), torch.tensor([[0.0, 0, 639, 479]]).repeat(50, 1)
    paste_masks(masks[:1], boxes[:1], 480, 640)
    tracemalloc.start()
    paste_masks(masks, boxes, 480, 640)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 * 480 * 640  # a stack of the masks would be 50 * 480 * 640 bytes


@pytest.mark.parametrize(
    ("masks", "boxes", "message"),
    [
        (torch.zeros(2, 1, 28, 28), torch.zeros(2, 4), "channel axis"),
        (torch.zeros(2, 28, 28), torch.zeros(1, 4), r"\(2, 28, 28\) and \(1, 4\)"),
        (torch.full((1, 28, 28), math.nan), torch.zeros(1, 4), "finite"),
        (torch.zeros(1, 28, 28), torch.tensor([[0, 0, math.inf, 1]]), "finite"),
        (torch.zeros(1, 28, 28), torch.tensor([[0, 0, 1e6, 1e6]]), "Scale the boxes to the image"),
    ],
)
def test_a_mistake_is_named(masks: Tensor, boxes: Tensor, message: str) -> None:
    with pytest.raises(UserError, match=message):
        paste_masks(masks, boxes, 100, 80)
