import colorsys
import io
import json
import tarfile
from collections import Counter
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ssmpretrain.datamodules import Shapes
from ssmpretrain.datamodules.synthetic.shape_captions import captions, full_captions
from ssmpretrain.datamodules.synthetic.shape_drawing import draw, place
from ssmpretrain.datamodules.synthetic.shape_scenes import (
    CLASSES,
    COLOURS,
    PLACES,
    RELATIONS,
    SHAPES,
    SIZES,
    Scene,
    held_out_classes,
    training_scenes,
    validation_scenes,
)

FEW = {"train_images": 400, "val_images": 120, "image_size": 32, "batch_size": 40, "num_workers": 0}
SCENES = [Scene((7,), size, where) for size, where in product(SIZES, PLACES)] + [Scene((20,) * n) for n in (2, 3, 4)]
SCENES += [Scene((0, 31), relation=relation) for relation in RELATIONS]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SSMPRETRAIN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Shapes:
    """Shapes whose shards are there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SSMPRETRAIN_CACHE", str(tmp_path_factory.mktemp("packed")))
        data = Shapes(**FEW)
        data.prepare_data()
        return data


def members(data: Shapes, split: str) -> list[dict[str, bytes]]:
    """Members of every sample of a split, by extension."""
    found: dict[str, dict[str, bytes]] = {}
    for path in sorted(data.folder.glob(f"{split}-*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                content = tar.extractfile(member)
                assert content is not None
                found.setdefault(key, {})[extension] = content.read()
    return list(found.values())


def described(data: Shapes, split: str) -> list[dict[str, Any]]:
    return [json.loads(sample["json"]) for sample in members(data, split)]


def test_the_same_bytes_are_packed_again_elsewhere(packed: Shapes, cache: Path) -> None:
    again = Shapes(**FEW)
    again.prepare_data()
    assert again.folder != packed.folder and again.folder.is_relative_to(cache)
    names = sorted(path.name for path in packed.folder.iterdir())
    assert names == sorted(path.name for path in again.folder.iterdir())
    shards = [name for name in names if name.endswith(".tar")]
    assert len(shards) == 16
    for name in [*shards, "classes.json", "held_out.json"]:
        assert (packed.folder / name).read_bytes() == (again.folder / name).read_bytes(), name


def test_shapes_are_read_as_images_with_captions_and_with_labels_or_without(packed: Shapes) -> None:
    packed.setup("fit")
    assert (packed.num_samples("train"), packed.num_samples("val")) == (400, 120)
    batch = next(iter(packed.train_dataloader()))
    assert batch["image"].shape == (40, 3, 32, 32)
    assert {-1} < set(batch["label"].tolist()) <= {-1, *range(48)}
    assert len(batch["text"]) == 40 and batch["owner"].tolist() == list(range(40))
    said = {phrase for scene in described(packed, "train") for phrase in scene["captions"]}
    assert set(batch["text"]) <= said
    batch = next(iter(packed.val_dataloader()))
    assert all(any(name in text for text in batch["text"]) for name in ("left of", "above", "in the centre"))
    for text, owner in zip(batch["text"], batch["owner"].tolist(), strict=True):
        label = int(batch["label"][owner])
        assert label == -1 or packed.classes[label] in text


def test_training_never_shows_a_held_out_class(packed: Shapes) -> None:
    names = [packed.classes[label] for label in packed.held_out]
    assert json.loads((packed.folder / "held_out.json").read_text()) == names
    assert json.loads((packed.folder / "classes.json").read_text()) == packed.classes
    text = " ".join(
        sample["json"].decode() + sample["txt"].decode() + sample.get("cls", b"").decode()
        for sample in members(packed, "train")
    )
    assert [name for name in names if name in text] == []  # "red cross" is part of "two red crosses"
    labels = {thing["label"] for scene in described(packed, "train") for thing in scene["objects"]}
    assert labels.isdisjoint(packed.held_out)


def test_training_shows_every_other_class_and_so_every_colour_and_shape(packed: Shapes) -> None:
    for seed in range(20):
        held_out = held_out_classes(seed)
        assert len(held_out) == 8 == len({label // len(SHAPES) for label in held_out})
        assert set(Counter(label % len(SHAPES) for label in held_out).values()) == {1, 2}
    shown = {thing["class"] for scene in described(packed, "train") for thing in scene["objects"]}
    assert shown == set(packed.classes) - {packed.classes[label] for label in packed.held_out}


def test_training_mixes_the_kinds_of_scenes() -> None:
    scenes = list(training_scenes(2000, 0))
    kinds = Counter("pair" if scene.relation else len(scene.objects) for scene in scenes)
    assert kinds[1] == pytest.approx(1000, abs=100) and kinds["pair"] == pytest.approx(600, abs=100)
    assert min(kinds[count] for count in (2, 3, 4)) > 90
    assert {scene.relation for scene in scenes} == {"", *RELATIONS}
    assert {(scene.size, scene.place) for scene in scenes} == {("", ""), *product(SIZES, PLACES)}


@pytest.mark.parametrize("count", [96, 500, 960, 4000])
def test_validation_has_equally_many_of_each_class_and_no_scene_twice(count: int) -> None:
    scenes = validation_scenes(count, 0)
    assert len(scenes) == count
    labels = Counter(scene.label for scene in scenes if scene.label is not None)
    assert set(labels) == set(range(48)) and set(labels.values()) == {min(10, count // 96)}
    said = [phrase for scene in scenes for phrase in full_captions(scene)]
    assert len(set(said)) == len(said)
    assert {len(scene.objects) for scene in scenes if not scene.relation} == {1, 2, 3, 4}
    assert any(scene.relation for scene in scenes)


@pytest.mark.parametrize("count", [1, 2, 40])
def test_a_few_validation_scenes_are_half_of_one_object(count: int) -> None:
    labels = [scene.label for scene in validation_scenes(count, 0)]
    assert len(labels) == count and labels.count(None) == count // 2
    assert len(set(labels) - {None}) == count - count // 2


def test_a_caption_and_its_converse_are_never_of_two_scenes() -> None:
    pairs = [scene for scene in validation_scenes(4000, 0) if scene.relation]
    assert len({frozenset(full_captions(scene)) for scene in pairs}) == len(pairs) > 2000


def test_captions_say_what_the_json_says(packed: Shapes) -> None:
    for sample in [*members(packed, "train"), *members(packed, "val")]:
        about = json.loads(sample["json"])
        names = [thing["class"] for thing in about["objects"]]
        assert [CLASSES[thing["label"]] for thing in about["objects"]] == names
        assert sample["txt"].decode() == about["captions"][0]
        first = about["captions"][0]
        if about["relation"]:
            assert first == f"a {names[0]} {about['relation']} a {names[1]}"
        elif len(names) > 1:
            assert (
                first == f"{['two', 'three', 'four'][len(names) - 2]} {names[0]}{'es' * names[0].endswith('s') or 's'}"
            )
        else:
            assert first.startswith(f"a {about['size']} {names[0]} ") and first.endswith(about["place"])
            assert int(sample["cls"]) == about["objects"][0]["label"]
        assert ("cls" in sample) == (len(names) == 1)
        assert all(name.split()[0] in phrase for name in names for phrase in about["captions"])


def test_a_relation_is_also_said_from_the_other_side() -> None:
    ring, star = CLASSES.index("red ring"), CLASSES.index("blue star")
    said = [full_captions(Scene((ring, star), relation=relation)) for relation in RELATIONS]
    assert said == [
        ["a red ring above a blue star", "a blue star below a red ring"],
        ["a red ring below a blue star", "a blue star above a red ring"],
        ["a red ring left of a blue star", "a blue star right of a red ring"],
        ["a red ring right of a blue star", "a blue star left of a red ring"],
    ]


def test_phrases_of_one_object_may_leave_out_size_and_place() -> None:
    said = captions(Scene((CLASSES.index("red star"),), "small", "top left"))
    assert {"a red star", "a small red star", "a red star at the top left"} < set(said)
    assert "there is a small red star at the top left" in said and len(said) == 12
    assert "there are four red stars" in captions(Scene((CLASSES.index("red star"),) * 4))


def test_templates_make_phrases_of_the_training_captions(packed: Shapes) -> None:
    said = {phrase for scene in described(packed, "train") for phrase in scene["captions"]}
    seen = [name for label, name in enumerate(packed.classes) if label not in packed.held_out]
    phrases = {template.format(name) for template in packed.templates for name in seen}
    assert len(phrases - said) < len(phrases) / 10  # 200 scenes of one object need not have all 40 classes


def test_the_colour_in_the_picture_is_the_colour_of_the_label(packed: Shapes) -> None:
    hues = {"red": 0, "yellow": 60, "green": 120, "cyan": 180, "blue": 230, "purple": 275, "pink": 325}
    checked = 0
    for sample in members(packed, "val"):
        for thing in json.loads(sample["json"])["objects"]:
            colour, shape = thing["class"].split()
            if shape == "ring":
                continue
            image = Image.open(io.BytesIO(sample["png"]))
            pixel = image.getpixel((int(thing["x"] * 32), int(thing["y"] * 32)))
            hue, saturation, _ = colorsys.rgb_to_hsv(*(value / 255 for value in pixel))
            nearest = min(hues, key=lambda name: abs((hue * 360 - hues[name] + 180) % 360 - 180))
            assert (nearest if saturation > 0.2 else "white") == colour, thing
            checked += 1
    assert checked > 100


@pytest.mark.parametrize("scene", SCENES, ids=lambda scene: full_captions(scene)[0])
def test_objects_lie_apart_inside_the_picture_where_the_caption_says(scene: Scene) -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        objects = place(scene, rng)
        assert len(objects) == len(scene.objects)
        for i, one in enumerate(objects):
            reach = 1.1 * one.radius
            assert reach <= min(one.x, one.y, 1 - one.x, 1 - one.y)
            assert all(np.hypot(one.x - two.x, one.y - two.y) > reach + 1.1 * two.radius for two in objects[:i])
        x, y, radius = objects[0].x, objects[0].y, objects[0].radius
        if scene.place:
            across, down = (int((at > 0.4) + 0) + int(at > 0.6) for at in (x, y))
            assert scene.place == (
                "centre" if across == 1 else f"{['top', '', 'bottom'][down]} {['left', '', 'right'][across]}"
            )
            assert (scene.size == "small") == (radius < 0.15)
        if scene.relation:
            to_x, to_y = objects[1].x - x, objects[1].y - y
            sideways = "left of" if to_x > 0 else "right of"
            assert scene.relation == (sideways if abs(to_x) > abs(to_y) else "above" if to_y > 0 else "below")


@pytest.mark.parametrize("size", [32, 64])
def test_every_shape_looks_other_than_the_rest(size: int) -> None:
    def silhouette(shape: int) -> np.ndarray:
        rng = np.random.default_rng(0)
        white = COLOURS.index("white") * len(SHAPES) + shape
        return draw(place(Scene((white,), "large", "centre"), rng), size, rng).min(-1) > 150

    drawn = [silhouette(shape) for shape in range(len(SHAPES))]
    for one, two in product(range(len(SHAPES)), repeat=2):
        differing = (drawn[one] != drawn[two]).sum() / (drawn[one] | drawn[two]).sum()
        assert (differing > 0.12) == (one != two), (SHAPES[one], SHAPES[two], differing)


def test_edges_are_smooth() -> None:
    rng = np.random.default_rng(0)
    red = draw(place(Scene((0,), "large", "centre"), rng), 64, rng)[..., 0]
    assert len(np.unique(red)) > 10  # hard edges would leave two: the plain background and the shape


def test_arguments_that_decide_the_pictures_decide_the_folder() -> None:
    changes = ({}, {"shapes_seed": 1}, {"image_size": 48}, {"val_images": 100}, {"train_images": 300})
    assert len({Shapes(**{**FEW, **change}).folder for change in changes}) == 5
    assert Shapes(**FEW, seed=3).folder == Shapes(**FEW).folder
    assert Shapes(**FEW).held_out != Shapes(**FEW, shapes_seed=1).held_out


@pytest.mark.parametrize(
    ("name", "value"), [("train_images", 0), ("val_images", 0), ("val_images", 4001), ("image_size", 8)]
)
def test_a_size_out_of_range_is_named(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=rf"Shapes: {name} is a number from .*; got {value}\."):
        Shapes(**{name: value})
