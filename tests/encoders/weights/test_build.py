"""What a file says of its encoder is checked against what it holds, at once and without memory."""

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import ssmpretrain
from ssmpretrain.encoders.weights.preprocessing import images_of

BUILT = {"embed_dim": 32, "depth": 2, "img_size": 64}


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    return ssmpretrain.create_encoder("test_vim", num_classes=0, **BUILT).state_dict()


def said(path: Path, tensors: Any, **about: Any) -> str:
    """What is said of a file with these tensors that says this of itself; "" where it is loaded."""
    about = {"encoder": {"name": "test_vim", "args": BUILT}, **about}
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(tensors, path, {"ssmpretrain": json.dumps(about)})
    else:
        torch.save({"state_dict": tensors, **about}, path)
    try:
        ssmpretrain.load_encoder(path)
    except ValueError as error:
        return str(error)
    return ""


@pytest.fixture(params=["x.safetensors", "x.ckpt"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tmp_path / request.param


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ({}, ""),
        ({"pretrained": True}, ""),  # as a run that began with timm's weights says
        ({"depth": 10**9}, "depth is at most the number of tensors in the file, "),
        ({"depth": 10**300}, "depth is at most the number of tensors in the file, "),
        ({"img_size": 10**6}, "img_size is at most 8,192; "),
        ({"img_size": [64, 10**6]}, "img_size is at most 8,192; "),
        ({"d_state": 10**9}, "d_state is at most 65,536; "),
        ({"embed_dim": 8_000}, " says that its encoder is test_vim, of "),
        ({"embed_dim": 60_000}, "Vim: embed_dim is at most 16,384; got 60,000"),
        ({"expand": 1e9}, "Vim: expand * embed_dim is at most 16,384"),
        ({"expand": 1e300}, " says that its encoder is test_vim and how it was built, and so it cannot be built ("),
        ({"embed_dim": "wide"}, " says that its encoder is test_vim and how it was built, and so it cannot be built ("),
        ({"name": "vim"}, " says that its encoder is test_vim and how it was built, and so it cannot be built ("),
    ],
)
def test_sizes_that_the_tensors_cannot_fill_are_refused(
    args: dict[str, Any], expected: str, path: Path, tensors: Any
) -> None:
    message = said(path, tensors, encoder={"name": "test_vim", "args": {**BUILT, **args}})
    assert expected in message and (not expected or str(path) in message)


@pytest.mark.parametrize("args", [[1], 3, "x"])
def test_arguments_come_by_name(args: Any, path: Path, tensors: Any) -> None:
    message = said(path, tensors, encoder={"name": "test_vim", "args": args})
    assert f"the arguments of the encoder test_vim in {path} are a dictionary by name; got {args!r}" in message


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("size", "x"), ("size", [32]), ("size", [10**9, 32]), ("size", [0, 32]), ("size", [True, 32]), ("mean", 3),
        ("mean", ["a", "b", "c"]), ("mean", []), ("std", [1, 0, 1]), ("std", [1, float("inf"), 1]), ("crop_pct", "x"),
        ("crop_pct", float("nan")), ("interpolation", 3), ("eval_size", [64]), ("eval_size", [64, 0]), ("antialias", 1),
    ],
)  # fmt: skip
def test_images_of_another_kind_are_refused(name: str, value: Any, path: Path, tensors: Any) -> None:
    images = images_of(ssmpretrain.create_encoder("test_vim", img_size=64))
    assert said(path, tensors, images=images) == ""
    assert f"the entry images.{name} of {path} is " in said(path, tensors, images={**images, name: value})


@pytest.mark.parametrize("about", ["[1]", "3", "null", '"x"', "{", "[" * 10_000])
def test_a_description_of_another_kind_is_refused(about: str, tmp_path: Path, tensors: Any) -> None:
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file(tensors, path, {"ssmpretrain": about})
    with pytest.raises(ValueError, match="is damaged or no safetensors file"):
        ssmpretrain.load_encoder(path)


@pytest.mark.parametrize("name", ["layers.{}.mixer.A_log", "layers.{}.blocks.0.op.A_logs", "layers.0.blocks.{}.op.Ds"])
@pytest.mark.parametrize("number", ["1000000000", "9" * 5000])
def test_names_that_count_blocks_which_are_not_there_are_refused(name: str, number: str, tmp_path: Path) -> None:
    torch.save({name.format(number): torch.ones(2, 2), "norm.weight": torch.ones(2)}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"blocks are numbered from 0 on; .*x.pth names 'layers.* among 2 tensors"):
        ssmpretrain.load_encoder(tmp_path / "x.pth")
