"""`segment` from its command line."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from dense_runs import NAMES, fit_one_step, tiny_detection, tiny_segmentation
from numpy.typing import NDArray
from PIL import Image

from ssmpretrain.evaluation.dense import Inference, class_colours
from ssmpretrain.objectives import Segmentation
from ssmpretrain.objectives.restore import restore

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def segmentation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that validates in windows of 32 x 32 pixels."""
    inference = Inference(slide=True, window=(32, 32), stride=(16, 16))
    return fit_one_step(tmp_path_factory.mktemp("segmentation"), tiny_segmentation(inference=inference))


@pytest.fixture(scope="module")
def detection(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fit_one_step(tmp_path_factory.mktemp("detection"), tiny_detection())


@pytest.fixture
def run(call: Run, image_folder: Path) -> Run:
    """Exit code, standard output and our own lines of standard error of `segment`."""
    return partial(call, "segment")


def class_map(path: str) -> NDArray[np.uint8]:
    with Image.open(path) as image:
        assert image.mode == "P"
        return np.array(image)


def by_hand(folder: Path, path: str) -> NDArray[np.int64]:
    """The class map of the whole image, 40 x 50 pixels, resized to a short side of 48."""
    content = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    restored = restore(content, folder, Segmentation)
    assert restored is not None
    with Image.open(path) as image:
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float()
    pixels = F.interpolate(pixels, (48, 60), mode="bilinear", align_corners=False).round()
    mean, std = torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1), torch.tensor([0.2, 0.25, 0.3]).view(3, 1, 1)
    with torch.no_grad():
        logits = restored.model((pixels / 255 - mean) / std)
    return F.interpolate(logits, (40, 50), mode="bilinear", align_corners=False)[0].argmax(0).numpy()


def test_a_map_of_classes_at_the_size_of_the_file_and_a_picture_are_written(run: Run, segmentation: Path) -> None:
    code, out, message = run(segmentation, "images/0.png", "--no-slide")
    assert (code, message) == (0, "")
    found = class_map("segmented/maps/0.png")
    assert found.shape == (40, 50)
    assert (found == by_hand(segmentation, "images/0.png")).mean() > 0.995  # pixels are rounded in another order
    assert "Segmentation of test_vim, 3 classes" in out and "  0: " in out
    share = max((found == k).mean() for k in range(3))
    assert f"{share:.0%}" in out
    with Image.open("segmented/maps/0.png") as image:
        assert image.getpalette()[:9] == [part for colour in class_colours(3) for part in colour]  # type: ignore[index]
    with Image.open("segmented/pictures/0.png") as picture:
        assert picture.size[0] == 2 * 400 + 36
    assert json.loads(Path("segmented/classes.json").read_text()) == NAMES


def test_windows_are_those_of_the_run_unless_the_command_names_others(run: Run, segmentation: Path) -> None:
    for out, options in {
        "run": [],
        "same": ["--window", 32, 32, "--stride", 16, 16],
        "other": ["--stride", 32, 32],
        "whole": ["--no-slide"],
        "more": ["--scales", 0.5, 1, "--flip"],
        "larger": ["--eval-size", 64, 640],
    }.items():
        assert run(segmentation, "images/0.png", "--out", out, *options)[0] == 0
    maps = {out: class_map(f"{out}/maps/0.png") for out in ("run", "same", "other", "whole", "more", "larger")}
    assert (maps["run"] == maps["same"]).all()
    for out in ("other", "whole", "more", "larger"):
        assert (maps["run"] != maps[out]).any()


def test_folders_globs_and_files_are_read_and_results_keep_their_names(run: Run, segmentation: Path) -> None:
    for number in (3, 4, 5):
        Path(f"images/{number}.png").unlink()
    Path("images/deep").mkdir()
    Path("images/9.png").rename("images/deep/9.png")
    Path("images/8.png").rename("images/deep/0.webp")
    with Image.open("images/7.png") as image:
        image.save("images/6.jpg")
    code, _, _ = run(segmentation, "images", "--eval-size", 16, 64)
    assert code == 0
    names = sorted(str(path.relative_to("segmented/maps")) for path in Path("segmented/maps").rglob("*.png"))
    assert names == ["0.png", "1.png", "2.png", "6.jpg.png", "6.png.png", "7.png", "deep/0.png", "deep/9.png"]
    assert run(segmentation, "images/[12].png", "images/0.png", "--out", "b", "--eval-size", 16, 64)[0] == 0
    assert sorted(path.name for path in Path("b/maps").iterdir()) == ["0.png", "1.png", "2.png"]
    assert run(segmentation, "images", "--limit", 2, "--out", "c", "--eval-size", 16, 64)[0] == 0
    assert sorted(path.name for path in Path("c/maps").iterdir()) == ["0.png", "1.png"]


