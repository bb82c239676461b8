"""Images that a person names by file or by folder, prepared as in evaluation."""

import logging
from collections.abc import Iterable, Sequence
from itertools import cycle, islice
from pathlib import Path

import torch
from torch import Tensor

from ssmpretrain.base.errors import DataError, PathMissing
from ssmpretrain.base.seeds import random_state_kept, stable_hash
from ssmpretrain.base.shown_names import shown
from ssmpretrain.datamodules.decoding.batcher import Batcher
from ssmpretrain.datamodules.decoding.decode import MAX_PIXELS, check_pixels, decode_rgb
from ssmpretrain.datamodules.decoding.transform import ImageTransform
from ssmpretrain.datamodules.faults.bad_samples import BadSample
from ssmpretrain.datamodules.files.folders import look_around
from ssmpretrain.datamodules.files.image_files import describe_left_out, find_images, read_file
from ssmpretrain.datamodules.labels.classes import UNLABELLED

_log = logging.getLogger(__name__)


def find_named_images(names: Sequence[str | Path], per_folder: int, *, where: str) -> list[Path]:
    """Return the image files that a list of files and folders names, in the given order.

    Args:
        names: Image files, and folders with images at any depth.
        per_folder: Number of images to take from each folder, the first in sorted order; at least 1.
        where: Name of the command or class, which opens every message.

    Raises:
        FileNotFoundError: If a path does not exist. The message lists what is there instead.
        DataError: If a folder holds no image.
    """
    found: list[Path] = []
    for name in names:
        path = Path(name).expanduser()
        if path.is_dir():
            images = find_images(path, where=where)
            found += [path / image for image in images.paths[:per_folder]]
            for line in describe_left_out(images.left_out):
                _log.warning("%s: %s: %s.", where, path, line)
        elif path.exists():
            found.append(path)
        else:
            raise PathMissing(f"{where}: no file or folder {path}; {look_around(path)}. Correct the path.")
    return found


def load_images(
    paths: Sequence[Path], image_size: tuple[int, int], mean: Sequence[float], std: Sequence[float], *, where: str
) -> Tensor:
    """Decode image files, resize and centre-crop them to one size, and normalise them.

    The crop keeps the whole shorter side of each image.

    Args:
        paths: At least one file: JPEG, PNG or WebP, convertible to RGB, with one frame and at most `MAX_PIXELS` pixels.
        image_size: (H, W) of the result.
        mean, std: Mean and standard deviation of each channel, for images in [0, 1]; std is positive.
        where: Name of the command or class, which opens every message.

    Returns:
        Images, (B, 3, H, W), float32.

    Raises:
        DataError: If a file cannot be read, or data modules would count it as a bad sample. The message names the file.
    """
    batcher = Batcher(ImageTransform(image_size, None, False, eval_crop_ratio=1.0), mean, std, seed=0)
    return _prepared(batcher, (_decode(path, where) for path in paths))


def photograph_crops(
    count: int, image_size: tuple[int, int], mean: Sequence[float], std: Sequence[float], seed: int = 0
) -> Tensor:
    """Return random crops of the two photographs in scikit-learn: real images without a download.

    Each crop covers between a fifth and all of the area of a photograph, and is resized. MAE crops training images in
    the same way.

    Args:
        count: Number B of crops, at least 1; the two photographs take turns.
        image_size: (H, W) of the result.
        mean, std: Mean and standard deviation of each channel, as in `load_images`.
        seed: Decides the crops.

    Returns:
        Images, (B, 3, H, W), float32.
    """
    from sklearn.datasets import load_sample_images

    photographs = [torch.from_numpy(photo.copy()).permute(2, 0, 1) for photo in load_sample_images().images]
    batcher = Batcher(ImageTransform(image_size, (0.2, 1.0), True, eval_crop_ratio=1.0), mean, std, seed)
    return _prepared(batcher, islice(cycle(photographs), count))


def _decode(path: Path, where: str) -> Tensor:
    try:
        content = read_file(path)
        check_pixels(content, MAX_PIXELS)
        return decode_rgb(content)
    except BadSample as bad:
        problem = f"is no image that can be read: {bad.describe()}"
    except OSError as error:
        problem = f"cannot be read: {error.strerror or error}"
    raise DataError(f"{where}: {shown(str(path))} {problem}. Leave it out, or convert it.")


def _prepared(batcher: Batcher, images: Iterable[Tensor]) -> Tensor:
    """Transform, stack and normalise decoded images."""
    with random_state_kept():
        samples = [
            batcher.transformed({"image": image, "label": UNLABELLED, "key": ""}, stable_hash(batcher.seed, number))
            for number, image in enumerate(images)
        ]
        return batcher.collate(samples)["image"]
