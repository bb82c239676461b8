"""Pyramids between encoder and detector: strides, sizes, and which encoder they fit."""

import pytest
import torch

from ssmpretrain.objectives.dense.detectors.neck import FromOneMap, TopDown, build_neck
from ssmpretrain.objectives.dense.detectors.settings import Neck

CHANNELS, STRIDES = [8, 16, 32, 64], [4, 8, 16, 32]


def test_a_pyramid_gets_one_or_two_coarser_maps() -> None:
    neck = build_neck(Neck(width=12), CHANNELS, STRIDES, one_stage=False)
    assert isinstance(neck, TopDown) and neck.strides == [4, 8, 16, 32, 64] and neck.multiple == 32
    neck = build_neck(Neck(width=12), CHANNELS[1:], STRIDES[1:], one_stage=True)
    assert neck.strides == [8, 16, 32, 64, 128]


def test_one_map_gives_five_strides() -> None:
    neck = build_neck(Neck(width=12), [32], [16], one_stage=False)
    assert isinstance(neck, FromOneMap) and neck.strides == [4, 8, 16, 32, 64] and neck.multiple == 32
    assert build_neck(Neck(width=12), [32], [16], one_stage=True).strides == [8, 16, 32, 64, 128]
    assert build_neck(Neck(width=12), [32], [8], one_stage=False).strides == [2, 4, 8, 16, 32]


@pytest.mark.parametrize("one_stage", [False, True])
@pytest.mark.parametrize("strides", [STRIDES, [16]])
def test_maps_have_one_width_and_the_sizes_of_their_strides_and_stay_float32(
    strides: list[int], one_stage: bool
) -> None:
    taken = strides[1:] if one_stage and len(strides) > 1 else strides
    neck = build_neck(Neck(width=12), [32] * len(taken), taken, one_stage)
    with torch.autocast("cpu", torch.bfloat16):
        maps = neck([torch.randn(1, 32, -(-96 // s), -(-160 // s)) for s in taken])
    assert [tuple(one.shape) for one in maps] == [(1, 12, -(-96 // s), -(-160 // s)) for s in neck.strides]
    assert {one.dtype for one in maps} == {torch.float32}
    sum(one.sum() for one in maps).backward()
    assert all(parameter.grad is not None for parameter in neck.parameters())


@pytest.mark.parametrize(
    ("name", "strides", "one_stage", "message"),
    [
        ("simple_pyramid", STRIDES, False, "reads one map; got 4.*Set model.neck.name to fpn or auto"),
        ("auto", [16, 16], False, "reads one map; got 2.*Name one block in model.taps.indices"),
        ("fpn", [16], False, "fpn reads maps whose strides double.*Set model.neck.name to simple_pyramid or auto"),
        ("fpn", [4, 16], False, r"got \[4, 16\]. Name all stages in model.taps.indices"),
        ("fpn", STRIDES, True, "retinanet and fcos read maps from stride 8"),
    ],
)
def test_a_pyramid_that_does_not_fit_the_encoder_is_refused(
    name: str, strides: list[int], one_stage: bool, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        build_neck(Neck(name=name, width=8), [8] * len(strides), strides, one_stage)  # type: ignore[arg-type]
