"""Plan: the samples of each batch of each rank, as a pure function of shard sizes, seed, epoch and ranks.

All samples form one line, shard after shard. In training the shards are shuffled first. Each rank takes an equal
stretch of the line, and shuffles it again within blocks. A batch is found by its number alone, so the number of workers
changes nothing. In evaluation nothing is shuffled or left out.
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
    """Places of the samples of one or several batches, in order.

    Args:
        shards: Number of the shard of each sample, (n,), int64.
        samples: Number of each sample in its shard, (n,), int64.
        passes: Number of earlier passes over all data, (n,), int64. Augmentation differs from pass to pass.
    """

    shards: Indices
    samples: Indices
    passes: Indices


@dataclass(frozen=True)
class Order:
    """Settings that decide the order of training, together with the epoch and the ranks.

    Args:
        seed: Any integer.
        block: Number of samples that a rank shuffles together, at least 1.
        repeats: Number of copies of each sample in its batch; the last sample of a batch may have fewer. An epoch then
            reads one part in `repeats` of the line, and the next epoch reads the next part.
        epoch_samples: Number of samples in an epoch, copies counted; None for the size of the data. Each epoch begins
            where the epoch before ended, on an endless line of passes over the data.
        remainder: "drop" leaves out the samples at the end of the line that do not fill an optimizer step on every
            rank; these are different samples in each epoch. "repeat" fills the last step with samples from the start
            of the line.
    """

    seed: int = 0
    block: int = 1
    repeats: int = 1
    epoch_samples: int | None = None
    remainder: str = "drop"


@dataclass(frozen=True)
class Stage:
    """Part of an epoch that one set of ranks trains. A job that continues with other ranks begins a new stage.

    Args:
        world: Number of ranks, at least 1.
        batch_size: Number of samples in a batch of one rank, copies counted; at least 1.
        accumulate: Number of batches of one rank in an optimizer step, at least 1.
        steps: Number of optimizer steps that these ranks took.
    """

    world: int = 1
    batch_size: int = 1
    accumulate: int = 1
    steps: int = 0

    @property
    def samples_per_step(self) -> int:
        """Number of samples in one optimizer step of all ranks, copies counted."""
        return self.world * self.batch_size * self.accumulate


def num_reads(batch_size: int, repeats: int) -> int:
    """Return the number of samples to read for a batch in which each appears `repeats` times."""
    return -(-batch_size // repeats)


def num_train_batches(samples: int, stage: Stage, remainder: str = "drop") -> int:
    """Return the number of batches of each rank in an epoch of `samples` samples.

    All ranks have the same number, and it makes whole optimizer steps. An epoch that is shorter than one step keeps
    the batches that all ranks can fill; together they make one step.
    """
    a_round = stage.world * stage.batch_size
    if remainder == "repeat":
        return -(-samples // stage.samples_per_step) * stage.accumulate
    batches = samples // a_round
    return batches if batches < stage.accumulate else batches - batches % stage.accumulate


class TrainPlan:
    """Plan of one training epoch for all ranks.

    If a job continues with other ranks in the middle of an epoch, the new ranks divide the samples that are not trained
    yet: the rest of each earlier rank, one after another, forms the line of the next stage.

    Args:
        sizes: Number of samples in each shard, (num_shards,).
        order: Settings of the order.
        epoch: Number of the epoch, from 0.
        stages: All sets of ranks that train this epoch. Earlier stages come first, with the steps they took. The
            present ranks come last; their `steps` are ignored.

    Raises:
        DataError: If two stages have different numbers of samples per step.
    """

    def __init__(self, sizes: Sequence[int] | Indices, order: Order, epoch: int, stages: Sequence[Stage]) -> None:
        self.order, self.epoch, self.stages = order, epoch, tuple(stages)
        self._sizes = np.asarray(sizes, dtype=np.int64)
        self._total = int(self._sizes.sum())
        self._known: tuple[int, Indices, Indices] | None = None
        first = self.stages[0]
        batches = num_train_batches(order.epoch_samples or self._total, first, order.remainder)
        reads = num_reads(first.batch_size, order.repeats)
        self._lengths = [batches * reads]  # samples of each rank, stage by stage
        self._taken: list[int] = []  # samples of each rank that each stage trained
        self._batches = [batches]  # batches of each rank, stage by stage
        for before, now in zip(self.stages, self.stages[1:], strict=False):
            self._add_stage(before, now)
        self._begin, self._pass = self._first_position(first.world * batches * reads)

    @property
    def num_batches(self) -> int:
        """Number of batches of each present rank, counted as if these ranks had trained the whole epoch."""
        return self.first_batch + self._batches[-1]

    @property
    def first_batch(self) -> int:
        """Number of the first batch of the last stage."""
        return sum(stage.steps for stage in self.stages[:-1]) * self.stages[-1].accumulate

    def samples(self, rank: int, batch: int, num_batches: int = 1) -> Samples:
        """Return the samples that a present rank reads for `num_batches` batches, starting at number `batch`."""
        reads = num_reads(self.stages[-1].batch_size, self.order.repeats)
        start = (batch - self.first_batch) * reads
        offsets = np.arange(start, start + num_batches * reads, dtype=np.int64)
        position = self._begin + self._positions(len(self.stages) - 1, np.full_like(offsets, rank), offsets)
        # With epoch_samples the line continues with the next pass; otherwise it starts again with the same pass.
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
        """Return the position on the line at which the epoch begins, and the number of the pass."""
        if self.order.epoch_samples:
            return self.epoch * reads, self.epoch * reads // max(1, self._total)
        number, part = divmod(self.epoch, self.order.repeats)
        return max(0, self._total - reads) * part // max(
            1, self.order.repeats - 1
        ), number  # the last part ends the line

    def _positions(self, level: int, ranks: Indices, offsets: Indices) -> Indices:
        """Return positions on the epoch's part of the line, from offsets in the parts of the ranks of one stage."""
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
        """Return the shards in the order of one pass, and the position on the line at which each shard ends."""
        if self._known is None or self._known[0] != number:
            shuffled = random_generator("shards", self.order.seed, number).permutation(len(self._sizes))
            self._known = number, shuffled, np.cumsum(self._sizes[shuffled])
        return self._known[1:]


