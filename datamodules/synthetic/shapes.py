"""Shapes: drawn scenes with captions and labels, for contrastive pretraining and zero-shot tests without a download."""

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torchvision.io import encode_png

from ssmpretrain.base.cache_folder import cache_folder
from ssmpretrain.base.errors import DataError
from ssmpretrain.base.seeds import random_generator, stable_hash
from ssmpretrain.datamodules.image_text_shards import ImageTextShards
from ssmpretrain.datamodules.shards.pack import ShardWriter
from ssmpretrain.datamodules.splits.shard_split import ShardSplit
from ssmpretrain.datamodules.synthetic.packed_once import pack_once
from ssmpretrain.datamodules.synthetic.shape_captions import TEMPLATES, captions, full_captions
from ssmpretrain.datamodules.synthetic.shape_drawing import draw, place
from ssmpretrain.datamodules.synthetic.shape_scenes import (
    CLASSES,
    MOST_VALIDATION,
    Scene,
    held_out_classes,
    training_scenes,
    validation_scenes,
)

_VERSION = 1  # version of the pictures and captions; part of the name of the cache folder
_SHARDS = 8  # number of shards per split


class Shapes(ImageTextShards):
    """Drawn shapes with captions, packed into shards on first use and read back as `ImageTextShards`.

    A scene shows one object ("a small red circle at the top left"), two to four equal objects ("three blue squares") or
    two objects in a relation ("a red circle above a green square"). Each scene has several captions. A class is a
    colour and a shape; there are 48 classes. A scene of one object has its class as label. Eight classes, one for each
    colour, appear in no training scene. A model that recognises them in validation has learned colour and shape
    separately.

    Validation shows scenes of one object, the same number for each class, and unlabelled scenes of several objects. No
    two scenes have the same meaning, and each caption distinguishes its scene from all others, as retrieval needs.

    Args:
        train_images: Number of training images, at least 1.
        val_images: Number of validation images, 1 to 4000. About half show one object; with at least 96 images, all
            classes appear among them.
        image_size: Side of the packed images and of the images in batches, in pixels, at least 32.
        caption: As in `ImageTextShards`; "txt" is one full caption, the same in every epoch.
        crop_scale: As in `ImageData`; the default keeps the objects in the picture.
        horizontal_flip: As in `ImageData`; off by default, because captions say "left" and "right".
        eval_crop_ratio: As in `ImageData`; the default keeps the whole image.
        shapes_seed: Decides the scenes and the classes held out; `seed` decides order and augmentation.
        **kwargs: Further arguments of `ImageTextShards`, `ImageShards` and `ImageData`.

    Attributes:
        classes: Names of the classes in the order of their labels, as "red circle".
        templates: Templates of captions for the names of classes, as "a picture of a {}".
        held_out: Labels of the classes that training never shows, ascending.

    Raises:
        DataError: If an argument is out of range, or the cache folder cannot be written.

    Shards are written to a folder in `$SSMPRETRAIN_CACHE`, or in `~/.cache/ssmpretrain`. The name of the folder depends
    on the arguments that decide the pictures. A sample has the members png, txt (one caption), json (objects, size,
    place, relation, captions) and, for one object, cls.
    """

    def __init__(
        self,
        train_images: int = 10_000,
        val_images: int = 960,
        image_size: int = 64,
        caption: str | list[str] = "json.captions",
        crop_scale: tuple[float, float] = (0.85, 1.0),
        horizontal_flip: bool = False,
        eval_crop_ratio: float = 1.0,
        shapes_seed: int = 0,
        **kwargs: Any,
    ) -> None:
        _check_range("train_images", train_images, 1, 10**9)
        _check_range("val_images", val_images, 1, MOST_VALIDATION)
        _check_range("image_size", image_size, 32, 4096)
        name = f"shapes-{stable_hash(_VERSION, train_images, val_images, image_size, shapes_seed):016x}"
        self.folder = cache_folder() / name
        self.train_images = train_images
        self.val_images = val_images
        self.shapes_seed = shapes_seed
        self.classes = list(CLASSES)
        self.templates = list(TEMPLATES)
        self.held_out = held_out_classes(shapes_seed)
        super().__init__(
            train=str(self.folder / "train-*.tar"),
            val=str(self.folder / "val-*.tar"),
            caption=caption,
            image_size=image_size,
            crop_scale=crop_scale,
            horizontal_flip=horizontal_flip,
            eval_crop_ratio=eval_crop_ratio,
            **kwargs,
        )

    def prepare_data(self) -> None:
        """Draw and pack the shards unless they exist; this takes about ten seconds, once."""
        pack_once(self.folder, self._pack, type(self).__name__)

    def _open(self, split: str) -> ShardSplit:
        self.prepare_data()  # a data module may be used without a Trainer
        return super()._open(split)

    def _pack(self, folder: Path) -> None:
        self._pack_split(folder, "train", training_scenes(self.train_images, self.shapes_seed), self.train_images)
        self._pack_split(folder, "val", validation_scenes(self.val_images, self.shapes_seed), self.val_images)
        for name, content in (("classes", self.classes), ("held_out", [CLASSES[label] for label in self.held_out])):
            (folder / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    def _pack_split(self, folder: Path, split: str, scenes: Iterable[Scene], count: int) -> None:
        rng = random_generator("drawing", self.shapes_seed, split)
        say = captions if split == "train" else full_captions
        with ShardWriter(folder, split, samples_per_shard=-(-count // _SHARDS)) as writer:
            for number, scene in enumerate(scenes):
                objects = place(scene, rng)
                image = torch.from_numpy(draw(objects, self.image_size[0], rng)).permute(2, 0, 1)
                said = say(scene)
                described = [{**asdict(thing), "class": CLASSES[thing.label]} for thing in objects]
                about = {**asdict(scene), "objects": described, "captions": said}
                fields = {
                    "png": encode_png(image, compression_level=1).numpy().tobytes(),
                    "txt": said[0].encode(),
                    "json": json.dumps(about).encode(),
                }
                if scene.label is not None:
                    fields["cls"] = str(scene.label).encode()
                writer.write(f"{split}{number:06d}", fields)


def _check_range(name: str, value: int, least: int, most: int) -> None:
    if not isinstance(value, int) or not least <= value <= most:
        raise DataError(f"Shapes: {name} is a number from {least:,} to {most:,}; got {value}.")
