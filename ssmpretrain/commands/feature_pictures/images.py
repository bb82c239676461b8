"""Images that `neighbours` and `pca` read: options, batches, and the pixels that an encoder sees.

Legend: B images, H x W pixels
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ssmpretrain.base.errors import DataError, UserError
from ssmpretrain.commands.shared.evaluation_data import EvaluationData, skipped_lines
from ssmpretrain.commands.shared.frozen_encoder import FrozenEncoder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the images, and the options that decide how they are read."""
    parser.add_argument(
        "images",
        nargs="+",
        metavar="IMAGES",
        help="a folder of images at any depth, whose first sub-folders are the classes; image files, several folders "
        "or quoted patterns, without classes; or shards",
    )
    data = parser.add_argument_group("data")
    data.add_argument("--batch-size", type=int, default=64, help="images per batch (default: %(default)s)")
    data.add_argument("--num-workers", type=int, default=2, help="processes that decode images (default: %(default)s)")


def check_count(value: int | None, option: str, *, where: str) -> None:
    """Raise a `UserError` unless the value of an option is None or at least 1."""
    if value is not None and value < 1:
        raise UserError(f"{where}: {option} is at least 1; got {value}.")


@dataclass(frozen=True, eq=False)
class Picture:
    """An image as an encoder sees it.

    Attributes:
        key: Name of the image in its data set.
        identity: Text that is equal for the same file under other names.
        label: Name of its class; None without a label.
        pixels: Pixels (3, H, W), uint8, after resizing and cropping.
    """

    key: str
    identity: str
    label: str | None
    pixels: Tensor

    def is_same(self, other: Picture) -> bool:
        """Return whether both are the same image, not two images with equal pixels."""
        return self.identity == other.identity and self.looks_like(other)

    def looks_like(self, other: Picture) -> bool:
        """Return whether all pixels are equal."""
        return torch.equal(self.pixels, other.pixels)


Pictured = Iterable[tuple[Tensor, list[Picture]]]  # batches of normalised images (B, 3, H, W), and their pictures


def pictured(batches: Iterable[Mapping[str, Any]], module: Any) -> Iterator[tuple[Tensor, list[Picture]]]:
    """Yield the normalised images (B, 3, H, W) of batches of a data module, and their pictures.

    Args:
        batches: Batches of images, as data modules of this package yield them.
        module: The data module, for the normalisation and the names of the classes.
    """
    mean, std = (torch.tensor(numbers).view(3, 1, 1) for numbers in (module.mean, module.std))
    identity = getattr(module, "identity", str)
    for batch in batches:
        pictures = []
        for image, label, key in zip(batch["image"], batch["label"].tolist(), batch["key"], strict=True):
            pixels = ((image * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
            pictures.append(Picture(key, identity(key), _name(label, module.classes), pixels))
        yield batch["image"], pictures


def _name(label: int, names: Sequence[str]) -> str | None:
    if label < 0 or len(names) == 1:  # a single class tells nothing
        return None
    return names[label] if label < len(names) else str(label)


class PictureSource:
    """Images that a command names, in batches.

    Args:
        data: The images; its module is of `NamedImages`.
        noun: Name of the images for messages.
    """

    def __init__(self, data: EvaluationData, noun: str) -> None:
        self._data, self._noun = data, noun

    def __len__(self) -> int:
        """Return the number of images, including those that cannot be used."""
        return int(self._data.module.num_samples("val"))

    def batches(self, limit: int | None) -> Iterator[tuple[Tensor, list[Picture]]]:
        """Yield what `pictured` does; with `limit`, that many images, evenly spread.

        Raises:
            DataError: At the end, if no image could be used.
        """
        empty = True
        for batch in pictured(self._data.batches("val", limit), self._data.module):
            empty = False
            yield batch
        if empty:
            raise DataError(f"{self._data.where}: none of {self._noun} could be used. Name other images.")

    def labelled(self, images: Pictured) -> Iterator[tuple[Tensor, list[Picture]]]:
        """Yield batches of other images, labelled with the class folder of these images that they lie in, if any."""
        for batch, pictures in images:
            yield batch, [replace(one, label=one.label or self._class_of(one)) for one in pictures]

    def _class_of(self, picture: Picture) -> str | None:
        module = self._data.module
        return module.class_of(picture.identity) if len(module.classes) > 1 else None

    def lines(self) -> list[str]:
        """Return lines that count the images left out, if there are any."""
        return skipped_lines(self._noun, self._data.skipped("val"))


def open_images(
    paths: Sequence[str], args: argparse.Namespace, encoder: FrozenEncoder, noun: str = "the images"
) -> PictureSource:
    """Find and check the images at paths, as the options of `add_arguments` say.

    Args:
        paths: Paths as `NamedImages` takes them.
        args: Values of the options.
        encoder: Encoder that the images are for.
        noun: Name of the images for messages.
    """
    from ssmpretrain.datamodules.images_by_path import NamedImages  # torchvision takes seconds to import

    made = encoder.images
    module = NamedImages(
        paths,
        encoder.where,
        image_size=tuple(made["size"]),
        mean=tuple(made["mean"]),
        std=tuple(made["std"]),
        eval_crop_ratio=made["crop_pct"],
        interpolation=made["interpolation"],
        batch_size=args.batch_size,
        num_workers=args.num_workers,
        max_bad_fraction=1.0,  # bad images are named and counted, and the others are drawn
    )
    return PictureSource(EvaluationData(module, encoder.where, "IMAGES"), noun)
