"""Images straight from a folder: for a first try, or for data small enough to need no packing."""

from typing import Any

from ssmpretrain.datamodules.image_data import ImageData
from ssmpretrain.datamodules.splits.folder_split import FolderSplit


class ImageFolder(ImageData):
    """Images (jpg, jpeg, png, webp) in a folder and the folders below it; first-level sub-folders are the classes.

    Labels number the class folders of `train` in sorted order, unless a checkpoint numbers them otherwise. An image in
    the folder itself has label -1. Links to folders and files are followed, as classes often lie on several disks. A
    folder is read once, by its real name if it is one of those below, and a link to a folder that holds it is not
    entered; what is left out is said. Batches, transforms and order are those of `ImageShards`. Pack large data, or
    data on a network, into shards.

    Args:
        train: The folder.
        val: A folder whose sub-folders are among those of `train`, for validation; None for none.
        **kwargs: Arguments of `ImageData`: batch_size, num_workers, image_size, interpolation, crop_scale,
            horizontal_flip, auto_augment, color_jitter, photometric, random_erasing, repeats, epoch_samples,
            remainder, eval_crop_ratio, mean, std, seed, max_bad_fraction, max_pixels, require_labels.

    Raises:
        DataError: If an argument is out of range; in `setup`, if there are no images or too few.
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
