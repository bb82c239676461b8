"""RoIAlign on a pyramid: which map a box reads, and torchvision's values with scales that are not guessed."""

import torch
from torchvision.ops import MultiScaleRoIAlign

from ssmpretrain.objectives.dense.detectors.roi_align import PyramidAlign

STRIDES = [4, 8, 16, 32]


def square(side: float) -> torch.Tensor:
    return torch.tensor([[0.0, 0.0, side, side]])


def test_a_box_reads_the_map_that_suits_its_size() -> None:
    align = PyramidAlign(STRIDES, 7, 2, aligned=False)
    levels = [int(align.levels(square(side))) for side in (1, 111, 112, 223, 224, 447, 448, 2000)]
    assert levels == [0, 0, 1, 1, 2, 2, 3, 3]
    assert int(PyramidAlign([2, 4, 8, 16], 7, 2, False).levels(square(224))) == 3  # maps of a patch of 8


def test_features_equal_torchvisions_where_it_guesses_the_scales_rightly() -> None:
    torch.manual_seed(0)
    maps = [torch.randn(2, 3, 256 // s, 256 // s) for s in STRIDES]
    boxes = [torch.tensor([[10.0, 20, 60, 70], [0, 0, 250, 240]]), torch.tensor([[5.0, 5, 130, 140]])]
    theirs = MultiScaleRoIAlign(["0", "1", "2", "3"], 7, 2)(
        {str(i): one for i, one in enumerate(maps)}, boxes, [(256, 256)] * 2
    )
    torch.testing.assert_close(PyramidAlign(STRIDES, 7, 2, aligned=False)(maps, boxes), theirs)


def test_scales_do_not_depend_on_the_first_batch() -> None:
    align, maps = PyramidAlign(STRIDES, 2, 0, aligned=True), [torch.ones(1, 1, 16 // i, 16 // i) for i in (1, 2, 4, 8)]
    maps[0][..., 8:] = 3  # the right half of an image of 64, of which 40 pixels are no padding
    assert align(maps, [torch.tensor([[36.0, 4, 40, 8]])]).unique().tolist() == [3.0]


def test_aligned_boxes_are_half_a_position_to_the_left_and_up() -> None:
    ramp = [torch.arange(16.0).expand(1, 1, 16, 16)] * 4
    box = [torch.tensor([[16.0, 16, 24, 24]])]  # centre at 20, position 5; a cell's centre is at 0.5
    means = [PyramidAlign(STRIDES, 1, 0, aligned)(ramp, box).item() for aligned in (False, True)]
    assert means == [5.0, 4.5]


def test_no_boxes_give_no_features() -> None:
    maps = [torch.ones(2, 3, 16 // i, 16 // i) for i in (1, 2, 4, 8)]
    assert PyramidAlign(STRIDES, 7, 0, True)(maps, [torch.zeros(0, 4)] * 2).shape == (0, 3, 7, 7)
