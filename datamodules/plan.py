"""Which samples each worker of each rank reads: a pure function of the shard sizes, the seed, the epoch and the place.

All samples stand on one line, shard after shard. In training the shards are shuffled first, each rank takes an equal
stretch of the line, and each of its workers a stretch of that; the few samples that do not fill a batch on every rank
are left out (another few each epoch). In evaluation nothing is shuffled or left out.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ssmpretrain.datamodules.errors import DataError


@dataclass(frozen=True)
class Slice:
    """Samples `start` up to and without `stop` of shard number `shard`."""

    shard: int
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Place:
    """Who is asking: rank of `world`, worker of `num_workers` on that rank (at least 1)."""

    rank: int = 0
    world: int = 1
    worker: int = 0
    num_workers: int = 1


@dataclass(frozen=True)
class WorkerPlan:
    """One worker's part of an epoch: its slices in reading order, cut into batches of these sizes.

    Args:
        slices: What to read.
        batch_sizes: Samples in each batch.
        repeats: How often each sample that is read appears in its batch; the last one of a batch as often as fits.
    """

    slices: list[Slice]
    batch_sizes: list[int]
    repeats: int = 1

    def __len__(self) -> int:
        return sum(len(piece) for piece in self.slices)


def random_generator(*key: int | str) -> np.random.Generator:
    """A generator (Philox) that is a pure function of the key, and of nothing else in the process."""
    return np.random.Generator(np.random.Philox(key=stable_hash(*key)))


def stable_hash(*key: int | str) -> int:
    """A 64-bit hash of the key, the same in every process and on every machine."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little")


def num_train_batches(total: int, *, world: int, batch_size: int) -> int:
    """Batches per rank in training, equal on every rank; the samples that are left fill no batch on every rank."""
    return total // (world * batch_size)


def num_reads(batch_size: int, repeats: int) -> int:
    """Samples to read for a batch in which each appears `repeats` times."""
    return -(-batch_size // repeats)


def num_eval_batches(total: int, *, world: int, batch_size: int) -> int:
    """Batches per rank in evaluation, equal on every rank; the last ones may be short."""
    return -(-total // (world * batch_size))


def plan_train(
    sizes: Sequence[int], place: Place, *, batch_size: int, seed: int, epoch: int, repeats: int = 1
) -> WorkerPlan:
    """Plan one worker's training epoch.

    With repeats an epoch has as many batches as without and reads one part in `repeats` of the line; the next epoch
    reads the next part of the same line, so that in `repeats` epochs each sample is read once.

    Args:
        sizes: Samples per shard.
        place: Rank and worker.
        batch_size: Samples per batch on one rank.
        seed: Chooses the order together with the epoch.
        epoch: Number of the epoch, from 0.
        repeats: As in `WorkerPlan`, at least 1.

    Returns:
        Slices whose batches are all full. Batch b of a rank comes from worker b modulo num_workers, which is the
        order in which a DataLoader asks its workers.
    """
    batches = num_train_batches(sum(sizes), world=place.world, batch_size=batch_size)
    share, extra = divmod(batches, place.num_workers)
    mine = share + (place.worker < extra)
    before = place.rank * batches + place.worker * share + min(place.worker, extra)
    reads = num_reads(batch_size, repeats)
    line, part = divmod(epoch, repeats)
    begin = (sum(sizes) - place.world * batches * reads) * part // max(1, repeats - 1)  # the last part ends the line
    order = random_generator("shards", seed, line).permutation(len(sizes))
    start, stop = (begin + number * reads for number in (before, before + mine))
    slices = _cut(np.asarray(sizes, dtype=np.int64)[order], start, stop)
    slices = [Slice(int(order[piece.shard]), piece.start, piece.stop) for piece in slices]
    return WorkerPlan(slices, [batch_size] * mine, repeats)


def plan_eval(sizes: Sequence[int], place: Place, *, batch_size: int) -> WorkerPlan:
    """Plan one worker's part of an evaluation: each sample once over all ranks, in the order of the shards.

    A rank's batches arrive in the same order for any number of workers, and every rank has the same number of
    batches, so that no rank waits for another (with batch_size 1 some may have one fewer: a batch cannot be split).

    Raises:
        DataError: If there are fewer samples than ranks.
    """
    total = sum(sizes)
    if total < place.world:
        raise DataError(
            f"evaluation: every rank needs a sample; got {total:,} samples for {place.world:,} ranks. "
            "Use fewer devices."
        )
    batches = num_eval_batches(total, world=place.world, batch_size=batch_size)
    start, stop = (total * rank // place.world for rank in (place.rank, place.rank + 1))
    counts = np.asarray(sizes, dtype=np.int64)
    slices: list[Slice] = []
    batch_sizes: list[int] = []
    for batch in range(batches):
        size = min(batch_size, stop - start - (batches - batch - 1))  # leaves a sample for each batch to come
        if size and batch % place.num_workers == place.worker:
            slices += _cut(counts, start, start + size)
            batch_sizes.append(size)
        start += size
    return WorkerPlan(slices, batch_sizes)


def first_of_each(sizes: Sequence[int], limit: int | None) -> list[int]:
    """How many samples to take from the head of each shard to have `limit` in all, spread evenly."""
    total = sum(sizes)
    if limit is None or limit >= total:
        return list(sizes)
    ends = np.cumsum(np.asarray(sizes, dtype=np.int64)) * limit // total
    return [int(count) for count in np.diff(ends, prepend=0)]


def shuffled(length: int, buffer: int, generator: np.random.Generator) -> NDArray[np.int64]:
    """Order in which a shuffle buffer hands out the positions 0 .. length - 1, (length,), int64.

    The buffer starts with an eighth of its size and takes in two positions for each one handed out until it is full, so
    that the first batch need not wait. No position comes out before `position - buffer` others have.
    """
    order = np.empty(length, dtype=np.int64)
    held: list[int] = []
    taken = 0
    draws = generator.random(length)
    for turn in range(length):
        room = min(buffer, max(1, buffer // 8) + 2 * turn) - len(held)
        while room > 0 and taken < length:
            held.append(taken)
            taken += 1
            room -= 1
        chosen = int(draws[turn] * len(held))
        held[chosen], held[-1] = held[-1], held[chosen]
        order[turn] = held.pop()
    return order


def positions(slices: Sequence[Slice]) -> Iterator[tuple[int, int]]:
    """(shard, sample) of each sample of the slices, in order."""
    return ((piece.shard, sample) for piece in slices for sample in range(piece.start, piece.stop))


def _cut(sizes: NDArray[np.int64], start: int, stop: int) -> list[Slice]:
    """Slices that cover the samples start .. stop - 1 of the line that the shards form in this order."""
    ends = np.cumsum(sizes)
    slices = []
    shard = int(np.searchsorted(ends, start, side="right"))
    while start < stop:
        begin = int(ends[shard] - sizes[shard])
        end = min(stop, int(ends[shard]))
        if end > start:
            slices.append(Slice(shard, start - begin, end - begin))
        start = max(start, end)
        shard += 1
    return slices
