"""Batches of a plan: read from shards or a folder, decoded, and filled up with good samples where some are bad."""

from abc import abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import numpy as np
from torch.utils.data import Dataset

from ssmpretrain.base.seeds import random_state_kept
from ssmpretrain.datamodules.decoding.batcher import Batcher, ImageBatch, PreparedSample
from ssmpretrain.datamodules.decoding.decode import DecodedSample
from ssmpretrain.datamodules.faults.bad_samples import BadRecord, BadSample, BadSamples, is_of_shard
from ssmpretrain.datamodules.labels.classes import UNLABELLED, Labels
from ssmpretrain.datamodules.order.loader import BatchKey
from ssmpretrain.datamodules.order.plan import EvalPlan, Order, Samples, Stage, TrainPlan, num_reads
from ssmpretrain.datamodules.tar.sample import RawSample

_FEW = 32  # if none of the first 32 samples that are read from a shard can be used, the shard is a wrong file
_SEARCHED = 16  # number of optimizer steps, before and after, in which a substitute for a bad sample is searched


class PlannedBatches(Dataset[ImageBatch | None]):
    """Map-style dataset of whole batches. Each batch is a pure function of its `BatchKey`, in every process.

    Args:
        sizes: Number of samples in each shard.
        batcher: Decodes, transforms and stacks samples.
        order: Order of training. None means evaluation, which reads each sample once and in order.
        bad: Counts the samples that cannot be used.
    """

    def __init__(self, sizes: Sequence[int], batcher: Batcher, *, order: Order | None, bad: BadSamples) -> None:
        super().__init__()
        self.sizes = np.asarray(sizes, dtype=np.int64)
        self.batcher = batcher
        self.order = order
        self.bad = bad
        self._bad: defaultdict[str, set[tuple[int, int]]] = defaultdict(set)  # samples by source, in this process
        self._good: set[str] = set()  # sources
        self._planned: tuple[tuple[int, tuple[Stage, ...]], TrainPlan | EvalPlan] | None = None

    @abstractmethod
    def read(self, shard: int, sample: int) -> RawSample:
        """Return the undecoded fields of one sample.

        Raises:
            BadSample: If the sample cannot be read.
        """

    @abstractmethod
    def labels_of(self, shard: int) -> Labels:
        """Return the object that reads the labels of the samples in a shard."""

    @abstractmethod
    def known_labels(self) -> Iterator[tuple[str, int]]:
        """Yield (description of a sample, label) for labels that can be known by reading a few samples; -1 for none."""

    @abstractmethod
    def source(self, shard: int) -> tuple[str, int]:
        """Return the name of a shard for messages, and the number of samples that share this name."""

    def spread(self, count: int) -> Iterator[tuple[int, int]]:
        """Yield (shard, sample) of up to `count` samples, spread evenly over the data.

        The first samples alone may differ from the rest.
        """
        ends, total = self.sizes.cumsum(), int(self.sizes.sum())
        for number in (index * total // min(total, count) for index in range(min(total, count))):
            shard = int(ends.searchsorted(number, side="right"))
            yield shard, number - int(ends[shard] - self.sizes[shard])

    def num_batches(self, rank: int, epoch: int, stages: tuple[Stage, ...]) -> int:
        """Return the number of batches that one rank reads in an epoch which these stages train."""
        plan = self._plan(epoch, stages)
        return plan.num_batches if isinstance(plan, TrainPlan) else plan.num_batches(rank)

    def samples(self, key: BatchKey) -> Samples:
        """Return the places of the samples that the batch reads."""
        return self._plan(key.epoch, key.stages).samples(key.rank, key.batch)

    def __getitem__(self, key: BatchKey) -> ImageBatch | None:
        """Return one batch.

        In training, good samples replace bad ones. In evaluation, bad samples make the batch shorter; the batch is
        None if no sample is left.
        """
        size, repeats = key.stages[-1].batch_size, self.order.repeats if self.order else 1
        with random_state_kept():
            batch = list(self._prepared(key, size, repeats))
            if self.order is not None and len(batch) < size:
                batch += self._stand_ins(batch, key, size - len(batch))
            if repeats > 1:
                batch = apart(batch)
            return self.batcher.collate(batch) if batch else None

    def end_pass(self) -> None:
        """Log the warnings that are due after all batches of an epoch; called in the process that asked for them."""
        self.bad.say_unread()

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
        """Yield up to `size` augmented samples of a batch; each usable image is decoded once."""
        for number, (name, shard, sample) in enumerate(self._named(key)):
            if (decoded := self._decoded(key, shard, sample)) is not None:
                for copy in range(min(repeats, size - number * repeats)):
                    yield self.batcher.prepare(decoded, key.epoch, name, copy)

    def _named(self, key: BatchKey) -> Iterator[tuple[str, int, int]]:
        """Yield (name, shard, sample) of each sample of a batch; the name decides the augmentation in this epoch."""
        endless = self.order is not None and self.order.epoch_samples is not None
        for shard, sample, passed in zip(*(part.tolist() for part in self.samples(key)), strict=True):
            # With `epoch_samples`, one epoch may read a sample twice.
            yield f"{shard}/{sample}" + (f"/{passed}" if endless else ""), shard, sample

    def _decoded(self, batch: BatchKey, shard: int, sample: int) -> DecodedSample | None:
        """Return a decoded sample; count a sample that cannot be used, and return None."""
        key = ""
        try:
            labels = self.labels_of(shard)
            raw = self.read(shard, sample)
            key = raw["__key__"]
            decoded = self.batcher.decode(raw, labels)
            if decoded["label"] == UNLABELLED and (complaint := labels.complaint(raw)):
                self.bad.note_unread(batch.epoch, f"{shard}/{sample}", f"{key} in {self.source(shard)[0]}: {complaint}")
        except BadSample as error:
            self._count_bad(error, batch, shard, sample, error.key or key)
            return None
        self.bad.count_good()
        self._good.add(self.source(shard)[0])
        return decoded

    def _count_bad(self, error: BadSample, batch: BatchKey, shard: int, sample: int, key: str) -> None:
        """Count a bad sample. Stop the run if there are too many, or if no sample of the shard is usable."""
        source, size = self.source(shard)
        self.bad.add(BadRecord(batch.epoch, error.cause, source, sample, key, error.detail), self._planned_reads(batch))
        if source in self._good or is_of_shard(error.cause):  # a failed transfer does not mean that the file is wrong
            return
        self._bad[source].add((shard, sample))  # a set: the sample may be tried again as a substitute
        if len(self._bad[source]) >= min(_FEW, size):
            self.bad.stop(f"no sample of {source} is usable")

    def _planned_reads(self, key: BatchKey) -> int:
        """Return the number of samples that all ranks together read in an epoch."""
        if self.order is None:
            return int(self.sizes.sum())
        now = key.stages[-1]
        reads = now.world * num_reads(now.batch_size, self.order.repeats)
        return self.num_batches(key.rank, key.epoch, key.stages) * reads

    def _stand_ins(self, batch: list[PreparedSample], key: BatchKey, count: int) -> list[PreparedSample]:
        """Return `count` good samples that replace bad ones, because every rank trains on full batches of one shape.

        Substitutes are repeated like all other samples, and no image is decoded without need. If too few samples
        nearby are usable, samples of the batch itself are used again. The result does not depend on earlier reads.
        """
        found = list(islice(self._usable(key), count))
        lent = batch + found
        if not lent:
            self.bad.stop(f"not one usable sample in batch {key.batch} and those around it")
        return found + [lent[index % len(lent)] for index in range(count - len(found))]

    def _usable(self, key: BatchKey) -> Iterator[PreparedSample]:
        """Yield usable samples that can replace a bad sample of a batch, copy by copy."""
        for name, shard, sample in self._others(key):
            if (decoded := self._decoded(key, shard, sample)) is not None:
                for copy in range(self.order.repeats if self.order else 1):
                    yield self.batcher.prepare(decoded, key.epoch, name, copy)

    def _others(self, key: BatchKey) -> Iterator[tuple[str, int, int]]:
        """Yield the samples near a batch, each once.

        Samples of other optimizer steps come first, so that no sample appears twice in a step. Among them, samples at
        the same position in their step come first, so that two batches of one step take different substitutes.
        """
        plan, length = self._plan(key.epoch, key.stages), key.stages[-1].accumulate
        assert isinstance(plan, TrainPlan)
        begin = key.batch - key.batch % length
        end = min(begin + length, plan.num_batches)
        after = range(end, min(end + _SEARCHED * length, plan.num_batches))
        before = range(begin - 1, max(begin - _SEARCHED * length, plan.first_batch) - 1, -1)
        near = sorted([*after, *before], key=lambda number: (number - key.batch) % length)
        step = [place for number in range(begin, end) for place in self._named(key._replace(batch=number))]
        outside = (place for number in near for place in self._named(key._replace(batch=number)))
        yield from _unmet(outside, step)
        yield from _unmet(step, self._named(key))


def _unmet(
    places: Iterable[tuple[str, int, int]], known: Iterable[tuple[str, int, int]]
) -> Iterator[tuple[str, int, int]]:
    """Yield the places (name, shard, sample) whose sample is not among the known ones, each sample once."""
    met = {place[1:] for place in known}
    for place in places:
        if place[1:] not in met:
            met.add(place[1:])
            yield place


def apart(batch: list[PreparedSample]) -> list[PreparedSample]:
    """Reverse the second half of a batch, so that mixup does not mix an image with its own copy.

    Mixup mixes samples i and B - 1 - i. After the reversal, these two places hold samples that were half a batch apart.
    Copies of an image follow one another, so they do not meet as long as they fit into half a batch.
    """
    half = (len(batch) + 1) // 2
    return batch[:half] + batch[half:][::-1]