class EvalPlan:
    """Plan of an evaluation. The ranks together read each sample once; each rank reads one stretch of the line.

    Every rank has the same number of batches, so that no rank waits for another. The last batches may be short. With
    batch_size 1, some ranks may have one batch fewer, because a batch cannot be split.

    Args:
        sizes: Number of samples in each shard.
        world: Number of ranks.
        batch_size: Largest number of samples in a batch of one rank.

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
        """Return the samples that a rank reads for one batch."""
        start, stop = self._stretch(rank)
        count = self.num_batches(rank)
        # Batches are full as long as one sample is left for each later batch.
        begin, end = (
            start + min(number * self.batch_size, stop - start - (count - number)) for number in (batch, batch + 1)
        )
        places = np.arange(begin, end, dtype=np.int64)
        shards = np.searchsorted(self._ends, places, side="right")
        return Samples(shards, places - (self._ends - self._sizes)[shards], np.zeros_like(places))

    def _stretch(self, rank: int) -> tuple[int, int]:
        return self._total * rank // self.world, self._total * (rank + 1) // self.world


def first_of_each(sizes: Sequence[int], limit: int | None) -> list[int]:
    """Return the number of samples to take from the start of each shard, spread evenly, `limit` in total."""
    total = sum(sizes)
    if limit is None or limit >= total:
        return list(sizes)
    ends = np.cumsum(np.asarray(sizes, dtype=np.int64)) * limit // total
    return [int(count) for count in np.diff(ends, prepend=0)]


@lru_cache(maxsize=8)
def _shuffled_block(seed: int, epoch: int, rank: int, block: int, size: int) -> Indices:
    """Return the order of the samples of one block."""
    return random_generator("block", seed, epoch, rank, block).permutation(size)
