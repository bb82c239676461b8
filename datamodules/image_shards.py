"""Images from webdataset tars, in an order that is planned: the same for the same seed, with nothing silently short."""

import contextlib
import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ssmpretrain.base.errors import DataError, SourceError
from ssmpretrain.datamodules.bad_samples import BadRecord, BadSample
from ssmpretrain.datamodules.decoding.samples import ImageBatch
from ssmpretrain.datamodules.image_data import ImageData
from ssmpretrain.datamodules.labels.classes import UNLABELLED, Labels
from ssmpretrain.datamodules.labels.classes_beside import classes_beside, folder_of
from ssmpretrain.datamodules.order.batches import PlannedBatches
from ssmpretrain.datamodules.order.loader import BatchKey, rank_and_world
from ssmpretrain.datamodules.order.plan import MOST_SAMPLES, first_of_each
from ssmpretrain.datamodules.remote.cache import ShardCache, make_cache
from ssmpretrain.datamodules.remote.fetch_ahead import fetch_ahead
from ssmpretrain.datamodules.remote.server import is_remote
from ssmpretrain.datamodules.shards.changed_shards import check_unchanged
from ssmpretrain.datamodules.shards.damaged_shards import Damage, keep_usable
from ssmpretrain.datamodules.shards.index import IMAGE_EXTENSIONS, ShardIndex, load_indexes, load_layout
from ssmpretrain.datamodules.shards.paths import find_shards
from ssmpretrain.datamodules.shards.reading import RawSample, read_sample, unavailable
from ssmpretrain.datamodules.shards.shard_index import describe_several_images
from ssmpretrain.datamodules.shards.sources import RemoteShard, renew

_log = logging.getLogger(__name__)
_OF_BYTES = ("damaged samples", "truncated shards", "unreadable shards")  # what a damaged copy looks like

_LABELS_READ = 16  # samples whose labels are looked at before training


class ShardBatches(PlannedBatches):
    """Batches from shards, of which each sample is read where it lies.

    Args:
        shards: What to read.
        labels: How those of each are read.
        limit: Read this many samples, spread over the shards; None reads all.
        **options: As in `PlannedBatches`.
    """

    def __init__(
        self, shards: Sequence[ShardIndex], labels: Sequence[Labels], *, limit: int | None = None, **options: Any
    ) -> None:
        super().__init__(first_of_each([shard.samples for shard in shards], limit), **options)
        self.labels = labels
        self.unlabelled = [shard.num_unlabelled for shard in shards]
        self.paths = [shard.path for shard in shards]
        self.bytes = np.asarray([shard.bytes for shard in shards])
        self.mtimes = np.asarray([shard.mtime_ns for shard in shards])
        self.planned = np.asarray([shard.samples for shard in shards])
        # Numbers of another tool's file are believed as far as they go: fewer samples than there are can be read.
        self.counts = np.asarray([shard.samples if shard.extensions else -1 for shard in shards])
        self._is_remote = any(isinstance(path, RemoteShard) for path in self.paths)
        self._longer: set[int] = set()  # shards that were said to have more samples than planned
        self._ahead: list[int] = []  # shards that are fetched while others are read

    def __getitem__(self, key: BatchKey) -> ImageBatch | None:
        if self._is_remote:
            self._fetch_ahead(key)
        return super().__getitem__(key)

    def _fetch_ahead(self, key: BatchKey) -> None:
        """Begin to fetch the shards that the rank will read when it has read those of now."""
        reads = len(self.samples(key).shards)
        near = self.order.block if self.order is not None else float(self.sizes.mean())
        later = key._replace(batch=key.batch + math.ceil(near / reads))
        if later.batch < self.num_batches(key.rank, key.epoch, key.stages):
            ahead = np.unique(self.samples(later).shards).tolist()
            if not set(ahead) <= set(self._ahead):
                fetch_ahead(self.paths[shard] for shard in ahead)
                self._ahead = ahead

    def labels_of(self, shard: int) -> Labels:
        """Those of its folder."""
        return self.labels[shard]

    def known_labels(self) -> Iterator[tuple[str, int]]:
        """What the indexes say of samples without one, and the labels of a few samples on a local disk."""
        for path, number in zip(self.paths, self.unlabelled, strict=True):
            if number:
                yield f"{number:,} sample{'s' * (number != 1)} in {path}", UNLABELLED
        for shard, sample in self.spread(_LABELS_READ):
            if not isinstance(self.paths[shard], RemoteShard):
                with contextlib.suppress(BadSample):  # counted when it is met
                    raw = self.read(shard, sample)
                    if not raw.keys().isdisjoint(IMAGE_EXTENSIONS):
                        yield f"{raw['__key__']} in {self.paths[shard]}", self.labels_of(shard).read(raw)

    def source(self, shard: int) -> tuple[str, int]:
        """The path, and the samples read of it."""
        return str(self.paths[shard]), int(self.sizes[shard])

    def read(self, shard: int, sample: int) -> RawSample:
        """The fields of one sample; of a shard on a server from a new copy if the local one was damaged on its disk."""
        path = self.paths[shard]
        try:
            return self._read(shard, sample)
        except BadSample as bad:
            try:
                if not isinstance(path, RemoteShard) or bad.cause not in _OF_BYTES or not renew(path):
                    raise
            except SourceError as error:
                raise unavailable(path, error) from None
        return self._read(shard, sample)

    def _read(self, shard: int, sample: int) -> RawSample:
        path, size = self.paths[shard], int(self.bytes[shard])
        check_unchanged(path, size, int(self.mtimes[shard]))
        try:
            offsets, crc32, repeated = load_layout(path, size)
        except SourceError as error:
            raise unavailable(path, error) from None
        if sample >= len(offsets) or self.counts[shard] not in (-1, len(offsets)):
            raise BadSample("changed shards", f"it has {len(offsets):,} samples, other than its index said")
        if len(offsets) > self.planned[shard] and shard not in self._longer:
            self._longer.add(shard)
            _log.warning(
                "%s: has %d samples, and _info.json or sizes.json say %d: the others are not read. Write an index with "
                "`ssmpretrain shards index`, or correct the numbers.",
                path,
                len(offsets),
                self.planned[shard],
            )
        last = sample + 1 == len(offsets)
        stop = size if last else int(offsets[sample + 1])
        crc = None if crc32 is None else int(crc32[sample])
        raw = read_sample(path, int(offsets[sample]), stop, last=last, crc32=crc)
        if sample in repeated:
            raise BadSample("keys used twice", "an earlier sample of the shard has it", raw["__key__"])
        return raw


