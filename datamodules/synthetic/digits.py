"""Digits: handwritten digits on crops of two photographs, without a download."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from torchvision.io import encode_png

from ssmpretrain.base.cache_folder import cache_folder
from ssmpretrain.base.errors import DataError
from ssmpretrain.base.seeds import random_generator, stable_hash
from ssmpretrain.datamodules.image_shards import ImageShards
from ssmpretrain.datamodules.shards.pack import ShardWriter
from ssmpretrain.datamodules.splits.shard_split import ShardSplit
from ssmpretrain.datamodules.synthetic.packed_once import pack_once

Ink = Literal["white", "coloured"]

_VERSION = 2  # version of the pictures; part of the name of the cache folder
_SHARDS = 8  # number of shards per split
_HEIGHTS = {"white": (0.4, 0.7), "coloured": (0.4, 0.75)}  # of a digit, as a fraction of the side of the picture
_CONTRAST = {"white": 0.1, "coloured": 0.05}  # deviation of the photograph in [0, 1]
_DARKER = 0.35  # least difference between the brightness of the paper and of coloured ink


class Digits(ImageShards):
    """Handwritten digits on natural backgrounds, packed into shards on first use and read back as `ImageShards`.

    Each image shows one of the 1797 digits (8 x 8 pixels) in scikit-learn at a random size and place over a random crop
    of one of its two photographs. A person reads the digit at once, but a linear classifier on raw pixels mostly fails.
    Training and validation share neither a handwritten digit nor a part of a photograph.

    White ink lies over a darkened photograph. Coloured ink has a random colour; it lies over paper of another random
    colour, which is lighter and on which the photograph is faint. There the colour of a pixel says little about the
    digit: neighbours among raw pixels find the right one half as often as with white ink.

    Args:
        train_images: Number of training images, at least 1.
        val_images: Number of validation images, at least 1.
        image_size: Side of the packed images and of the images in batches, in pixels, at least 32.
        crop_scale: As in `ImageData`; the default keeps most digits inside the crop.
        horizontal_flip: As in `ImageData`; off by default, because a mirrored digit is not a digit.
        eval_crop_ratio: As in `ImageData`; the default keeps the whole image.
        digits_seed: Decides the pictures; `seed` decides order and augmentation.
        ink: "white" or "coloured".
        **kwargs: Further arguments of `ImageShards` and `ImageData`.

    Raises:
        DataError: If an argument is out of range, or the cache folder cannot be written.

    Shards are written to a folder in `$SSMPRETRAIN_CACHE`, or in `~/.cache/ssmpretrain`. The name of the folder depends
    on the arguments that decide the pictures.
    """

    def __init__(
        self,
        train_images: int = 8000,
        val_images: int = 1000,
        image_size: int = 32,
        crop_scale: tuple[float, float] = (0.8, 1.0),
        horizontal_flip: bool = False,
        eval_crop_ratio: float = 1.0,
        digits_seed: int = 0,
        ink: Ink = "white",
        **kwargs: Any,
    ) -> None:
        for name, value, least in (
            ("train_images", train_images, 1),
            ("val_images", val_images, 1),
            ("image_size", image_size, 32),
        ):
            if not isinstance(value, int) or value < least:
                raise DataError(f"Digits: {name} is a number of at least {least}; got {value}.")
        if ink not in get_args(Ink):
            raise DataError(f"Digits: ink is white or coloured; got {ink!r}. Write ink: coloured, say.")
        kind = "digits" if ink == "white" else f"{ink}-digits"
        name = f"{kind}-{stable_hash(_VERSION, train_images, val_images, image_size, digits_seed):016x}"
        self.folder = cache_folder() / name
        self.train_images = train_images
        self.val_images = val_images
        self.digits_seed = digits_seed
        self.ink: Ink = ink
        super().__init__(
            train=str(self.folder / "train-*.tar"),
            val=str(self.folder / "val-*.tar"),
            image_size=image_size,
            crop_scale=crop_scale,
            horizontal_flip=horizontal_flip,
            eval_crop_ratio=eval_crop_ratio,
            **kwargs,
        )

    def prepare_data(self) -> None:
        """Pack the shards unless they exist; this takes about ten seconds, once."""
        pack_once(self.folder, self._pack, type(self).__name__)

    def _open(self, split: str) -> ShardSplit:
        self.prepare_data()  # a data module may be used without a Trainer
        return super()._open(split)

    def _pack(self, folder: Path) -> None:
        self._pack_split(folder, "train", self.train_images)
        self._pack_split(folder, "val", self.val_images)

    def _pack_split(self, folder: Path, split: str, count: int) -> None:
        height, width = self.image_size
        assert height == width
        with ShardWriter(folder, split, samples_per_shard=-(-count // _SHARDS)) as writer:
            for number, (image, label) in enumerate(draw(split, count, height, self.digits_seed, self.ink)):
                png = encode_png(image, compression_level=1).numpy().tobytes()
                writer.write(f"{split}{number:06d}", {"png": png, "cls": str(label).encode()})


def draw(split: str, count: int, size: int, seed: int, ink: Ink = "white") -> Iterator[tuple[Tensor, int]]:
    """Yield the pictures of a split, (3, size, size) uint8, each with its digit.

    Args:
        split: "train" or "val"; the two share no handwritten digit and no part of a photograph.
        count: Number of pictures.
        size: Side of the pictures in pixels.
        seed: Decides the pictures.
        ink: As in `Digits`.
    """
    from sklearn.datasets import load_digits, load_sample_images

    source = load_digits()
    mine = random_generator("digits", seed).permutation(len(source.target))
    mine = mine[: len(mine) * 4 // 5] if split == "train" else mine[len(mine) * 4 // 5 :]
    photographs = [
        _region(torch.from_numpy(photo.copy()).permute(2, 0, 1), split) for photo in load_sample_images().images
    ]
    rng = random_generator("pictures", seed, split)
    for number in range(count):
        chosen = int(mine[number % len(mine)])
        crop = _crop(photographs[int(rng.integers(len(photographs)))], size, _CONTRAST[ink], rng)
        image, colour = _white_on_dark(crop) if ink == "white" else _coloured(crop, rng)
        yield _write_digit(image, source.images[chosen], colour, _HEIGHTS[ink], rng), int(source.target[chosen])


def _region(photo: Tensor, split: str) -> Tensor:
    """Return the left three quarters of a photograph for training, the rest for validation."""
    border = photo.shape[-1] * 3 // 4
    return photo[..., :border] if split == "train" else photo[..., border:]


def _crop(photo: Tensor, size: int, contrast: float, rng: np.random.Generator) -> Tensor:
    """Return a random square of a photograph, (3, size, size), with mean 0 and a deviation of about `contrast`."""
    side = int(rng.integers(48, min(photo.shape[-2:]) + 1))
    top, left = (int(rng.integers(length - side + 1)) for length in photo.shape[-2:])
    crop = photo[:, top : top + side, left : left + side].float().unsqueeze(0) / 255
    image = F.interpolate(crop, (size, size), mode="bilinear", antialias=True, align_corners=False)[0]
    image = image.flip(-1) if rng.random() < 0.5 else image
    centred = image - image.mean(dim=(1, 2), keepdim=True)
    return contrast * centred / (image.std() + 0.02)  # 0.02: a clear sky stays smooth


def _white_on_dark(crop: Tensor) -> tuple[Tensor, Tensor]:
    """Return a background with fixed brightness and contrast, (3, size, size), and white, (3, 1, 1); in [0, 1]."""
    return (0.35 + crop).clamp(0, 1), torch.full((3, 1, 1), 0.95)


def _coloured(crop: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Return coloured paper with a faint photograph, (3, size, size), and darker ink, (3, 1, 1); in [0, 1]."""
    paper = (_colour(float(rng.uniform(0.45, 0.9)), rng) + crop).clamp(0, 1)
    lightest = max(0.05, paper.mean().item() - _DARKER)
    return paper, _colour(float(rng.uniform(0, lightest)), rng).clamp(0, 1)


def _colour(brightness: float, rng: np.random.Generator) -> Tensor:
    """Return a random colour whose mean is `brightness`: (3, 1, 1)."""
    tint = torch.from_numpy(rng.uniform(-0.25, 0.25, 3)).float()
    return (brightness + tint - tint.mean()).view(3, 1, 1)


def _write_digit(
    image: Tensor,
    digit: NDArray[np.float64],
    colour: Tensor,
    heights: tuple[float, float],
    rng: np.random.Generator,
) -> Tensor:
    """Write a digit at a random place, with a height in this range of fractions. Return the image as uint8."""
    size = image.shape[-1]
    side = round(size * float(rng.uniform(*heights)))
    top, left = (int(rng.integers(size - side + 1)) for _ in range(2))
    ink = F.interpolate(
        torch.from_numpy(digit / 16).float()[None, None], (side, side), mode="bicubic", align_corners=False
    )[0]
    ink = ((ink - 0.25) * 2).clamp(0, 1)  # a crisper stroke
    behind = image[:, top : top + side, left : left + side]
    behind += ink * (colour - behind)
    return (image * 255).round().to(torch.uint8)