def test_bad_images_are_named_and_counted(run: Run, segmentation: Path, caplog: pytest.LogCaptureFixture) -> None:
    Path("images/1.png").write_text("no image")
    Path("images/2.png").write_bytes(Path("images/2.png").read_bytes()[:300])
    code, out, _ = run(segmentation, "images/0.png", "images/1.png", "images/2.png", "--eval-size", 16, 64)
    assert code == 0 and "left out 2 of 3: undecodable images (2)" in out
    assert "left out images/1.png: undecodable images" in caplog.text and "left out images/2.png" in caplog.text
    assert [path.name for path in Path("segmented/maps").iterdir()] == ["0.png"]
    code, _, message = run(segmentation, "images/1.png", "--out", "b")
    assert code == 2 and "no image could be used: undecodable images (1)" in message


def test_results_are_replaced_only_when_told(run: Run, segmentation: Path) -> None:
    arguments = (segmentation, "images/0.png", "--eval-size", 16, 64)
    assert run(*arguments)[0] == 0
    Path("segmented/maps/0.png").write_text("precious")
    code, _, message = run(*arguments)
    assert code == 2 and "segmented/pictures/0.png and 2 more of 3 exist" in message and "--force" in message
    assert Path("segmented/maps/0.png").read_text() == "precious"
    assert run(*arguments, "--force")[0] == 0
    assert class_map("segmented/maps/0.png").shape == (40, 50)
    assert not list(Path("segmented").rglob(".*"))  # nothing half-written stays


def test_classes_without_names_get_their_numbers(run: Run, segmentation: Path) -> None:
    content = torch.load(segmentation / "checkpoints" / "last.ckpt", weights_only=True)
    del content["classes"]
    torch.save(content, "own.ckpt")
    assert run("own.ckpt", "images/0.png")[0] == 0
    assert json.loads(Path("segmented/classes.json").read_text()) == ["0", "1", "2"]


def same_name() -> list[str]:
    Path("other").mkdir()
    Path("images/0.png").rename("other/1.png")
    return ["RUN", "images/1.png", "other/1.png"]


MISTAKES: dict[str, tuple[list[str] | Callable[[], list[str]], list[str]]] = {
    "run of another task": (["DETECTION", "images/0.png"], ["of a run of Detection", "ssmpretrain detect"]),
    "run without labels": (["MAE", "images/0.png"], ["of a run of MAE"]),
    "missing image": (["RUN", "images/77.png"], ["images/77.png", "10 .png"]),
    "glob without a match": (["RUN", "images/*.jpg"], ["no file matches images/*.jpg"]),
    "one name twice": (same_name, ["images/1.png", "other/1.png", "another --out"]),
    "out is a file": (["RUN", "images/0.png", "--out", "images/1.png"], ["--out is a folder"]),
    "limit": (["RUN", "images", "--limit", "0"], ["--limit is at least 1"]),
    "size in the wrong order": (["RUN", "images/0.png", "--eval-size", "64", "32"], ["--eval-size", "[64, 32]"]),
    "scale": (["RUN", "images/0.png", "--scales", "0"], ["scales are ratios above 0"]),
    "stride": (["RUN", "images/0.png", "--stride", "64", "64"], ["1 <= stride <= window"]),
    "window of a whole image": (["RUN", "images/0.png", "--no-slide", "--window", "8", "8"], ["Add --slide"]),
    "weights that are no numbers": (["SPOILED", "images/0.png"], ["NaN or infinite"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gets_one_short_message_and_exit_code_2(
    mistake: str, run: Run, segmentation: Path, detection: Path, run_folder: Path
) -> None:
    words, expected = MISTAKES[mistake]
    content = torch.load(segmentation / "checkpoints" / "last.ckpt", weights_only=True)
    next(iter(content["state_dict"].values())).view(-1)[:5] = float("nan")
    torch.save(content, "SPOILED")
    runs = {"RUN": segmentation, "DETECTION": detection, "MAE": run_folder}
    code, out, message = run(*(runs.get(word, word) for word in (words() if callable(words) else words)))
    assert (code, out) == (2, "")
    assert message.count("\n") == 0 and len(message) < 500
    for part in expected:
        assert part in message
    assert not list(Path("segmented").rglob("*.png"))
