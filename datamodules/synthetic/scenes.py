"""Scenes: drawn scenes with exact class maps and boxes, for dense tasks without a download."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torchvision.io import encode_png

from ssmpretrain.base.cache_folder import cache_folder
from ssmpretrain.base.errors import DataError
from ssmpretrain.base.seeds import random_generator, stable_hash
from ssmpretrain.datamodules.dense.detection_shards import DetectionShards
from ssmpretrain.datamodules.dense.segmentation_shards import SegmentationShards
from ssmpretrain.datamodules.image_shards import ImageShards
from ssmpretrain.datamodules.shards.pack import ShardWriter
from ssmpretrain.datamodules.synthetic.packed_once import pack_once
from ssmpretrain.datamodules.synthetic.scene_drawing import DrawnScene, draw_scene
from ssmpretrain.datamodules.synthetic.shape_scenes import SHAPES
from ssmpretrain.datamodules.targets.detection_transforms import DetectionAugmentation, LargeScaleJitter
from ssmpretrain.datamodules.targets.run_lengths import encode_mask
from ssmpretrain.datamodules.targets.segmentation_transforms import SegmentationAugmentation

_VERSION = 1  # version of the pictures; part of the name of the cache folder
_SHARDS = 8  # number of shards per split


class PackedScenes:
    """The packed scenes that `Scenes`, `SegmentationScenes` and `DetectionScenes` read, each in the form of its task.

    A scene shows one or two large shapes, drawn over lines, dots and a crop of one of scikit-learn's two photographs.
    The shapes overlap; masks and boxes cover their visible pixels. The class is the shape, one of six. Colour, size and
    rotation do not depend on it. Training and validation share no random number and no part of a photograph.

    Args:
        where: Name of the data module, which opens every message.
        train_images: Number of training images, at least 1. Fewer images are the first ones of more images.
        val_images: Number of validation images, at least 1.
        image_size: Side of the packed images, in pixels, at least 32.
        scenes_seed: Decides the pictures.

    Attributes:
        folder: The folder of the shards, in `$SSMPRETRAIN_CACHE` or in `~/.cache/ssmpretrain`. Its name depends on the
            arguments. A sample has the members png, seg.png (0 for the background, 1 to 6 for the shapes) and json
            (`Annotation`, categories 0 to 5).
    """

    def __init__(self, where: str, train_images: int, val_images: int, image_size: int, scenes_seed: int) -> None:
        for name, value, least in (
            ("train_images", train_images, 1),
            ("val_images", val_images, 1),
            ("image_size", image_size, 32),
        ):
            if not isinstance(value, int) or value < least:
                raise DataError(
                    f"{where}: {name} is a whole number of at least {least}; got {value}. Use {least} or more."
                )
        self.where, self.image_size, self.seed = where, image_size, scenes_seed
        self.counts = {"train": train_images, "val": val_images}
        name = f"scenes-{stable_hash(_VERSION, train_images, val_images, image_size, scenes_seed):016x}"
        self.folder = cache_folder() / name

    def pattern(self, split: str) -> str:
        """Return the shards of a split, "train" or "val"."""
        return str(self.folder / f"{split}-*.tar")

    def prepare(self) -> None:
        """Draw and pack the scenes unless they exist: a second for 1000 images, once."""
        pack_once(self.folder, self._pack, self.where)

    def _pack(self, folder: Path) -> None:
        for split, count in self.counts.items():
            rng = random_generator("scenes", self.seed, split)
            photos = photographs(split)
            with ShardWriter(folder, split, samples_per_shard=-(-count // _SHARDS)) as writer:
                for number in range(count):
                    scene = draw_scene(photos, self.image_size, rng)
                    writer.write(f"{split}{number:06d}", _fields(scene))


class _ReadsScenes:
    """Mixin of the three data modules: the scenes are packed before their shards are opened."""

    scenes: PackedScenes

    def prepare_data(self) -> None:
        """Draw and pack the scenes unless they exist; this takes about ten seconds, once."""
        self.scenes.prepare()

    def _open(self, split: str) -> Any:
        self.prepare_data()  # a data module may be used without a Trainer
        return super()._open(split)  # type: ignore[misc]


class Scenes(_ReadsScenes, ImageShards):
    """Images of drawn scenes without labels, for pretraining: see `PackedScenes`.

    Args:
        train_images: Number of training images, at least 1.
        val_images: Number of validation images, at least 1.
        image_size: Side of the packed images and of the images in batches, in pixels, at least 32.
        crop_scale: As in `ImageData`; the default keeps most of the scene.
        eval_crop_ratio: As in `ImageData`; the default keeps the whole image.
        scenes_seed: Decides the pictures; `seed` decides order and augmentation.
        **kwargs: Further arguments of `ImageShards` and `ImageData`.

    Raises:
        DataError: If an argument is out of range, or the cache folder cannot be written.
    """

    def __init__(
        self,
        train_images: int = 8000,
        val_images: int = 500,
        image_size: int = 64,
        crop_scale: tuple[float, float] = (0.8, 1.0),
        eval_crop_ratio: float = 1.0,
        scenes_seed: int = 0,
        **kwargs: Any,
    ) -> None:
        self.scenes = PackedScenes(type(self).__name__, train_images, val_images, image_size, scenes_seed)
        super().__init__(
            train=self.scenes.pattern("train"),
            val=self.scenes.pattern("val"),
            image_size=image_size,
            crop_scale=crop_scale,
            eval_crop_ratio=eval_crop_ratio,
            **kwargs,
        )


class SegmentationScenes(_ReadsScenes, SegmentationShards):
    """Drawn scenes with class maps: the background and six shapes, see `PackedScenes`.

    Args:
        train_images: Number of training images, at least 1.
        val_images: Number of validation images, at least 1.
        image_size: Side of the packed images and of the images in batches, in pixels, at least 32.
        augmentation: As in `SegmentationData`; the default mirrors half of the images and changes nothing else.
        scenes_seed: Decides the pictures; `seed` decides order and augmentation.
        **kwargs: Further arguments of `SegmentationShards` and `SegmentationData`.

    Raises:
        DataError: If an argument is out of range, or the cache folder cannot be written.
    """

    def __init__(
        self,
        train_images: int = 2000,
        val_images: int = 500,
        image_size: int = 64,
        augmentation: SegmentationAugmentation | None = None,
        scenes_seed: int = 0,
        **kwargs: Any,
    ) -> None:
        self.scenes = PackedScenes(type(self).__name__, train_images, val_images, image_size, scenes_seed)
        still = SegmentationAugmentation(scale=(1.0, 1.0), redraws=0, distortion=None)
        super().__init__(
            train=self.scenes.pattern("train"),
            val=self.scenes.pattern("val"),
            classes=["background", *SHAPES],
            image_size=image_size,
            augmentation=augmentation or still,
            **kwargs,
        )


class DetectionScenes(_ReadsScenes, DetectionShards):
    """Drawn scenes with the boxes and masks of six shapes, see `PackedScenes`.

    Args:
        train_images: Number of training images, at least 1.
        val_images: Number of validation images, at least 1.
        image_size: Side of the packed images and of the images in batches, in pixels, at least 32.
        augmentation: As in `DetectionData`; the default mirrors half of the images and changes nothing else.
        scenes_seed: Decides the pictures; `seed` decides order and augmentation.
        **kwargs: Further arguments of `DetectionShards` and `DetectionData`.

    Raises:
        DataError: If an argument is out of range, or the cache folder cannot be written.
    """

    def __init__(
        self,
        train_images: int = 2000,
        val_images: int = 500,
        image_size: int = 64,
        augmentation: DetectionAugmentation | None = None,
        scenes_seed: int = 0,
        **kwargs: Any,
    ) -> None:
        self.scenes = PackedScenes(type(self).__name__, train_images, val_images, image_size, scenes_seed)
        super().__init__(
            train=self.scenes.pattern("train"),
            val=self.scenes.pattern("val"),
            classes=list(SHAPES),
            image_size=image_size,
            augmentation=augmentation or LargeScaleJitter(scale=(1.0, 1.0)),
            **kwargs,
        )


def _fields(scene: DrawnScene) -> dict[str, bytes]:
    """Return the members of a sample."""
    height, width = scene.visible.shape
    objects = [_object(shape, scene.mask(number)) for number, shape in enumerate(scene.shapes)]
    return {
        "png": _png(scene.image.transpose(2, 0, 1)),
        "seg.png": _png(scene.class_map()[None]),
        "json": json.dumps({"height": height, "width": width, "objects": objects}).encode(),
    }


def _png(pixels: NDArray[np.uint8]) -> bytes:
    """Encode an image (channels, H, W) as PNG."""
    png: bytes = encode_png(torch.from_numpy(pixels.copy()), compression_level=1).numpy().tobytes()
    return png


def _object(shape: int, mask: NDArray[np.bool_]) -> dict[str, Any]:
    """Describe the visible pixels of an object, as in `Annotation`."""
    rows, columns = np.nonzero(mask)
    left, top = int(columns.min()), int(rows.min())
    return {
        "category": shape,
        "bbox": [left, top, int(columns.max()) + 1 - left, int(rows.max()) + 1 - top],
        "area": float(mask.sum()),
        "iscrowd": 0,
        "segmentation": encode_mask(mask),
    }


def photographs(split: str) -> list[Image.Image]:
    """Return scikit-learn's two photographs: the left three quarters for training, the rest for validation."""
    from sklearn.datasets import load_sample_images

    photographs = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    borders = [photo.width * 3 // 4 for photo in photographs]
    sides = [
        (0, border) if split == "train" else (border, photo.width)
        for photo, border in zip(photographs, borders, strict=True)
    ]
    return [photo.crop((left, 0, right, photo.height)) for photo, (left, right) in zip(photographs, sides, strict=True)]
