"""`pca` from its command line, with an encoder whose features are the mean colours of patches."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mean_colour import paint, write_encoder
from PIL import Image

from ssmpretrain.commands import pca
from ssmpretrain.commands.feature_pictures.coloured_maps import ColouredMaps

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Call:
    """Run the command with the encoder, beside a folder `images` of two striped images; the figure is out.png."""
    monkeypatch.chdir(tmp_path)
    paint(tmp_path / "images" / "0.png", (0, 0, 0), (0, 0, 0), (200, 0, 0), (0, 100, 0))
    paint(tmp_path / "images" / "1.png", (0, 100, 0), (200, 0, 0), (0, 0, 0), (0, 0, 0))
    write_encoder(tmp_path / "encoder.pth")
    return lambda *words: call("pca", "encoder.pth", *words, "--out", "out.png", "--force", "--num-workers", 0)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Keep the arguments of the drawing."""
    kept: dict[str, Any] = {}
    original = pca.draw_components

    def draw(pictures: object, found: list[ColouredMaps], title: str, **options: object) -> object:
        kept.update(pictures=pictures, found=found, title=title, **options)
        return original(pictures, found, title, **options)

    monkeypatch.setattr(pca, "draw_components", draw)
    return kept


def test_the_same_patch_has_the_same_colour_in_every_image(run: Call, drawn: dict[str, Any]) -> None:
    code, out, message = run("images")
    assert (code, message) == (0, "")
    assert "out.png: Patch features of 2 images as colours" in out
    assert "mean_colour, encoder.pth; 4 x 4 patches, 83 + 17 + 0 % of the variance" in out
    colours = drawn["found"][0].colours
    assert colours.shape == (2, 3, 4, 4) and torch.equal(colours[0], colours[1].flip(-1))
    # By hand: the covariance of (red, green) is [[0.75, -0.125], [-0.125, 0.1875]] in units of 100.
    red, green, blue = colours[0][:, 0].tolist()
    assert red == pytest.approx([0.096, 0.096, 1, 0], abs=1e-3)
    assert green == pytest.approx([0, 0, 0.424, 1], abs=1e-3)
    assert blue == [0.5] * 4  # three kinds of patches lie in a plane


def test_before_and_a_larger_image_give_finer_maps_of_both(run: Call, drawn: dict[str, Any]) -> None:
    code, out, _ = run("images", "--before", "untrained", "--image-size", 64)
    assert code == 0 and "  before: mean_colour, untrained (seed 0); 8 x 8 patches" in out
    assert [one.word for one in drawn["found"]] == ["before", "after"]
    assert [tuple(one.colours.shape) for one in drawn["found"]] == [(2, 3, 8, 8)] * 2
    assert not torch.equal(drawn["found"][0].colours, drawn["found"][1].colours)


def test_the_same_run_gives_the_same_picture(run: Call) -> None:
    assert run("images")[0] == 0
    first = Path("out.png").read_bytes()
    assert run("images")[0] == 0 and Path("out.png").read_bytes() == first


def test_one_image_and_many_images_are_drawn(run: Call, drawn: dict[str, Any]) -> None:
    code, out, _ = run("images/0.png", "--smooth")
    assert code == 0 and "Patch features of 1 image as colours" in out and drawn["smooth"]
    for number in range(2, 21):
        paint(Path(f"images/{number}.png"), (10 * number, 0, 0))
    code, out, _ = run("images")
    assert code == 0 and "16 of 21 images, evenly spread; --limit takes more" in out and len(drawn["pictures"]) == 16


def test_the_foreground_alone_is_coloured(run: Call, drawn: dict[str, Any]) -> None:
    image = Image.new("RGB", (32, 32), (0, 0, 80))
    image.paste((200, 0, 0), (8, 8, 16, 24))
    image.paste((200, 80, 0), (16, 8, 24, 24))
    image.save("images/object.png")
    assert run("images/object.png", "--foreground")[0] == 0
    colours = drawn["found"][0].colours[0]
    left_out = (colours == torch.tensor(0.93)).all(dim=0)
    assert left_out.sum() == 12 and not left_out[1:3, 1:3].any()
    assert colours[0, 1, 1] != colours[0, 1, 2]


def test_bad_images_are_counted(run: Call, drawn: dict[str, Any]) -> None:
    Path("images/2.png").write_bytes(b"")
    code, out, _ = run("images")
    assert code == 0 and "left out of the images: 1 undecodable images" in out and len(drawn["pictures"]) == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("images", "--limit", 0), "pca: --limit is from 1 to 64; got 0. Leave it out for 16."),
        (("images", "--limit", 100), "pca: --limit is from 1 to 64; got 100."),
        (("no-folder",), "pca: no file or folder no-folder"),
    ],
)
def test_wrong_input_is_one_line(run: Call, words: tuple[object, ...], message: str) -> None:
    code, out, error = run(*words)
    assert (code, out) == (2, "") and message in error and len(error.splitlines()) == 1
    assert not Path("out.png").exists()
