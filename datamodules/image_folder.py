"""Data module for images in a folder: for a first trial, or for small data that need not be packed."""

from typing import Any

from ssmpretrain.datamodules.image_data import ImageData
from ssmpretrain.datamodules.splits.folder_split import FolderSplit


class ImageFolder(ImageData):
    """Images (jpg, jpeg, png, webp) in a folder and all folders below it; first-level sub-folders are the classes.

    Labels number the class folders of `train` in sorted order, unless a checkpoint numbers them in another way. An
    image in the folder itself has label -1. Batches, transforms and order are the same as in `ImageShards`. Pack large
    data, or data on a network, into shards.

    Links to folders and files are followed, because classes often lie on several disks. Each folder is read once, and a
    link to a parent folder is not entered. A warning lists everything that is left out.

    Args:
        train: Folder of the training images.
        val: Folder of the validation images; its sub-folders are among those of `train`. None for no validation.
        **kwargs: Arguments of `ImageData`: batch_size, num_workers, image_size, interpolation, crop_scale,
            horizontal_flip, auto_augment, color_jitter, photometric, views, random_erasing, repeats, epoch_samples,
            remainder, eval_crop_ratio, mean, std, seed, max_bad_fraction, max_pixels, require_labels.

    Raises:
        DataError: If an argument is out of range; in `setup`, if there are too few images.
        FileNotFoundError: In `setup`, if a folder is missing.
    """

    def __init__(self, train: str, val: str | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.train = train
        self.val = val

    def _open(self, split: str) -> FolderSplit:
        folder = self.train if split == "train" else self.val
        assert folder is not None, split
        return FolderSplit(folder, f"{type(self).__name__}: {split}")
