"""Images that a person names, file by file or by folder, as evaluation sees them."""

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
    """Resolve files and folders, in the order given.

    Args:
        names: Image files, and folders that hold some (at any depth).
        per_folder: Take this many images of a folder, the first in sorted order; at least 1.
        where: Opens every message.

    Raises:
        FileNotFoundError: If a path does not exist; says what is there instead.
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
    """Decode images, scale and centre-crop them to one size, which keeps all of the shorter side, and normalise them.

    Args:
        paths: Files, at least one: JPEG, PNG or WebP, RGB or convertible to it, of one frame and `MAX_PIXELS` at most.
        image_size: H, W.
        mean, std: Per channel, of images in [0, 1]; std is positive.
        where: Opens every message.

    Returns:
        (B, 3, H, W), float32.

    Raises:
        DataError: If a file cannot be read, or data modules would count it as a bad sample; names it.
    """
    batcher = Batcher(ImageTransform(image_size, None, False, eval_crop_ratio=1.0), mean, std, seed=0)
    return _prepared(batcher, (_decode(path, where) for path in paths))


def photograph_crops(
    count: int, image_size: tuple[int, int], mean: Sequence[float], std: Sequence[float], seed: int = 0
) -> Tensor:
    """Return random crops of scikit-learn's two photographs: real images without a download.

    A crop covers between a fifth and all of a photograph's area and is resized, as MAE's training images are.

    Args:
        count: B, at least 1; the two photographs take turns.
        image_size: H, W.
        mean, std: As in `load_images`.
        seed: Decides the crops.

    Returns:
        (B, 3, H, W), float32.
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
