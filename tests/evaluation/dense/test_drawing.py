"""Drawn predictions: sizes, colours, and inputs that must not break a picture."""

import numpy as np
import pytest
import torch
from torch import Tensor

from ssmpretrain.base.errors import UserError
from ssmpretrain.evaluation.dense import class_colours, draw_detections, draw_segmentation, paste_masks

GREY = torch.full((3, 320, 400), 128, dtype=torch.uint8)
NAMES = ["sky", "sea", "sand"]


def has_colour(picture: Tensor, colour: tuple[int, ...]) -> bool:
    return bool((picture == torch.tensor(colour, dtype=torch.uint8).view(3, 1, 1)).all(0).any())


def test_colour_of_a_class_does_not_depend_on_the_number_of_classes() -> None:
    assert class_colours(150)[:20] == class_colours(20)
    assert len(set(class_colours(150))) == 150


def test_class_map_is_drawn_over_the_image_with_a_legend_of_its_classes() -> None:
    classes = torch.zeros(320, 400, dtype=torch.long)
    classes[:, 200:] = 2
    picture = draw_segmentation(GREY, classes, NAMES)
    assert picture.dtype == torch.uint8 and picture.shape[2] == 2 * 400 + 3 * 12
    sky, sea, sand = class_colours(3)
    assert has_colour(picture, sky) and has_colour(picture, sand) and not has_colour(picture, sea)
    middle = picture[:, 25 + 160]  # a row of both panels, without the title above them
    expected = [round(128 * 0.4 + part * 0.6) for part in sky]
    assert middle[:, 12 + 50].tolist() == [128] * 3 and middle[:, 12 + 400 + 12 + 50].tolist() == expected
    assert middle[:, 12 + 400 + 12 + 199].tolist() == [255] * 3  # the line between the two classes


def test_pixels_to_ignore_stay_blank() -> None:
    picture = draw_segmentation(GREY, torch.full((320, 400), 255), NAMES)
    assert torch.equal(picture[:, 25:345, 12:412], picture[:, 25:345, 424:824])


def test_labels_get_a_panel_and_their_classes_stand_in_the_legend() -> None:
    picture = draw_segmentation(GREY, torch.zeros(320, 400).long(), NAMES, truth=torch.ones(320, 400).long())
    assert picture.shape[2] == 3 * 400 + 4 * 12
    assert has_colour(picture, class_colours(3)[1])


def test_objects_are_drawn_with_box_and_mask() -> None:
    boxes = torch.tensor([[40.0, 60, 200, 220]])
    masks = paste_masks(torch.ones(1, 28, 28), boxes, 320, 400)
    pictures = [
        draw_detections(GREY, boxes, torch.tensor([0.9]), torch.tensor([1]), shapes, NAMES) for shapes in (None, masks)
    ]
    colour = class_colours(3)[1]
    for picture in pictures:
        assert picture[:, 25 + 100, 424 + 40].tolist() == list(colour)  # left side of the box
    inside = [picture[:, 25 + 140, 424 + 120].tolist() for picture in pictures]
    assert inside == [[128] * 3, [round(128 * 0.5 + part * 0.5) for part in colour]]


def test_small_images_are_enlarged_and_large_ones_reduced() -> None:
    none = (torch.zeros(0, 4), torch.zeros(0), torch.zeros(0).long(), [], NAMES)
    assert draw_detections(torch.zeros(3, 32, 64, dtype=torch.uint8), *none).shape[2] == 2 * 640 + 36
    assert draw_detections(torch.zeros(3, 1000, 4096, dtype=torch.uint8), *none).shape[2] == 2 * 1024 + 36
    assert draw_detections(torch.zeros(3, 1, 9000, dtype=torch.uint8), *none).shape[2] == 2 * 1024 + 36


def test_boxes_outside_long_names_and_crowds_break_nothing() -> None:
    boxes = torch.tensor([[-50.0, -50, 900, 900], [390.0, 310, 400, 320], [5.0, 5, 5, 5]])
    names = ["\x1b[31mred" * 20, "größe", ""]
    truth = {"objects": [{"category": 0, "bbox": [1, 2, 3, 4], "iscrowd": 1}]}
    picture = draw_detections(GREY, boxes, torch.tensor([0.3, 0.9, 0.5]), torch.tensor([0, 1, 2]), None, names, truth)
    assert picture.shape[2] == 3 * 400 + 4 * 12
    np.testing.assert_array_equal(picture[:, 25:345, 12:412], GREY)  # the image itself stays as it is


def test_a_mistake_is_named() -> None:
    with pytest.raises(UserError, match=r"uint8; got \(3, 320, 400\), torch.float32. Undo the normalisation"):
        draw_segmentation(GREY.float(), torch.zeros(320, 400).long(), NAMES)
    with pytest.raises(UserError, match=r"\(320, 400\); got \(400, 320\)"):
        draw_segmentation(GREY, torch.zeros(400, 320).long(), NAMES)
