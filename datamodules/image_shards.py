"""Data module for images in webdataset tars: the order is planned by a seed, and every lost sample is counted."""

from typing import Any

from ssmpretrain.datamodules.image_data import ImageData
from ssmpretrain.datamodules.splits.shard_source import ShardSource
from ssmpretrain.datamodules.splits.shard_split import ShardSplit


class ImageShards(ImageData):
    """Images from webdataset tar files, one image (jpg, jpeg, png, webp) per sample, with or without a label.

    A label is the text of the member `cls`, or the field `label` of the member `json`. It is an integer, or a name in
    the `classes.json` beside the shards. If shards lie beside different lists, labels are translated by the names of
    the classes to the first list of `train`. A label that cannot be read counts as no label, unless an objective or a
    command uses labels.

    Training reads shards and samples in a new random order each epoch, applies MAE's augmentation (random resized crop,
    bicubic, flip), and yields full batches, the same number on every rank. Validation reads each sample once, in order.
    Batches are `ImageBatch`.

    Args:
        train: Tar files: a path, a folder, a brace pattern "train-{000000..001023}.tar", a glob, or a list of these.
            URLs (http, https, s3, gs, hf) are allowed; copies of their files are kept in `cache`.
        val: Tar files for validation, in the same forms; None for no validation.
        shuffle_buffer: Number of samples that a rank shuffles together, at least 1. They come from consecutive shards
            in the order of the epoch. They are not held in memory.
        cache: Folder for copies of shards on servers, best on a local disk; None for `$SSMPRETRAIN_CACHE/shards`.
        cache_limit: Largest size of the cache, as "100G"; None for half of the available space on the disk, at most
            100 GiB.
        storage_options: Options for the library that reads from the server. For S3 they are arguments of
            s3fs.S3FileSystem, as {"anon": true, "endpoint_url": "https://..."}. For http they are {"headers":
            {"Authorization": "Bearer ..."}} and {"redirects": ["cdn.example.org"]}, which lists other hosts that the
            server may redirect to.
        **kwargs: Arguments of `ImageData`: batch_size, num_workers, image_size, interpolation, crop_scale,
            horizontal_flip, auto_augment, color_jitter, photometric, views, random_erasing, repeats, epoch_samples,
            remainder, eval_crop_ratio, mean, std, seed, max_bad_fraction, max_pixels, require_labels.

    Raises:
        DataError: If an argument is out of range; in `setup`, if too many samples are lost, or images are too few.
        FileNotFoundError: In `setup`, if shards are missing.
    """

    def __init__(
        self,
        train: str | list[str],
        val: str | list[str] | None = None,
        *,
        shuffle_buffer: int = 5000,
        cache: str | None = None,
        cache_limit: str | None = None,
        storage_options: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self._source = ShardSource(type(self).__name__, shuffle_buffer, cache, cache_limit, storage_options)
        self.train = train
        self.val = val
        self.shuffle_buffer = shuffle_buffer
        self.cache = cache
        self.cache_limit = cache_limit
        self.storage_options = storage_options

    @property
    def _block(self) -> int:
        return self.shuffle_buffer

    @property
    def _absent(self) -> tuple[type[Exception], ...]:
        return self._source.absent

    def _open(self, split: str) -> ShardSplit:
        pattern = self.train if split == "train" else self.val
        assert pattern is not None, split
        return ShardSplit(**self._source.arguments(pattern, split, self.max_bad_fraction))
