import io
import json
import tarfile
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ssmpretrain.base.errors import DataError
from ssmpretrain.datamodules import DetectionScenes, Scenes, SegmentationScenes
from ssmpretrain.datamodules.synthetic.scene_drawing import DrawnScene, draw_scene
from ssmpretrain.datamodules.synthetic.scenes import photographs
from ssmpretrain.datamodules.synthetic.shape_drawing import Placed, coverage
from ssmpretrain.datamodules.synthetic.shape_scenes import SHAPES
from ssmpretrain.evaluation.dense.masks import decode_mask

FEW: dict[str, Any] = {"train_images": 24, "val_images": 16, "image_size": 48, "batch_size": 8, "num_workers": 0}


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> SegmentationScenes:
    """Scenes whose shards are there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SSMPRETRAIN_CACHE", str(tmp_path_factory.mktemp("packed")))
        data = SegmentationScenes(**FEW)
        data.prepare_data()
        return data


def samples(data: SegmentationScenes, split: str) -> list[dict[str, bytes]]:
    """Members of every sample of a split, by extension."""
    found: dict[str, dict[str, bytes]] = {}
    for path in sorted(data.scenes.folder.glob(f"{split}-*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                content = tar.extractfile(member)
                assert content is not None
                found.setdefault(key, {})[extension] = content.read()
    return list(found.values())


def pixels(png: bytes) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(io.BytesIO(png)))


def test_class_map_masks_and_boxes_are_of_the_same_visible_pixels(packed: SegmentationScenes) -> None:
    scenes = samples(packed, "train") + samples(packed, "val")
    assert len(scenes) == 40
    for scene in scenes:
        classes, about = pixels(scene["seg.png"]), json.loads(scene["json"])
        assert (about["height"], about["width"]) == classes.shape == pixels(scene["png"]).shape[:2] == (48, 48)
        rebuilt = np.zeros_like(classes)
        for thing in about["objects"]:
            mask = decode_mask(thing["segmentation"])
            assert not rebuilt[mask].any(), "visible pixels belong to one object"
            rebuilt[mask] = thing["category"] + 1
            rows, columns = np.nonzero(mask)
            x, y, width, height = thing["bbox"]
            assert (x, y, x + width, y + height) == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
            assert thing["area"] == mask.sum() > 0 and thing["iscrowd"] == 0
        assert (rebuilt == classes).all()


def test_scenes_overlap_and_show_every_shape() -> None:
    rng, photos = np.random.default_rng(0), photographs("train")
    drawn = [draw_scene(photos, 32, rng) for _ in range(60)]
    assert {shape for scene in drawn for shape in scene.shapes} == set(range(len(SHAPES)))
    assert {len(scene.shapes) for scene in drawn} == {1, 2}
    assert any(touching(scene) for scene in drawn)


def touching(scene: DrawnScene) -> bool:
    """Whether a pixel of the first object is beside one of the second."""
    left, right = scene.visible[:, :-1], scene.visible[:, 1:]
    return bool(((left != right) & (left > 0) & (right > 0)).any())


def test_a_later_object_hides_what_it_covers() -> None:
    covers = [coverage([Placed(1, 0.5, 0.5, 0.3, 0.0)], 32), coverage([Placed(0, 0.7, 0.5, 0.2, 0.0)], 32)]
    image = np.zeros((32, 32, 3), dtype=np.uint8)
    visible = np.where(covers[1][..., 0] > 0.5, 2, np.where(covers[0][..., 0] > 0.5, 1, 0)).astype(np.uint8)
    scene = DrawnScene(image, [1, 0], visible)
    assert not (scene.mask(0) & (covers[1][..., 0] > 0.5)).any()
    assert scene.mask(1).sum() == (covers[1][..., 0] > 0.5).sum()
    assert scene.class_map()[16, 10] == 2 and scene.class_map()[16, 22] == 1 and scene.class_map()[0, 0] == 0


def test_colour_does_not_tell_the_class() -> None:
    rng, photos = np.random.default_rng(0), photographs("train")
    means: dict[int, list[Any]] = {}
    for _ in range(150):
        scene = draw_scene(photos, 32, rng)
        for number, shape in enumerate(scene.shapes):
            means.setdefault(shape, []).append(scene.image[scene.mask(number)].mean(axis=0))
    centres = np.array([np.mean(means[shape], axis=0) for shape in sorted(means)])
    guessed = [
        (int(np.linalg.norm(centres - colour, axis=1).argmin()), shape)
        for shape, colours in means.items()
        for colour in colours
    ]
    assert (
        sum(guess == shape for guess, shape in guessed) / len(guessed) < 0.35
    )  # chance 1/6; fitted to these very ones


def test_fewer_images_are_the_first_ones_of_more(packed: SegmentationScenes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSMPRETRAIN_CACHE", str(packed.scenes.folder.parent))
    fewer = SegmentationScenes(**{**FEW, "train_images": 5})
    fewer.prepare_data()
    assert samples(fewer, "train") == samples(packed, "train")[:5]
    assert samples(fewer, "val") == samples(packed, "val")


def test_training_and_validation_share_no_picture(packed: SegmentationScenes) -> None:
    trained = {scene["png"] for scene in samples(packed, "train")}
    assert len(trained) == 24
    assert not trained & {scene["png"] for scene in samples(packed, "val")}
    left, right = photographs("train")[0], photographs("val")[0]
    assert left.width + right.width == 640 and left.height == right.height == 427


def test_all_data_modules_read_the_same_folder(packed: SegmentationScenes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSMPRETRAIN_CACHE", str(packed.scenes.folder.parent))
    images = Scenes(**FEW)
    assert images.scenes.folder == packed.scenes.folder
    images.setup("fit")
    assert next(iter(images.train_dataloader()))["image"].shape == (8, 3, 48, 48)
    packed.setup("fit")
    batch = next(iter(packed.train_dataloader()))
    assert batch["mask"].shape == (8, 48, 48) and int(batch["mask"].max()) <= 6
    assert packed.classes == ["background", *SHAPES]
    objects = DetectionScenes(**FEW)
    assert objects.scenes.folder == packed.scenes.folder and objects.classes == list(SHAPES)
    objects.setup("fit")
    first = next(iter(objects.val_dataloader()))
    expected = json.loads(samples(packed, "val")[0]["json"])
    assert first["annotation"][0]["objects"] == expected["objects"]
    x, y, width, height = expected["objects"][0]["bbox"]
    assert first["objects"][0]["boxes"][0].tolist() == [x, y, x + width, y + height]


@pytest.mark.parametrize(("name", "value"), [("train_images", 0), ("val_images", 0), ("image_size", 16)])
def test_a_number_out_of_range_is_named(name: str, value: int) -> None:
    with pytest.raises(DataError, match=f"Scenes: {name} is a whole number of at least .*; got {value}. Use"):
        Scenes(**{name: value})
