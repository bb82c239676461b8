"""`erf` from its command line, and the figure that it draws."""

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from ssmpretrain.commands.erf import draw_fields
from ssmpretrain.encoders import create_encoder
from ssmpretrain.encoders.features.receptive_field import ReceptiveField, smallest_square

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(call: Run, image_folder: Path) -> Run:
    """Exit code, standard output and our own lines of standard error of `erf`."""
    return partial(call, "erf")


def sides(out: str) -> dict[str, list[int]]:
    """Title to the sides of the three squares, as printed."""
    rows = [line for line in out.splitlines() if " training " in line]
    return {" ".join(row.split()[:2]): [int(side) for side in re.findall(r"(\d+) px", row)] for row in rows}


def test_a_run_folder_gives_both_fields_at_the_size_of_training(run: Run, run_folder: Path) -> None:
    code, out, message = run(run_folder, "--num-images", "3")
    assert (code, message) == (0, "")
    assert "erf.png: effective receptive field of test_vim, 3 images of 32 x 32" in out
    found = sides(out)
    assert list(found) == ["before training", "after training"]
    assert all(0 < row[0] <= row[1] <= row[2] <= 32 for row in found.values())
    with Image.open("erf.png") as figure:
        assert round(figure.info["dpi"][0]) == 300 and figure.width > 1200


def test_named_images_are_used_and_no_more_than_asked_for(run: Run, run_folder: Path) -> None:
    _, out, _ = run(run_folder, "images", "--num-images", "4")
    assert "4 images" in out
    _, out, _ = run(run_folder, "images/1.png", "images", "--out", "b.png")
    assert "11 images" in out


def save_pth(name: str) -> str:
    torch.save({"model": create_encoder(name, num_classes=0).state_dict()}, f"{name}.pth")
    return f"{name}.pth"


def save_safetensors(name: str) -> str:
    encoder = create_encoder(name, num_classes=0)
    save_file(encoder.state_dict(), f"{name}.safetensors", {"encoder": json.dumps({"name": name, "args": {}})})
    return f"{name}.safetensors"


@pytest.mark.parametrize(
    ("save", "name"),
    [
        (save_pth, "test_vmamba"),
        (save_safetensors, "test_vim"),
        (save_safetensors, "test_mambaout"),
        (save_safetensors, "test_vit"),
        (save_safetensors, "test_convnext"),
    ],
)
def test_any_file_of_weights_will_do_at_any_size(save: Callable[[str], str], name: str, run: Run) -> None:
    torch.manual_seed(0)
    code, out, message = run(save(name), "--image-size", "96", "--num-images", "1")
    assert (code, message) == (0, "")
    assert f"effective receptive field of {name}, 1 images of 96 x 96" in out


def test_fresh_weights_are_drawn_before_and_those_of_the_file_after(run: Run) -> None:
    torch.manual_seed(0)
    encoder = create_encoder("test_vmamba", num_classes=0)
    torch.save({"model": encoder.state_dict()}, "a.pth")
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if name.endswith("out_proj.weight"):
                parameter.zero_()  # no scan reaches the residual stream
            elif parameter.shape[2:] == (3, 3):
                parameter[:, :, [0, 0, 0, 1, 1, 2, 2, 2], [0, 1, 2, 0, 2, 0, 1, 2]] = 0  # kernels see their middle
    torch.save({"model": encoder.state_dict()}, "b.pth")
    first = sides(run("a.pth", "--num-images", "2", "--image-size", "64")[1])
    second = sides(run("b.pth", "--num-images", "2", "--image-size", "64", "--out", "b.png")[1])
    assert first["before training"] == second["before training"]
    assert first["after training"][2] > 32
    assert second["after training"] == [32, 32, 32]  # pixel (32, 32) alone counts; the centre is (48, 48)


def test_panels_show_the_logarithm_over_its_maximum_in_pixels_and_outline_the_squares() -> None:
    contributions = torch.zeros(32, 48, dtype=torch.float64)
    contributions[16, 24], contributions[15, 23] = 99.0, 9.0  # log10 of 1 + these: 2 and 1
    fields = {title: ReceptiveField(contributions * scale, (16.0, 24.0)) for title, scale in (("a", 1), ("b", 7))}
    squares = {title: [smallest_square(field, share) for share in (0.2, 0.5, 0.9)] for title, field in fields.items()}
    figure = draw_fields(fields, squares)
    first, second = figure.axes[:2]
    picture = np.asarray(first.images[0].get_array())
    assert picture[16, 24] == 1.0 and picture[15, 23] == pytest.approx(0.5) and picture.sum() == pytest.approx(1.5)
    assert np.asarray(second.images[0].get_array()).max() == 1.0
    for axis in (first, second):
        assert axis.images[0].get_clim() == (0, 1) and axis.images[0].get_extent() == [0, 48, 32, 0]
        assert [(box.get_x(), box.get_y(), box.get_width()) for box in axis.patches] == [(23, 15, 2)] * 3
        assert axis.get_xlabel().splitlines()[0] == "20% in 2 px (0.3%)"
    assert [axis.get_title() for axis in (first, second)] == ["a", "b"]


MISTAKES = {
    "missing checkpoint": (["gone.pth"], ["no such file", "gone.pth"]),
    "image size that does not fit": (["RUN", "--image-size", "100"], ["multiples of 8", "100 x 100", "96"]),
    "no image size": (["RUN", "--image-size", "0"], ["image_size", "0"]),
    "no images": (["RUN", "--num-images", "0"], ["--num-images", "0"]),
    "missing image": (["RUN", "images/77.png"], ["images/77.png"]),
    "wrong ending": (["RUN", "--out", "erf.npy"], ["erf.npy", ".png or .pdf"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gets_one_short_message_and_exit_code_2(mistake: str, run: Run, run_folder: Path) -> None:
    given, expected = MISTAKES[mistake]
    code, out, message = run(*(str(run_folder) if word == "RUN" else word for word in given))
    assert (code, out) == (2, "")
    assert message.count("\n") == 0 and len(message) < 500
    for part in expected:
        assert part in message
