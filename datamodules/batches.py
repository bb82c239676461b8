"""Whole batches by plan: what reading from shards and from folders have in common."""

from abc import abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Dataset

from ssmpretrain.datamodules.bad_samples import BadSample, BadSamples
from ssmpretrain.datamodules.loading import BatchKey
from ssmpretrain.datamodules.plan import EvalPlan, Order, Samples, Stage, TrainPlan
from ssmpretrain.datamodules.random_state import random_state_kept
from ssmpretrain.datamodules.reading import RawSample
from ssmpretrain.datamodules.samples import Batcher, DecodedSample, ImageBatch, PreparedSample, decode_sample

_FEW = 32  # samples of a shard: if so many are read and none can be used, it is a wrong file
_SEARCHED = 16  # batches that are searched for a sample that can stand in for a bad one


class PlannedBatches(Dataset[ImageBatch | None]):
    """Batches by their number: each a pure function of its `BatchKey`, in whichever process.

    Args:
        sizes: Samples in each shard.
        batcher: Decodes, transforms and stacks.
        order: Of training; None for evaluation: each sample once and in order.
        bad: Notes what cannot be used.
    """

    def __init__(self, sizes: Sequence[int], batcher: Batcher, *, order: Order | None, bad: BadSamples) -> None:
        super().__init__()
        self.sizes = np.asarray(sizes, dtype=np.int64)
        self.batcher = batcher
        self.order = order
        self.bad = bad
        self._bad: Counter[str] = Counter()  # samples by source, in this process
        self._good: set[str] = set()  # sources
        self._planned: tuple[tuple[int, tuple[Stage, ...]], TrainPlan | EvalPlan] | None = None

    @abstractmethod
    def read(self, shard: int, sample: int) -> RawSample:
        """The fields of a sample, undecoded.

        Raises:
            BadSample: If it cannot be read.
        """

    @abstractmethod
    def source(self, shard: int) -> tuple[str, int]:
        """What a shard is called in messages, and how many samples go by this name."""

    def num_batches(self, rank: int, epoch: int, stages: tuple[Stage, ...]) -> int:
        """Batches of a rank in an epoch that these stages train."""
        plan = self._plan(epoch, stages)
        return plan.num_batches if isinstance(plan, TrainPlan) else plan.num_batches(rank)

    def samples(self, key: BatchKey) -> Samples:
        """What a batch is read from."""
        return self._plan(key.epoch, key.stages).samples(key.rank, key.batch)

    def __getitem__(self, key: BatchKey) -> ImageBatch | None:
        """A batch; None in evaluation, where a batch is as short as its samples are bad, if none is left."""
        size, repeats = key.stages[-1].batch_size, self.order.repeats if self.order else 1
        with random_state_kept():
            batch = list(self._prepared(key, size, repeats))
            if self.order is not None and len(batch) < size:
                batch += self._stand_ins(batch, key, size - len(batch))
            if repeats > 1:
                batch = apart(batch)
            return self.batcher.collate(batch) if batch else None

    def _plan(self, epoch: int, stages: tuple[Stage, ...]) -> TrainPlan | EvalPlan:
        asked = (epoch, stages) if self.order is not None else (0, stages)
        if self._planned is None or self._planned[0] != asked:
            train, now = self.order, stages[-1]
            plan = (
                TrainPlan(self.sizes, train, epoch, stages)
                if train
                else EvalPlan(self.sizes, now.world, now.batch_size)
            )
            self._planned = asked, plan
        return self._planned[1]

    def _prepared(self, key: BatchKey, size: int, repeats: int) -> Iterator[PreparedSample]:
        """The usable samples of a batch, each decoded once, and augmented for `size` in all."""
        for number, (name, shard, sample) in enumerate(self._named(key)):
            if (decoded := self._decoded(shard, sample)) is not None:
                for copy in range(min(repeats, size - number * repeats)):
                    yield self.batcher.prepare(decoded, key.epoch, name, copy)

    def _named(self, key: BatchKey) -> Iterator[tuple[str, int, int]]:
        """(name, shard, sample) of what a batch is read from; the name decides the augmentation in this epoch."""
        endless = self.order is not None and self.order.epoch_samples is not None
        for shard, sample, passed in zip(*(part.tolist() for part in self.samples(key)), strict=True):
            # An epoch of a length of its own may meet a sample twice.
            yield f"{shard}/{sample}" + (f"/{passed}" if endless else ""), shard, sample

    def _decoded(self, shard: int, sample: int) -> DecodedSample | None:
        """A sample, or None if it cannot be used, which is counted."""
        source, size = self.source(shard)
        key = f"sample {sample}"
        try:
            raw = self.read(shard, sample)
            key = raw["__key__"]
            decoded = decode_sample(raw)
        except BadSample as error:
            self.bad.add(error, source, key)
            self._bad[source] += 1
            if source not in self._good and self._bad[source] >= min(_FEW, size):
                self.bad.stop(f"no sample of {source} is usable")
            return None
        self.bad.count_good()
        self._good.add(source)
        return decoded

    def _stand_ins(self, batch: list[PreparedSample], key: BatchKey, count: int) -> list[PreparedSample]:
        """Good samples in the place of bad ones, as every rank trains on full batches of one shape.

        They are others of the batch, or of those around it if it has none; what was read before does not matter.
        """
        plan = self._plan(key.epoch, key.stages)
        assert isinstance(plan, TrainPlan)
        near = [*range(key.batch + 1, min(key.batch + _SEARCHED, plan.num_batches))]
        near += [*range(max(key.batch - _SEARCHED, plan.first_batch), key.batch)]
        for number in near:
            if batch:
                break
            batch = list(self._prepared(key._replace(batch=number), count, 1))
        if not batch:
            self.bad.stop(f"not one usable sample in {len(near) + 1} batches in a row")
        return [batch[index % len(batch)] for index in range(count)]


def apart(batch: list[PreparedSample]) -> list[PreparedSample]:
    """The batch with its second half reversed: samples i and B - 1 - i, which mixup mixes, were half a batch apart.

    So no image meets a copy of itself there, if copies follow one another and fit into half a batch.
    """
    half = (len(batch) + 1) // 2
    return batch[:half] + batch[half:][::-1]
