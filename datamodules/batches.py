"""Whole batches by plan: what reading from shards and from folders have in common."""

from abc import abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice

from torch.utils.data import IterableDataset, get_worker_info

from ssmpretrain.datamodules.bad_samples import BadSample, BadSamples
from ssmpretrain.datamodules.loading import EpochClock, rank_and_world
from ssmpretrain.datamodules.plan import (
    Place,
    WorkerPlan,
    num_eval_batches,
    num_reads,
    num_train_batches,
    plan_eval,
    plan_train,
)
from ssmpretrain.datamodules.random_state import random_state_kept
from ssmpretrain.datamodules.reading import RawSample
from ssmpretrain.datamodules.samples import Batcher, ImageBatch, PreparedSample, decode_sample


class PlannedBatches(IterableDataset[ImageBatch]):
    """Batches of an epoch; each worker of each rank yields its own part of the plan.

    Iterate it through `EpochLoader`, with batch_size None. The position to resume at is (epoch, batches trained on
    this rank), set by `clock.set`; samples before it are not decoded.

    Args:
        sources: Names of the shards or folders, for messages.
        sizes: Samples in each source.
        batcher: Decodes, transforms and stacks.
        batch_size: Samples per batch.
        train: Shuffled, equal, full batches if true; each sample once and in order if false.
        seed: Decides the order together with the epoch.
        repeats: How often a training image that is read appears in its batch, each time augmented anew.
        bad: Notes what cannot be used.
    """

    def __init__(
        self,
        sources: Sequence[str],
        sizes: Sequence[int],
        batcher: Batcher,
        *,
        batch_size: int,
        train: bool,
        seed: int,
        repeats: int,
        bad: BadSamples,
    ) -> None:
        super().__init__()
        self.sources = sources
        self.sizes = sizes
        self.batcher = batcher
        self.batch_size = batch_size
        self.train = train
        self.seed = seed
        self.repeats = repeats if train else 1
        self.bad = bad
        self.clock = EpochClock()

    @abstractmethod
    def samples(self, plan: WorkerPlan, place: Place, epoch: int, skip: int) -> Iterator[tuple[int, int, RawSample]]:
        """(source, sample, raw) of one worker's plan in training order, from the `skip`-th on."""

    def __len__(self) -> int:
        count = num_train_batches if self.train else num_eval_batches
        return count(sum(self.sizes), world=rank_and_world()[1], batch_size=self.batch_size)

    def __iter__(self) -> Iterator[ImageBatch]:
        # Read now, not when the first batch is asked for: the main process may set the next epoch meanwhile.
        epoch, trained, rank, world = self.clock.read()
        worker, num_workers = 0, 1
        if (info := get_worker_info()) is not None:
            worker, num_workers = info.id, info.num_workers
        # The loader asks worker 0 first; on resuming, the next batch must come from there.
        worker = (worker + trained) % num_workers
        done = (trained - worker + num_workers - 1) // num_workers
        return self._batches(Place(rank, world, worker, num_workers), epoch, done)

    def plan(self, place: Place, epoch: int) -> WorkerPlan:
        """What one worker reads in one epoch."""
        if self.train:
            options = {"batch_size": self.batch_size, "seed": self.seed, "epoch": epoch, "repeats": self.repeats}
            return plan_train(self.sizes, place, **options)
        return plan_eval(self.sizes, place, batch_size=self.batch_size)

    def _batches(self, place: Place, epoch: int, done: int) -> Iterator[ImageBatch]:
        plan = self.plan(place, epoch)
        reads = [num_reads(size, plan.repeats) for size in plan.batch_sizes]
        samples = self.samples(plan, place, epoch, skip=sum(reads[:done]))
        planned, bad = Counter[int](), Counter[int]()
        for piece in plan.slices:
            planned[piece.shard] += len(piece)
        spare: list[PreparedSample] = []
        for size, read in zip(plan.batch_sizes[done:], reads[done:], strict=True):
            with random_state_kept():
                batch = self._prepare(islice(samples, read), size, epoch, planned, bad)
                if self.train and len(batch) < size:
                    batch = self._fill(batch, spare, size)
                spare = batch[-1:] or spare
                if self.repeats > 1:
                    batch = apart(batch)
                collated = self.batcher.collate(batch) if batch else None
            if collated is not None:
                yield collated

    def _prepare(
        self,
        samples: Iterator[tuple[int, int, RawSample]],
        size: int,
        epoch: int,
        planned: Counter[int],
        bad: Counter[int],
    ) -> list[PreparedSample]:
        """Decode the usable ones, once, and augment each for `size` in all; count the others in `bad`, by source."""
        prepared = []
        for number, (source, sample, raw) in enumerate(samples):
            try:
                decoded = decode_sample(raw)
                self.bad.count_good()
            except BadSample as error:
                self.bad.add(error, self.sources[source], raw["__key__"])
                bad[source] += 1
                if bad[source] == planned[source] >= min(8, self.sizes[source]):
                    self.bad.stop(f"no sample of {self.sources[source]} is usable")
                continue
            for copy in range(min(self.repeats, size - number * self.repeats)):
                prepared.append(self.batcher.prepare(decoded, epoch, f"{source}/{sample}", copy))
        return prepared

    def _fill(self, batch: list[PreparedSample], spare: list[PreparedSample], size: int) -> list[PreparedSample]:
        """Repeat good samples in the place of bad ones: every rank trains on full batches of one shape."""
        good = batch or spare
        if not good:
            self.bad.stop("not one usable sample in a whole batch")
        return [*batch, *(good[index % len(good)] for index in range(size - len(batch)))]


def apart(batch: list[PreparedSample]) -> list[PreparedSample]:
    """The batch with its second half reversed: samples i and B - 1 - i, which mixup mixes, were half a batch apart.

    So no image meets a copy of itself there, if copies follow one another and fit into half a batch.
    """
    half = (len(batch) + 1) // 2
    return batch[:half] + batch[half:][::-1]
