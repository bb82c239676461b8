"""Folders of images and masks: layouts, numbers, partners, and what happens to wrong masks."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ssmpretrain.base.errors import DataError
from ssmpretrain.datamodules import SegmentationFolder
from ssmpretrain.datamodules.targets.segmentation_transforms import SegmentationAugmentation

SMALL: dict[str, Any] = {"batch_size": 4, "num_workers": 0, "image_size": 32, "mean": (0, 0, 0), "std": (1, 1, 1)}
WriteFolder = Callable[..., Path]


def two_folders(folder: Path, **options: Any) -> SegmentationFolder:
    options = {"num_classes": 4, "train_masks": str(folder / "masks"), **options}
    return SegmentationFolder(str(folder / "images"), **{**SMALL, **options})


def evaluated(data: SegmentationFolder) -> list[torch.Tensor]:
    """Class maps of all validation images, at their own size."""
    data.setup()
    return [mask for batch in data.val_dataloader() for mask in batch["whole_mask"]]


def test_a_batch_has_image_mask_and_size(write_folder: WriteFolder) -> None:
    folder = write_folder()
    data = two_folders(folder, val=str(folder / "images"), val_masks=str(folder / "masks"))
    data.setup()
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].shape == (4, 3, 32, 32) and batch["image"].dtype == torch.float32
    assert batch["mask"].shape == (4, 32, 32) and batch["mask"].dtype == torch.uint8
    assert batch["size"].dtype == torch.int64 and "whole_mask" not in batch
    evaluation = next(iter(data.val_dataloader()))
    (h, w), whole = evaluation["size"][0].tolist(), evaluation["whole_mask"][0]
    assert min(h, w) == 32 and round(32 * max(whole.shape) / min(whole.shape)) == max(h, w)
    assert evaluation["mask"][0, :h, :w].max() < 4
    assert (evaluation["mask"][0, h:] == 255).all() and (evaluation["image"][0, :, h:] == 0).all()


def test_the_colour_of_each_pixel_tells_its_class(write_folder: WriteFolder) -> None:
    settings = SegmentationAugmentation(scale=(1.0, 2.0), distortion=None)
    data = two_folders(write_folder(), augmentation=settings)
    for batch in data.train_dataloader():
        red, mask = batch["image"][:, 0] * 255 / 40, batch["mask"]
        assert float(((red - mask).abs() < 0.5)[mask < 255].float().mean()) > 0.8  # edges and JPEG blur the rest


@pytest.mark.parametrize("options", [{"mode": "P"}, {"mode": "P", "bits": 2}, {}])
def test_palettes_are_read_as_indices(write_folder: WriteFolder, options: dict[str, Any]) -> None:
    folder = write_folder(**options)
    data = two_folders(folder, val=str(folder / "images"), val_masks=str(folder / "masks"))
    assert set(torch.cat([mask.flatten() for mask in evaluated(data)]).tolist()) == {0, 1, 2, 3}


def as_layout(name: str, split: str) -> dict[str, Any]:
    """Arguments of `write_folder` for one split of a layout."""
    cities = {"image": "ulm/ulm_{:02d}_leftImg8bit.jpg"}
    part = {"train": "training", "val": "validation"}[split]
    return {
        "ade20k": {"images": f"images/{part}", "masks": f"annotations/{part}"},
        "voc": {"images": "JPEGImages", "masks": "SegmentationClass", "mode": "P"},
        "folders": {"images": f"images/{split}", "masks": f"masks/{split}"},
        "cityscapes": cities
        | {
            "images": f"leftImg8bit/{split}",
            "masks": f"gtFine/{split}",
            "mask": "ulm/ulm_{:02d}_gtFine_labelTrainIds.png",
        },
        "cityscapes_ids": cities
        | {
            "images": f"leftImg8bit/{split}",
            "masks": f"gtFine/{split}",
            "mask": "ulm/ulm_{:02d}_gtFine_labelIds.png",
            "change": lambda mask: np.array([0, 7, 8, 33], np.uint8)[mask],
        },
    }[name]


@pytest.mark.parametrize(
    ("layout", "classes", "found"),
    [
        ("ade20k", 150, {0, 1, 2, 255}),  # 0 is ignored, and 1 is the first class
        ("voc", 21, {0, 1, 2, 3}),
        ("cityscapes", 19, {0, 1, 2, 3}),
        ("cityscapes_ids", 19, {255, 0, 1, 18}),
        ("folders", 4, {0, 1, 2, 3}),
    ],
)
def test_layouts_say_places_numbers_and_classes(
    write_folder: WriteFolder, layout: str, classes: int, found: set[int], caplog: pytest.LogCaptureFixture
) -> None:
    for split in ("train", "val"):
        folder = write_folder(**as_layout(layout, split))
        (folder / "ImageSets/Segmentation").mkdir(parents=True, exist_ok=True)
        (folder / f"ImageSets/Segmentation/{split}.txt").write_text("".join(f"{n:02d}\n" for n in range(8)))
    (folder / "classes.json").write_text('["a", "b", "c", "d"]')
    if layout.startswith("cityscapes"):
        (folder / "leftImg8bit/val/ulm/ulm_19_leftImg8bit.jpg").rename(folder / "moved.jpg")
    data = SegmentationFolder(str(folder), str(folder), layout=layout, **SMALL)
    masks = evaluated(data)
    if layout.startswith("cityscapes"):
        assert "val: left out 1: masks without an image: ulm/ulm_19_gtFine_label" in caplog.text
    assert set(torch.cat([mask.flatten() for mask in masks]).tolist()) == found
    assert (len(data.classes) or data.num_classes) == classes
    assert len(masks) == {"voc": 8, "cityscapes": 19, "cityscapes_ids": 19}.get(layout, 20)


def test_ade20k_reads_the_names_of_its_table(write_folder: WriteFolder) -> None:
    folder = write_folder(**as_layout("ade20k", "train"))
    rows = "".join(f"{n}\t0.1\t1\t1\tname {n}, other\n" for n in range(1, 151))
    (folder / "objectInfo150.txt").write_text(f"Idx\tRatio\tTrain\tVal\tName\n{rows}")
    data = SegmentationFolder(str(folder), layout="ade20k", **SMALL)
    assert data.classes[:2] == ["name 1, other", "name 2, other"] and len(data.classes) == 150


def test_a_class_map_merges_names_and_ignores(write_folder: WriteFolder) -> None:
    folder = write_folder(change=lambda mask: mask.astype(np.uint16) * 1000)
    options: dict[str, Any] = {"num_classes": None, "val": str(folder / "images"), "val_masks": str(folder / "masks")}
    data = two_folders(folder, class_map={0: "road", 1000: "sky", 2000: "road"}, ignore=[3000], **options)
    masks = evaluated(data)
    assert data.classes == ["road", "sky"]
    assert set(torch.cat([mask.flatten() for mask in masks]).tolist()) == {0, 1, 255}


def test_masks_may_lie_among_the_images(write_folder: WriteFolder, caplog: pytest.LogCaptureFixture) -> None:
    folder = write_folder(masks="images", image="{:02d}_rgb.jpg", mask="{:02d}_mask.png")
    options = {"train_masks": str(folder / "images"), "mask": "{folder}/{stem}_mask.png", "image_ending": "_rgb"}
    assert two_folders(folder, **options).num_samples("train") == 20
    (folder / "images/00_depth.png").write_bytes((folder / "images/00_mask.png").read_bytes())
    assert two_folders(folder, **options).num_samples("train") == 20
    assert "left out 1: images whose names do not end in _rgb: 00_depth.png" in caplog.text
    with pytest.raises(DataError, match=r"no image that can have a mask in .*: left out 41: images whose names do not"):
        two_folders(folder, **{**options, "image_ending": "_no"}).setup()
    same = write_folder(images="same", masks="same")
    data = SegmentationFolder(str(same / "same"), train_masks=str(same / "same"), num_classes=4, **SMALL)
    assert data.num_samples("train") == 20


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layout": "ade"}, "Did you mean 'ade20k'"),
        ({"layout": "voc"}, "layout voc says which mask belongs to an image; got train_masks too"),
        ({"train_masks": None}, "the masks are in train_masks, or in the places of a layout"),
        ({"val": "x"}, "the masks are in val_masks"),
        ({"mask": "{name}.png"}, "mask is a template of a PNG file with {stem}"),
        ({"mask": "{stem}.jpg"}, "mask is a template of a PNG file"),
        ({"num_classes": 256}, "num_classes is from 1 to 255"),
        ({"num_classes": None}, "the masks have numbers, whose classes are not known"),
        ({"classes": ["a", "b"]}, "got 2 names in SegmentationFolder, and num_classes 4"),
        ({"class_map": {0: 4}}, "class_map gives classes from 0 to 3, or 255 to ignore a number; got 0: 4"),
        ({"class_map": {0: 300}, "num_classes": None}, "class_map gives classes from 0 to 254, .*; got 0: 300"),
        ({"class_map": {0: 1, 1: -1}, "num_classes": None}, "class_map gives classes from 0 to 254, .*; got 1: -1"),
        ({"class_map": {0: 255}, "num_classes": None}, "got no class for any number"),
        (
            {"class_map": {0: "a", 1: "b"}},
            r"got 4, and 2 names in SegmentationFolder: class_map. Leave out num_classes",
        ),
        ({"class_map": {70000: 0}}, "a mask holds numbers from 0 to 65,535; got 70000"),
        ({"class_map": {0: "rod"}, "classes": ["road", "b", "c", "d"]}, "Did you mean 'road'"),
        ({"class_map": {0: "road", 1: 3}}, "got both"),
        ({"class_map": {0: 1}, "reduce_zero": True}, "reduce_zero says the class of each number"),
        ({"eval_size": (512, 100)}, "eval_size is the length of the short side"),
        (
            {"mask": "{folder}/{stem}_no.png"},
            r"20 of 20 images have no mask, such as 00.jpg, whose mask would be 00_no",
        ),
    ],
)
def test_wrong_arguments_give_one_message(write_folder: WriteFolder, options: dict[str, Any], message: str) -> None:
    folder = write_folder()
    with pytest.raises(DataError, match=message):
        two_folders(folder, **options).setup()


@pytest.mark.parametrize("layout", [None, "folders", "voc"])
def test_num_classes_contradicts_the_names_of_the_data(write_folder: WriteFolder, layout: str | None) -> None:
    split = as_layout("folders" if layout is None else layout, "train")
    folder = write_folder(**split)
    (folder / "ImageSets/Segmentation").mkdir(parents=True)
    (folder / "ImageSets/Segmentation/train.txt").write_text("".join(f"{n:02d}\n" for n in range(8)))
    (folder / "classes.json").write_text('["a", "b", "c", "d"]')
    (folder / "masks").mkdir(exist_ok=True)
    (folder / "masks/classes.json").write_text('["a", "b", "c", "d"]')
    where: dict[str, Any] = {"train": str(folder), "layout": layout}
    if layout is None:
        where = {"train": str(folder / "images/train"), "train_masks": str(folder / "masks/train")}
    with pytest.raises(DataError, match=r"num_classes is the number of the classes; got 7, and (4|21) names in"):
        SegmentationFolder(**where, num_classes=7, **SMALL).setup()
    SegmentationFolder(**where, **SMALL).setup()


def test_images_that_share_a_mask_are_pointed_out(write_folder: WriteFolder, caplog: pytest.LogCaptureFixture) -> None:
    folder = write_folder()
    (folder / "images/07.jpeg").write_bytes((folder / "images/07.jpg").read_bytes())
    data = two_folders(folder)
    data.setup()
    assert data.num_samples("train") == 21
    assert "train: 2 images share their mask with another image, such as 07.jpeg, 07.jpg, whose mask is" in caplog.text


def test_a_layout_or_the_user_may_settle_255(write_folder: WriteFolder, caplog: pytest.LogCaptureFixture) -> None:
    folder = write_folder(
        **as_layout("cityscapes", "train"), change=lambda mask: np.where(mask, 255, 0).astype(np.uint8)
    )
    SegmentationFolder(str(folder), layout="cityscapes", **SMALL).setup()
    plain = {"train": str(folder / "leftImg8bit/train"), "train_masks": str(folder / "gtFine/train")}
    plain |= {"mask": "{folder}/{stem}_gtFine_labelTrainIds.png", "image_ending": "_leftImg8bit"}
    SegmentationFolder(**plain, class_map={0: "road", 255: 255}, **SMALL).setup()
    SegmentationFolder(**plain, ignore=[255], num_classes=2, **SMALL).setup()
    assert "If their 255 is an object" not in caplog.text
    SegmentationFolder(**plain, num_classes=2, **SMALL).setup()
    assert "If their 255 is an object" in caplog.text


def test_validation_may_name_fewer_classes(write_folder: WriteFolder) -> None:
    for part, names in (("a", '["a", "b", "c", "d"]'), ("b", '["b", "c", "d"]')):
        folder = write_folder(f"{part}/images", f"{part}/masks", change=lambda mask: mask.clip(0, 2))
        (folder / part / "masks/classes.json").write_text(names)
    data = SegmentationFolder(
        str(folder / "a/images"), str(folder / "b/images"), train_masks=str(folder / "a/masks"),
        val_masks=str(folder / "b/masks"), **SMALL,
    )  # fmt: skip
    assert set(torch.cat([mask.flatten() for mask in evaluated(data)]).tolist()) == {1, 2, 3}
    assert int(next(iter(data.train_dataloader()))["mask"].min()) < 4


def test_masks_of_two_numbers_alone_are_pointed_out(
    write_folder: WriteFolder, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_folder(change=lambda mask: np.where(mask > 1, 255, 0).astype(np.uint8))
    two_folders(folder, num_classes=2).setup()
    assert "have class 0 alone" in caplog.text and "class_map such as {0: background, 255: object}" in caplog.text
    caplog.clear()
    two_folders(folder, num_classes=None, class_map={0: "background", 255: "object"}).setup()
    assert caplog.text == ""


def test_what_has_no_partner_is_counted(write_folder: WriteFolder, caplog: pytest.LogCaptureFixture) -> None:
    folder = write_folder()
    (folder / "images/07.jpg").unlink()
    (folder / "masks/03.png").unlink()
    (folder / "masks/05.png").rename(folder / "masks/05.PNG")
    data = two_folders(folder)
    data.setup()
    assert "left out 1: masks without an image: 07.png" in caplog.text
    batches = list(data.train_dataloader())
    assert len(batches) == 4 and all(len(batch["image"]) == 4 for batch in batches)
    assert data.bad_samples()["train"] == {"images without a mask": {str(folder / "images"): 1}}


def test_a_list_of_classes_in_another_order_renumbers_the_pixels(write_folder: WriteFolder) -> None:
    folder = write_folder()
    options: dict[str, Any] = {"val": str(folder / "images"), "val_masks": str(folder / "masks"), "num_classes": None}
    as_stored = evaluated(two_folders(folder, classes=["a", "b", "c", "d"], **options))
    data = two_folders(folder, classes=["a", "b", "c", "d"], **options)
    data.label_by(["x", "d", "c", "b", "a"], "a checkpoint")
    renumbered = evaluated(data)
    table = torch.tensor([4, 3, 2, 1], dtype=torch.uint8)
    assert all(torch.equal(table[old.long()], new) for old, new in zip(as_stored, renumbered, strict=True))
    other = two_folders(folder, classes=["a", "b", "c", "d"], **options)
    other.label_by(["a", "b"], "a checkpoint")
    with pytest.raises(DataError, match="got c, d, which the latter lacks"):
        other.setup()
