import time
from collections import Counter

import numpy as np
import pytest

from ssmpretrain.datamodules.plan import (
    Place,
    WorkerPlan,
    first_of_each,
    num_train_batches,
    plan_eval,
    plan_train,
    positions,
    random_generator,
    shuffled,
    stable_hash,
)

SIZES = [7, 1, 0, 30, 12, 5, 64, 3]  # 122


def everyone(world: int, num_workers: int) -> list[Place]:
    return [Place(rank, world, worker, num_workers) for rank in range(world) for worker in range(num_workers)]


def read(plan: WorkerPlan) -> list[tuple[int, int]]:
    return list(positions(plan.slices))


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("num_workers", [1, 2, 4])
def test_training_reads_no_sample_twice_and_gives_ranks_equally_many_full_batches(world: int, num_workers: int) -> None:
    batch_size = 4
    places = everyone(world, num_workers)
    plans = {place: plan_train(SIZES, place, batch_size=batch_size, seed=1, epoch=2) for place in places}
    seen = [sample for plan in plans.values() for sample in read(plan)]
    batches = num_train_batches(sum(SIZES), world=world, batch_size=batch_size)
    assert len(seen) == len(set(seen)) == world * batches * batch_size
    assert sum(SIZES) - len(seen) < world * batch_size
    assert all(0 <= sample < SIZES[shard] for shard, sample in seen)
    for rank in range(world):
        sizes = [plans[Place(rank, world, worker, num_workers)].batch_sizes for worker in range(num_workers)]
        assert sum(map(len, sizes)) == batches
        assert {size for worker in sizes for size in worker} <= {batch_size}
        # round robin over the workers finds no hole: an earlier worker never has fewer batches
        assert sorted(map(len, sizes), reverse=True) == list(map(len, sizes))


def test_workers_do_not_change_what_a_rank_reads() -> None:
    def rank_reads(num_workers: int) -> list[tuple[int, int]]:
        places = [Place(1, 2, worker, num_workers) for worker in range(num_workers)]
        return [sample for place in places for sample in read(plan_train(SIZES, place, batch_size=4, seed=1, epoch=2))]

    assert rank_reads(1) == rank_reads(3) == rank_reads(5)


def test_order_depends_on_seed_and_epoch_alone() -> None:
    def order(seed: int, epoch: int) -> list[tuple[int, int]]:
        return read(plan_train(SIZES, Place(), batch_size=4, seed=seed, epoch=epoch))

    assert order(1, 2) == order(1, 2)
    assert order(1, 2) != order(1, 3)
    assert order(1, 2) != order(2, 2)


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("num_workers", [1, 3])
@pytest.mark.parametrize("batch_size", [1, 4, 10, 200])
def test_evaluation_reads_every_sample_once_in_equally_many_batches(
    world: int, num_workers: int, batch_size: int
) -> None:
    plans = {place: plan_eval(SIZES, place, batch_size=batch_size) for place in everyone(world, num_workers)}
    seen = Counter(sample for plan in plans.values() for sample in read(plan))
    assert seen == Counter((shard, sample) for shard, size in enumerate(SIZES) for sample in range(size))
    counts = set()
    for rank in range(world):
        mine = [plans[Place(rank, world, worker, num_workers)] for worker in range(num_workers)]
        sizes = [size for plan in mine for size in plan.batch_sizes]
        assert all(1 <= size <= batch_size for size in sizes)
        counts.add(len(sizes))
    assert len(counts) == 1 or (batch_size == 1 and max(counts) - min(counts) == 1)


def test_evaluation_gives_the_natural_order_for_any_number_of_workers() -> None:
    # What the loader does: one batch from each worker in turn.
    plans = [plan_eval(SIZES, Place(0, 1, worker, 3), batch_size=10) for worker in range(3)]
    streams = [iter(read(plan)) for plan in plans]
    sizes = [iter(plan.batch_sizes) for plan in plans]
    order = [next(streams[batch % 3]) for batch in range(13) for _ in range(next(sizes[batch % 3]))]
    assert order == read(plan_eval(SIZES, Place(), batch_size=10))


def test_fewer_samples_than_ranks_are_refused() -> None:
    with pytest.raises(ValueError, match="got 2 samples for 4 ranks"):
        plan_eval([1, 1], Place(0, 4), batch_size=1)


@pytest.mark.parametrize(("length", "buffer"), [(0, 5), (1, 1), (100, 1), (100, 10), (100, 1000)])
def test_a_shuffle_buffer_hands_out_everything_once_and_holds_no_more_than_its_size(length: int, buffer: int) -> None:
    order = shuffled(length, buffer, random_generator("test"))
    assert sorted(order) == list(range(length))
    # Position p must have been taken in when it comes out at turn t: at most `buffer` more than were handed out before.
    assert all(position < turn + buffer for turn, position in enumerate(order))


def test_a_large_shuffle_buffer_mixes_well() -> None:
    order = shuffled(4000, 1000, random_generator("test"))
    moved = np.abs(order - np.arange(4000))
    assert moved.mean() > 300  # a full buffer of 1000 moves a sample by about its size


def test_a_limit_is_spread_over_the_shards() -> None:
    assert first_of_each([10, 20, 30, 40], 10) == [1, 2, 3, 4]
    assert sum(first_of_each(SIZES, 17)) == 17
    assert first_of_each(SIZES, None) == first_of_each(SIZES, 10_000) == SIZES


def test_the_hash_is_the_same_on_every_machine() -> None:
    assert stable_hash("shards", 0, 0) == 8209898785725090219


def test_a_hundred_thousand_shards_are_planned_in_under_a_second() -> None:
    sizes = [1000] * 100_000
    start = time.perf_counter()
    plan = plan_train(sizes, Place(4095, 4096, 7, 8), batch_size=64, seed=0, epoch=0)
    assert time.perf_counter() - start < 1
    assert len(plan) == 47 * 64  # 381 batches per rank; the last of eight workers has 47