class ImageShards(ImageData):
    """Images from webdataset tar files, one image (jpg, jpeg, png, webp) per sample, with or without a label.

    A label is an integer, or a name in the `classes.json` beside the shards: the text of `cls`, or `label` in `json`.
    Shards with other classes.json than the first of `train` get the labels that the names of their classes have there.
    A label that cannot be read is none, unless an objective or a command uses labels.

    Training: shards and samples shuffled anew each epoch, MAE's augmentation (random resized crop, bicubic, flip), full
    batches, equally many on every rank. Validation: each sample once, in order. Batches are `samples.ImageBatch`.

    Args:
        train: Tar files: a path, a folder, a brace pattern "train-{000000..001023}.tar", a glob, or a list of these;
            also URLs (http, https, s3, gs, hf), of which copies are kept in `cache`.
        val: Likewise, for validation; None for none.
        shuffle_buffer: Samples of a rank that are shuffled among each other, at least 1. They lie in consecutive
            shards of the epoch's order; nothing of them is held in memory.
        cache: Folder for copies of shards on servers, best on a local disk; None for `$SSMPRETRAIN_CACHE/shards`.
        cache_limit: Most bytes in it, as "100G"; None for half of what the disk has left for it, at most 100 GiB.
        storage_options: For the library that speaks to the server, as {"anon": true, "endpoint_url": "https://..."}
            for S3 (s3fs.S3FileSystem), or for http {"headers": {"Authorization": "Bearer ..."}} and {"redirects":
            ["cdn.example.org"]}, other hosts that the server may redirect to.
        **kwargs: Arguments of `ImageData`: batch_size, num_workers, image_size, interpolation, crop_scale,
            horizontal_flip, auto_augment, color_jitter, photometric, random_erasing, repeats, epoch_samples,
            remainder, eval_crop_ratio, mean, std, seed, max_bad_fraction, max_pixels, require_labels.

    Raises:
        DataError: If an argument is out of range; in `setup`, if shards are damaged, hold no usable image or too few.
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
        if not 1 <= shuffle_buffer <= MOST_SAMPLES:
            raise DataError(
                f"{type(self).__name__}: shuffle_buffer is from 1 to {MOST_SAMPLES:,}; got {shuffle_buffer}. "
                "Use 5000, say."
            )
        self.train = train
        self.val = val
        self.shuffle_buffer = shuffle_buffer
        self.cache = cache
        self.cache_limit = cache_limit
        self.storage_options = storage_options
        self._shards: dict[str, list[ShardIndex]] = {}
        self._label_of_folder: dict[str, Labels] = {}
        self._label_of_shards: dict[str, list[Labels]] = {}  # by split

    def num_samples(self, split: str) -> int:
        """Samples in a split, "train" or "val"."""
        return sum(shard.samples for shard in self._find(split))

    def _has_val(self) -> bool:
        return self.val is not None

    def _batches(self, split: str, *, train: bool, limit: int | None) -> ShardBatches:
        options = self._batch_options(split, train=train, block=self.shuffle_buffer)
        shards = self._find(split)
        self._labels.number(split)
        return ShardBatches(shards, self._label_of_shards[split], limit=limit, **options)

    def _label_sources(self, split: str) -> list[Labels]:
        if split == "val" and not self._has_val():
            return []
        if split not in self._label_of_shards:
            try:
                shards = self._find(split)
            except (OSError, DataError):
                if split == "train" and self._has_val():  # that is evaluated without
                    return []
                raise
            self._label_of_shards[split] = self._read_classes(shards)
        return list({id(labels): labels for labels in self._label_of_shards[split]}.values())

    def _read_classes(self, shards: Sequence[ShardIndex]) -> list[Labels]:
        """How the labels of each shard are read: those in one folder alike."""
        folders = [folder_of(shard.path) for shard in shards]
        labelled = {folder for folder, shard in zip(folders, shards, strict=True) if shard.may_have_labels}
        for folder, shard in zip(folders, shards, strict=True):
            if folder not in self._label_of_folder:
                self._label_of_folder[folder] = Labels(classes_beside(shard.path), present=folder in labelled)
        return [self._label_of_folder[folder] for folder in folders]

    def _contents(self) -> list[tuple[str, int]]:
        return [(shard.path.name, shard.samples) for shard in self._find("train")]

    def _find(self, split: str) -> list[ShardIndex]:
        """The shards of a split, found and checked once."""
        if split not in self._shards:
            pattern = self.train if split == "train" else self.val
            assert pattern is not None, split
            where = f"{type(self).__name__}: {split}"
            paths = find_shards(pattern, where=where, cache=self._shard_cache(pattern))
            shards, damaged = keep_usable(paths, load_indexes(paths), self.max_bad_fraction, where)
            self._check_members(shards, where)
            self._shards[split] = shards
            self._note(split, damaged)
        return self._shards[split]

    def _check_members(self, shards: Sequence[ShardIndex], where: str) -> None:
        """Every shard holds images: one without is a wrong file, and its samples would silently be missing."""
        without = [shard for shard in shards if shard.images == 0]
        if without:
            found = ", ".join(f".{extension}" for extension in sorted(without[0].extensions)[:8])
            raise DataError(
                f"{where}: no image ({', '.join(IMAGE_EXTENSIONS)}) in {len(without):,} of {len(shards):,} shards; "
                f"{without[0].path} holds {found or 'nothing'}. Leave out such shards."
            )
        several = describe_several_images((shard.samples, shard.extensions) for shard in shards)
        if several and rank_and_world()[0] == 0:
            _log.warning("%s: %s.", where, several)

    def _note(self, split: str, damaged: dict[Path, Damage]) -> None:
        """Count a shard that lost nobody knows how many samples as one fault; once in the job."""
        for path, damage in damaged.items():
            if damage.lost is None and rank_and_world()[0] == 0:
                self._bad_of(split).note(BadRecord(0, damage.cause, str(path), -1, "", damage.text))

    def _shard_cache(self, pattern: str | list[str]) -> ShardCache | None:
        """Where copies of shards on servers go; None if all are local."""
        patterns = [pattern] if isinstance(pattern, str) else pattern
        if not any(is_remote(str(text)) for text in patterns):
            return None
        return make_cache(type(self).__name__, self.cache, self.cache_limit, self.storage_options)
