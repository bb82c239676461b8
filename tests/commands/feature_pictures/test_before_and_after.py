"""The pictures of a training in the folder of its run."""

from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib import figure
from mean_colour import MeanColour, paint, write_encoder

from ssmpretrain.base.run_folder import RunFolder
from ssmpretrain.commands.feature_pictures import before_and_after
from ssmpretrain.commands.feature_pictures.before_and_after import draw_before_and_after
from ssmpretrain.datamodules import ImageFolder
from ssmpretrain.encoders import create_encoder, load_encoder
from ssmpretrain.encoders.features.pooled import Pooled

TRAIN = {"blue": (0, 0, 200), "green": (0, 150, 0), "red": (100, 0, 0)}


@pytest.fixture
def data(tmp_path: Path) -> ImageFolder:
    """Three training images of each of three colours, a class, and as many for validation, a little darker."""
    for name, colour in TRAIN.items():
        for number in range(3):
            paint(tmp_path / "train" / name / f"{number}.png", tuple(part + number for part in colour))  # type: ignore[arg-type]
            paint(tmp_path / "val" / name / f"{number}.png", tuple(part // 2 for part in colour))  # type: ignore[arg-type]
    data = ImageFolder(str(tmp_path / "train"), str(tmp_path / "val"), image_size=32, num_workers=0, batch_size=4)
    data.setup("validate")
    return data


def test_the_pictures_show_unseen_queries_and_training_images(
    data: ImageFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: dict[str, Any] = {}
    for name in ("draw_neighbours", "draw_components"):
        original = getattr(before_and_after, name)

        def draw(*args: Any, name: str = name, original: Any = original) -> Any:
            kept[name] = args
            return original(*args)

        monkeypatch.setattr(before_and_after, name, draw)
    torch.manual_seed(0)
    encoders = MeanColour(), load_encoder(write_encoder(tmp_path / "encoder.pth"), num_classes=0)
    names = {"before": "mean_colour, untrained", "after": "mean_colour, trained"}
    folder = RunFolder(tmp_path / "run")
    written = draw_before_and_after(*encoders, Pooled(), data, folder, names, bank=100)
    assert [path.name for path in written] == ["neighbours.png", "pca.png"] and all(path.exists() for path in written)

    found, title = kept["draw_neighbours"]
    assert title == "Nearest neighbours of 5 unseen images among 9 training images"
    assert [one.heading for one in found] == ["before: mean_colour, untrained", "after: mean_colour, trained"]
    queries = [row.query.key for row in found[1].rows]
    assert queries == ["blue/0.png", "blue/1.png", "green/0.png", "green/1.png", "red/0.png"]  # classes take turns
    assert all(row.near[0].item.label == row.query.label for row in found[1].rows)
    pictures, maps, title = kept["draw_components"]
    assert len(pictures) == 8 and maps[1].colours.shape == (8, 3, 4, 4) and title == "Patch features of 8 unseen images"


def test_small_images_are_drawn_by_a_map_with_enough_patches(
    data: ImageFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[Any] = []
    monkeypatch.setattr(before_and_after, "draw_components", lambda *args: kept.append(args) or figure.Figure())
    encoders = [create_encoder("test_vmamba", num_classes=0) for _ in range(2)]  # stages of 8, 4, 2 and 1 patches
    names = {"before": "fresh", "after": "pretrained"}
    draw_before_and_after(encoders[0], encoders[1], Pooled(), data, RunFolder(tmp_path / "run"), names, bank=9)
    _, maps, title = kept[0]
    assert maps[0].colours.shape == (8, 3, 8, 8) and title == "Patch features of 8 unseen images, stage 1 of 4"
