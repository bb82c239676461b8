"""Images from webdataset tars, in an order that is planned: the same for the same seed, with nothing silently short."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from ssmpretrain.datamodules.batches import PlannedBatches
from ssmpretrain.datamodules.errors import DataError
from ssmpretrain.datamodules.image_data import ImageData
from ssmpretrain.datamodules.index import IMAGE_EXTENSIONS, ShardIndex, load_indexes, load_offsets
from ssmpretrain.datamodules.paths import find_shards
from ssmpretrain.datamodules.plan import Place, Slice, WorkerPlan, first_of_each, random_generator, shuffled
from ssmpretrain.datamodules.reading import RawSample, read_samples


class ShardBatches(PlannedBatches):
    """Batches from shards.

    Args:
        shards: What to read.
        shuffle_buffer: Samples that each worker holds undecoded in training, to draw from.
        limit: Read this many samples, spread over the shards; None reads all.
        **options: As in `PlannedBatches`.
    """

    def __init__(
        self, shards: Sequence[ShardIndex], *, shuffle_buffer: int, limit: int | None = None, **options: Any
    ) -> None:
        self.paths = [shard.path for shard in shards]
        sizes = first_of_each([shard.samples for shard in shards], limit)
        super().__init__([str(path) for path in self.paths], sizes, **options)
        self.shuffle_buffer = shuffle_buffer

    def samples(self, plan: WorkerPlan, place: Place, epoch: int, skip: int) -> Iterator[tuple[int, int, RawSample]]:
        """(shard, sample, raw): shards are read in order, and handed out through the shuffle buffer."""
        order = np.arange(len(plan))
        if self.train:
            generator = random_generator("buffer", self.seed, epoch, place.rank, place.worker)
            order = shuffled(len(plan), self.shuffle_buffer, generator)
        order = order[skip:]
        if not len(order):
            return
        first = int(order.min())
        wanted = np.zeros(len(plan), dtype=bool)
        wanted[order] = True
        stream = enumerate(self._read(plan.slices, first), first)
        held: dict[int, tuple[int, int, RawSample]] = {}
        for position in order.tolist():
            while position not in held:
                read, sample = next(stream)
                if wanted[read]:
                    held[read] = sample
            yield held.pop(position)

    def _read(self, slices: Sequence[Slice], first: int) -> Iterator[tuple[int, int, RawSample]]:
        """(shard, sample, raw) of the slices in order, without reading what lies before the `first`-th."""
        for piece in slices:
            start = min(piece.start + first, piece.stop)
            first -= start - piece.start
            if start < piece.stop:
                path = self.paths[piece.shard]
                raws = read_samples(path, int(load_offsets(path)[start]), piece.stop - start)
                for sample, raw in enumerate(raws, start):
                    yield piece.shard, sample, raw


class ImageShards(ImageData):
    """Images from webdataset tar files, one image (jpg, jpeg, png, webp) per sample, with or without a label.

    A label is an integer: the text of `cls`, or `label` in `json`. Training: shards and samples shuffled anew each
    epoch, MAE's augmentation (random resized crop, bicubic, flip), full batches, equally many on every rank.
    Validation: each sample once, in order. Batches are `samples.ImageBatch`.

    Args:
        train: Tar files: a path, a folder, a brace pattern "train-{000000..001023}.tar", a glob, or a list of these.
        val: Likewise, for validation; None for none.
        shuffle_buffer: Samples that each worker holds undecoded to draw from, at least 1.
        **kwargs: Arguments of `ImageData`: batch_size, num_workers, image_size, interpolation, crop_scale,
            horizontal_flip, auto_augment, color_jitter, random_erasing, repeats, eval_crop_ratio, mean, std, seed,
            max_bad_fraction.

    Raises:
        DataError: If an argument is out of range; in `setup`, if shards are damaged, hold no usable image or too few.
        FileNotFoundError: In `setup`, if shards are missing.
    """

    def __init__(
        self, train: str | list[str], val: str | list[str] | None = None, *, shuffle_buffer: int = 1000, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        if shuffle_buffer < 1:
            raise DataError(
                f"{type(self).__name__}: shuffle_buffer is at least 1; got {shuffle_buffer}. Use 1000, say."
            )
        self.train = train
        self.val = val
        self.shuffle_buffer = shuffle_buffer
        self._shards: dict[str, list[ShardIndex]] = {}

    def num_samples(self, split: str) -> int:
        """Samples in a split, "train" or "val"."""
        return sum(shard.samples for shard in self._find(split))

    def _has_val(self) -> bool:
        return self.val is not None

    def _batches(self, split: str, *, train: bool, limit: int | None) -> ShardBatches:
        options = self._batch_options(split, train=train)
        return ShardBatches(self._find(split), shuffle_buffer=self.shuffle_buffer, limit=limit, **options)

    def _find(self, split: str) -> list[ShardIndex]:
        """The shards of a split, found and checked once."""
        if split not in self._shards:
            pattern = self.train if split == "train" else self.val
            assert pattern is not None, split
            where = f"{type(self).__name__}: {split}"
            shards = load_indexes(find_shards(pattern, where=where))
            _check_images(shards, where)
            self._shards[split] = shards
        return self._shards[split]


def _check_images(shards: Sequence[ShardIndex], where: str) -> None:
    """Every shard holds images: one without is a wrong file, and its samples would silently be missing."""
    without = [shard for shard in shards if shard.images == 0]
    if without:
        found = ", ".join(f".{extension}" for extension in sorted(without[0].extensions)[:8])
        raise DataError(
            f"{where}: no image ({', '.join(IMAGE_EXTENSIONS)}) in {len(without):,} of {len(shards):,} shards; "
            f"{without[0].path} holds {found or 'nothing'}. Leave out such shards."
        )
