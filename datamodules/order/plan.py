"""The plan: the samples of each batch of each rank, a pure function of shard sizes, seed, epoch and ranks.

All samples stand on one line, shard after shard. In training the shards are shuffled first and each rank takes an equal
stretch of the line, which it shuffles again within blocks. Any batch can be asked for by its number, so workers only
share out the numbers: how many there are changes nothing. In evaluation nothing is shuffled or left out.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ssmpretrain.base.errors import DataError
from ssmpretrain.base.seeds import random_generator

Indices = NDArray[np.int64]
MOST_SAMPLES = 10**12  # more cannot be numbered


class Samples(NamedTuple):
    """Samples of a batch or of several, in order.

    Args:
        shards: Number of the shard, (n,), int64.
        samples: Number of the sample in its shard, (n,), int64.
        passes: How often the data had been read through before, (n,), int64: augmentation differs from pass to pass.
    """

    shards: Indices
    samples: Indices
    passes: Indices


@dataclass(frozen=True)
class Order:
    """Settings that decide the order of training, beside the epoch and the ranks.

    Args:
        seed: Any integer.
        block: Samples that a rank shuffles among each other, at least 1.
        repeats: How often a sample that is read appears in its batch, the last one of a batch as often as fits; an
            epoch then reads one part in `repeats` of the line, and the next epoch the next part.
        epoch_samples: Samples in an epoch, copies counted; None for as many as there are. Where one epoch ends on the
            endless line of passes over the data, the next begins.
        remainder: "drop" leaves out the samples at the end of the line that do not fill an optimizer step on every
            rank (others each epoch); "repeat" fills the last steps with samples from the start of the line.
    """

    seed: int = 0
    block: int = 1
    repeats: int = 1
    epoch_samples: int | None = None
    remainder: str = "drop"


@dataclass(frozen=True)
class Stage:
    """Optimizer steps of an epoch that one set of ranks takes, before the job goes on with another.

    Args:
        world: Number of ranks, at least 1.
        batch_size: Samples in a batch of one rank, copies counted; at least 1.
        accumulate: Batches of a rank in one step, at least 1.
        steps: Steps taken.
    """

    world: int = 1
    batch_size: int = 1
    accumulate: int = 1
    steps: int = 0

    @property
    def samples_per_step(self) -> int:
        """Samples in one optimizer step of all ranks, copies counted."""
        return self.world * self.batch_size * self.accumulate


def num_reads(batch_size: int, repeats: int) -> int:
    """Return the number of samples to read for a batch in which each appears `repeats` times."""
    return -(-batch_size // repeats)


def num_train_batches(samples: int, stage: Stage, remainder: str = "drop") -> int:
    """Return the batches of each rank in an epoch of so many samples: as many on all ranks, and whole optimizer steps.

    An epoch shorter than one step keeps the batches that all ranks can fill: they are a step of their own.
    """
    a_round = stage.world * stage.batch_size
    if remainder == "repeat":
        return -(-samples // stage.samples_per_step) * stage.accumulate
    batches = samples // a_round
    return batches if batches < stage.accumulate else batches - batches % stage.accumulate


class TrainPlan:
    """One training epoch of all ranks.

    A job that goes on with other ranks in the middle of an epoch shares out anew what no rank has trained: the samples
    left to each earlier rank, one after another, are the line of the next stage.

    Args:
        sizes: Samples per shard, (num_shards,).
        order: The settings of the order.
        epoch: Number of the epoch, from 0.
        stages: The ranks that train it: first those of before, with the steps they took, last those of now, whose
            `steps` are ignored.

    Raises:
        DataError: If a stage has another number of samples per step than the one before it.
    """

    def __init__(self, sizes: Sequence[int] | Indices, order: Order, epoch: int, stages: Sequence[Stage]) -> None:
        self.order, self.epoch, self.stages = order, epoch, tuple(stages)
        self._sizes = np.asarray(sizes, dtype=np.int64)
        self._total = int(self._sizes.sum())
        self._known: tuple[int, Indices, Indices] | None = None
        first = self.stages[0]
        batches = num_train_batches(order.epoch_samples or self._total, first, order.remainder)
        reads = num_reads(first.batch_size, order.repeats)
        self._lengths = [batches * reads]  # of the stretch of each rank, stage by stage
        self._taken: list[int] = []  # of it, by the end of the stage
        self._batches = [batches]  # of each rank, likewise
        for before, now in zip(self.stages, self.stages[1:], strict=False):
            self._add_stage(before, now)
        self._begin, self._pass = self._first_position(first.world * batches * reads)

    @property
    def num_batches(self) -> int:
        """Batches of each rank of the last stage, and those before counted as if it had trained them."""
        return self.first_batch + self._batches[-1]

    @property
    def first_batch(self) -> int:
        """Number of the first batch of the last stage."""
        return sum(stage.steps for stage in self.stages[:-1]) * self.stages[-1].accumulate

    def samples(self, rank: int, batch: int, num_batches: int = 1) -> Samples:
        """Return what a rank of the last stage reads for `num_batches` batches from number `batch` on, in order."""
        reads = num_reads(self.stages[-1].batch_size, self.order.repeats)
        start = (batch - self.first_batch) * reads
        offsets = np.arange(start, start + num_batches * reads, dtype=np.int64)
        position = self._begin + self._positions(len(self.stages) - 1, np.full_like(offsets, rank), offsets)
        # With epoch_samples the line goes on with the next pass; else what is missing comes from the same.
        passes, places = position // self._total, position % self._total
        passes = passes if self.order.epoch_samples else np.full_like(passes, self._pass)
        shards, samples = np.empty_like(places), np.empty_like(places)
        for number in np.unique(passes).tolist():
            mine = passes == number
            shuffled, ends = self._line(number)
            place = np.searchsorted(ends, places[mine], side="right")
            shards[mine] = shuffled[place]
            samples[mine] = places[mine] - (ends[place] - self._sizes[shuffled[place]])
        return Samples(shards, samples, passes)

    def _add_stage(self, before: Stage, now: Stage) -> None:
        reads = [
            stage.world * stage.accumulate * num_reads(stage.batch_size, self.order.repeats) for stage in (before, now)
        ]
        if before.samples_per_step != now.samples_per_step or reads[0] != reads[1]:
            raise DataError(
                f"plan: within an epoch every step has the same number of samples; got {before.samples_per_step:,} = "
                f"{before.batch_size} x {before.world} ranks x {before.accumulate} accumulated, then "
                f"{now.samples_per_step:,} = {now.batch_size} x {now.world} ranks x {now.accumulate} accumulated. "
                "Choose batch_size and accumulate_grad_batches with the same product, or finish the epoch as before."
            )
        left = self._batches[-1] // before.accumulate - before.steps
        self._taken.append(before.steps * before.accumulate * num_reads(before.batch_size, self.order.repeats))
        self._batches.append(left * now.accumulate)
        self._lengths.append(left * now.accumulate * num_reads(now.batch_size, self.order.repeats))

    def _first_position(self, reads: int) -> tuple[int, int]:
        """Return where the epoch begins on the line, and the pass that this is."""
        if self.order.epoch_samples:
            return self.epoch * reads, self.epoch * reads // max(1, self._total)
        number, part = divmod(self.epoch, self.order.repeats)
        return max(0, self._total - reads) * part // max(
            1, self.order.repeats - 1
        ), number  # the last part ends the line

    def _positions(self, level: int, ranks: Indices, offsets: Indices) -> Indices:
        """Return places on the epoch's stretch of the line, of offsets in what ranks of one stage have before them."""
        if level > 0:
            left = self._lengths[level - 1] - self._taken[level - 1]  # to each rank of the stage before
            place = ranks * self._lengths[level] + offsets
            return self._positions(level - 1, place // left, self._taken[level - 1] + place % left)
        if self.order.block == 1:
            return ranks * self._lengths[0] + offsets
        blocks = offsets // self.order.block
        places = np.empty_like(offsets)
        num_blocks = -(-self._lengths[0] // self.order.block)
        pieces = ranks * num_blocks + blocks
        for piece in np.unique(pieces).tolist():
            mine = pieces == piece
            rank, block = divmod(piece, num_blocks)
            start = block * self.order.block
            size = min(self.order.block, self._lengths[0] - start)
            shuffled = _shuffled_block(self.order.seed, self.epoch, rank, block, size)
            places[mine] = rank * self._lengths[0] + start + shuffled[offsets[mine] - start]
        return places

    def _line(self, number: int) -> tuple[Indices, Indices]:
        """Return the shards in the order of one pass, and where on the line each ends."""
        if self._known is None or self._known[0] != number:
            shuffled = random_generator("shards", self.order.seed, number).permutation(len(self._sizes))
            self._known = number, shuffled, np.cumsum(self._sizes[shuffled])
        return self._known[1:]


class EvalPlan:
    """An evaluation: each sample once over all ranks, in the order of the shards, whose stretches the ranks share out.

    Every rank has the same number of batches, so that no rank waits for another; the last ones may be short. (With
    batch_size 1 some ranks may have one fewer: a batch cannot be split.)

    Args:
        sizes: Samples per shard.
        world: Number of ranks.
        batch_size: Samples in a batch of one rank, at most.

    Raises:
        DataError: If there are fewer samples than ranks.
    """

    def __init__(self, sizes: Sequence[int] | Indices, world: int, batch_size: int) -> None:
        self._sizes = np.asarray(sizes, dtype=np.int64)
        self._ends = np.cumsum(self._sizes)
        self._total = int(self._sizes.sum())
        if self._total < world:
            raise DataError(
                f"evaluation: every rank needs a sample; got {self._total:,} samples for {world:,} ranks. "
                "Use fewer devices."
            )
        self.world, self.batch_size = world, batch_size
        self._rounds = -(-self._total // (world * batch_size))

    def num_batches(self, rank: int) -> int:
        """Return the number of batches of one rank."""
        start, stop = self._stretch(rank)
        return min(self._rounds, stop - start)

    def samples(self, rank: int, batch: int) -> Samples:
        """Return what a rank reads for one batch."""
        start, stop = self._stretch(rank)
        count = self.num_batches(rank)
        # Full batches as long as one sample is left for each batch to come.
        begin, end = (
            start + min(number * self.batch_size, stop - start - (count - number)) for number in (batch, batch + 1)
        )
        places = np.arange(begin, end, dtype=np.int64)
        shards = np.searchsorted(self._ends, places, side="right")
        return Samples(shards, places - (self._ends - self._sizes)[shards], np.zeros_like(places))

    def _stretch(self, rank: int) -> tuple[int, int]:
        return self._total * rank // self.world, self._total * (rank + 1) // self.world


def first_of_each(sizes: Sequence[int], limit: int | None) -> list[int]:
    """Return how many samples to take from the head of each shard to have `limit` in all, spread evenly."""
    total = sum(sizes)
    if limit is None or limit >= total:
        return list(sizes)
    ends = np.cumsum(np.asarray(sizes, dtype=np.int64)) * limit // total
    return [int(count) for count in np.diff(ends, prepend=0)]


@lru_cache(maxsize=8)
def _shuffled_block(seed: int, epoch: int, rank: int, block: int, size: int) -> Indices:
    """Return the order of the samples of one block."""
    return random_generator("block", seed, epoch, rank, block).permutation(size)
