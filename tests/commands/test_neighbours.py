"""`neighbours` from its command line, with an encoder whose features are the mean colours."""

import re
from collections.abc import Callable
from math import sqrt
from pathlib import Path

import pytest
from mean_colour import paint, write_encoder
from PIL import Image

from ssmpretrain.commands.feature_pictures import neighbour_search
from ssmpretrain.commands.feature_pictures.neighbour_search import Neighbourhood

Call = Callable[..., tuple[int, str, str]]
PICTURES = {  # in the order of the data; all colours of a class are near each other
    "blue/0.png": (0, 0, 200),
    "blue/1.png": (60, 0, 200),
    "green/0.png": (0, 100, 0),
    "green/1.png": (30, 100, 0),
    "green/2.png": (80, 100, 0),
    "red/0.png": (150, 0, 0),
    "red/1.png": (150, 60, 0),
}


@pytest.fixture
def run(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Call:
    """Run the command with the encoder, beside a folder `images` of `PICTURES`; the figure is out.png."""
    monkeypatch.chdir(tmp_path)
    for name, colour in PICTURES.items():
        paint(tmp_path / "images" / name, colour)
    write_encoder(tmp_path / "encoder.pth")
    return lambda *words: call("neighbours", "encoder.pth", *words, "--out", "out.png", "--num-workers", 0)


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> list[Neighbourhood]:
    """Keep what the command finds, which it draws."""
    kept: list[Neighbourhood] = []
    from ssmpretrain.commands import neighbours

    def draw(found: list[Neighbourhood], title: str) -> object:
        kept[:] = found
        return original(found, title)

    original = neighbours.draw_neighbours
    monkeypatch.setattr(neighbours, "draw_neighbours", draw)
    return kept


def keys(one: Neighbourhood) -> dict[str, list[str]]:
    return {row.query.key: [near.item.key for near in row.near] for row in one.rows}


def test_neighbours_are_those_of_the_colours(run: Call, found: list[Neighbourhood]) -> None:
    code, out, message = run("images", "--k", 2, "--num-queries", 3)
    assert (code, message) == (0, "")
    assert keys(found[0]) == {
        "blue/0.png": ["blue/1.png", "green/0.png"],  # of the equally far ones the first
        "green/0.png": ["green/1.png", "green/2.png"],
        "green/2.png": ["green/1.png", "red/1.png"],
    }
    near = found[0].rows[0].near
    assert [one.similarity for one in near] == pytest.approx([200 / sqrt(60**2 + 200**2), 0], abs=1e-6)
    assert "out.png: Nearest neighbours of 3 images among 7" in out
    assert "mean_colour, encoder.pth; mean of the last block: by default, as the file names no feature" in out
    assert re.search(r"blue/0.png +blue +1 of 2, 0.958 .. 0.000\n", out)
    assert "of the class of their query" in out and "4 of 6 (67%)" in out
    chance = (1 / 6 + 2 / 6 + 2 / 6) / 3
    assert f"expected of neighbours at random: {chance:.0%}" in out
    assert Image.open("out.png").size[0] > 1400


def test_before_stands_beside_after(run: Call, found: list[Neighbourhood]) -> None:
    code, out, _ = run("images", "--before", "untrained", "--k", 1, "--num-queries", 2)
    assert code == 0 and [one.word for one in found] == ["before", "after"]
    assert "  before: mean_colour, untrained (seed 0)" in out and "  after: mean_colour, encoder.pth" in out
    assert keys(found[1]) == {"blue/0.png": ["blue/1.png"], "green/1.png": ["green/0.png"]}
    assert run("images", "--before", "encoder.pth", "--k", 1, "--num-queries", 2, "--force")[0] == 0
    assert keys(found[0]) == keys(found[1])


def test_queries_of_other_paths_are_never_their_own_neighbours(run: Call, found: list[Neighbourhood]) -> None:
    code, out, _ = run("images", "--queries", "images/red/1.png", "images/red/0.png", "--k", 9)
    assert code == 0 and "searched" not in out
    assert keys(found[0])["1.png"][0] == "red/0.png" and len(keys(found[0])["1.png"]) == 6
    assert [row.query.label for row in found[0].rows] == ["red", "red"]  # the class folder that they lie in


def test_copies_of_a_query_are_named(run: Call, found: list[Neighbourhood]) -> None:
    paint(Path("images/red/copy.png"), PICTURES["red/0.png"])
    code, out, _ = run("images", "--queries", "images/red/0.png", "--k", 1)
    assert code == 0 and keys(found[0]) == {"0.png": ["red/copy.png"]}
    assert "exact duplicates of their query among the neighbours: 1" in out


def test_images_without_classes_have_similarities_alone(run: Call) -> None:
    code, out, _ = run(*(f"images/{name}" for name in PICTURES), "--k", 1, "--num-queries", 1)
    assert code == 0 and re.search(r"  query +neighbours\n  blue/0.png +0.958 .. 0.958\n", out)
    assert "class" not in out


def test_bad_images_are_counted_and_the_limit_is_said(run: Call, found: list[Neighbourhood]) -> None:
    Path("images/red/0.png").write_bytes(b"no image")
    for number in range(20):
        Path(f"images/red/empty-{number}.png").touch()
    Image.open("images/red/1.png").convert("L").save("images/green/grey.png")
    Image.open("images/red/1.png").convert("RGBA").save("images/green/rgba.png")
    code, out, _ = run("images", "--k", 30, "--num-queries", 1)
    assert code == 0 and "left out of the images: 21 undecodable images" in out and len(found[0].rows[0].near) == 7
    code, out, _ = run("images", "--limit", 20, "--num-queries", 1, "--force")
    assert code == 0 and "searched 20 of 29 images, evenly spread" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("images/red/0.png",), "2 usable images are needed; got 1 in images/red/0.png. Name more images."),
        (("images", "--k", 0), "--k is from 1 to 32; got 0. 8 is usual."),
        (("images", "--num-queries", 100), "--num-queries is from 1 to 64; got 100."),
        (("images", "--limit", 0), "--limit is at least 1; got 0."),
        (("images", "--image-size", 20), "multiples of 8 pixels; got 20 x 20. Set --image-size 16, say."),
        (("images", "--before", "no.pth"), "no.pth"),
        (("images", "--pooling", "class"), "has no class token"),
    ],
)
def test_wrong_input_is_one_line(run: Call, words: tuple[object, ...], message: str) -> None:
    code, out, error = run(*words)
    assert (code, out) == (2, "") and message in error and len(error.splitlines()) == 1
    assert not Path("out.png").exists()


def test_an_existing_figure_is_kept(run: Call) -> None:
    Path("out.png").touch()
    code, _, error = run("images")
    assert code == 2 and "out.png exists. Give another --out, or --force" in error and not Path("out.png").read_bytes()


def test_long_keys_and_strange_names_are_drawn(run: Call, found: list[Neighbourhood]) -> None:
    for name in ("$x_{1$", "very " * 20, "\u732b"):
        paint(Path("odd") / name / "a.png", (10, 20, 30))
    code, out, _ = run("odd", "--k", 1)
    assert code == 0 and "..." in out and len(neighbour_search.table(found)[1]) < 200
