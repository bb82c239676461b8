"""No door lets weights through that are not numbers."""

from pathlib import Path

import pytest
import torch

import ssmpretrain
from ssmpretrain.encoders.weights.finite_check import check_finite
from ssmpretrain.encoders.weights.formats import FORMATS

BAD = "layers.1.mixer.in_proj.weight"


def spoiled(value: float) -> torch.nn.Module:
    model = ssmpretrain.create_encoder("test_vim", num_classes=3, img_size=32)
    with torch.no_grad():
        model.get_parameter(BAD)[0, :2] = value
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float64])
def test_values_are_counted_and_named(dtype: torch.dtype) -> None:
    nan = torch.tensor([1.0, float("nan"), float("nan"), 2.0]).to(dtype)
    with pytest.raises(ValueError, match=r"there: .* in a file 2 of 4 values of w are NaN or infinite\. Its training"):
        check_finite("there", {"good": torch.ones(3, dtype=dtype), "w": nan, "step": 3}, "a file")


def test_large_and_infinite_values_are_told_apart() -> None:
    largest = torch.full((4,), torch.finfo(torch.float32).max)
    check_finite("there", {"w": largest, "count": torch.tensor(3), "empty": torch.zeros(0)}, "a file")
    check_finite("there", {"w": torch.empty(2, device="meta")}, "a file")
    opposite = torch.tensor([float("inf"), float("-inf")])
    with pytest.raises(ValueError, match=r"2 of 2 values of v .* and some of 1 more tensors\. Say so\."):
        check_finite("there", {"w": largest, "v": opposite, "u": opposite}, "a file", "Say so.")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_no_encoder_comes_from_a_file_with_such_weights(value: float, tmp_path: Path) -> None:
    torch.save({"model": spoiled(value).state_dict()}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=rf"load_encoder: .*weights\.pth 2 of 4,096 values of {BAD} are NaN"):
        ssmpretrain.load_encoder(tmp_path / "weights.pth")
    torch.save(spoiled(value).state_dict(), tmp_path / "plain.pth")
    with pytest.raises(ValueError, match=rf"create_encoder: .*plain\.pth 2 of 4,096 values of {BAD} are NaN"):
        ssmpretrain.create_encoder("test_vim", num_classes=3, img_size=32, checkpoint_path=str(tmp_path / "plain.pth"))


def test_a_head_that_is_left_out_may_hold_them(tmp_path: Path) -> None:
    model = ssmpretrain.create_encoder("test_vim", num_classes=3)
    torch.nn.init.constant_(model.head.weight, float("nan"))
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    assert ssmpretrain.load_encoder(tmp_path / "weights.pth", num_classes=0).load_report.fresh == ()


@pytest.mark.parametrize("format", FORMATS)
def test_no_format_writes_such_weights(format: str, tmp_path: Path) -> None:
    path = tmp_path / {
        "safetensors": "a.safetensors",
        "official": "a.pth",
        "torch_export": "a.pt2",
        "onnx": "a.onnx",
    }.get(format, "a")
    with pytest.raises(ValueError, match=rf"save_encoder: .* in test_vim 2 of 4,096 values of {BAD} .* Nothing was"):
        ssmpretrain.save_encoder(spoiled(float("nan")), path, format)
    assert not list(tmp_path.iterdir())
