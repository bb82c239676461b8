import time
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from ssmpretrain.base.seeds import random_generator, stable_hash
from ssmpretrain.datamodules.order.plan import (
    EvalPlan,
    Order,
    Samples,
    Stage,
    TrainPlan,
    first_of_each,
    num_reads,
    num_train_batches,
)

SIZES = [7, 1, 0, 30, 12, 5, 64, 3]  # 122
ORDER = Order(seed=1, block=16)


def pairs(samples: Samples) -> list[tuple[int, int]]:
    return list(zip(samples.shards.tolist(), samples.samples.tolist(), strict=True))


def read(plan: TrainPlan, world: int, first: int = 0, last: int | None = None) -> list[tuple[int, int]]:
    """Return the samples that all ranks read from batch `first` up to `last`."""
    batches = range(first, plan.num_batches if last is None else last)
    return [pair for rank in range(world) for batch in batches for pair in pairs(plan.samples(rank, batch))]


def plan(stage: Stage, order: Order = ORDER, epoch: int = 2) -> TrainPlan:
    return TrainPlan(SIZES, order, epoch, [stage])


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_training_reads_no_sample_twice_and_gives_ranks_equally_many_whole_steps(world: int, accumulate: int) -> None:
    stage = Stage(world, 4, accumulate)
    seen = read(plan(stage), world)
    assert plan(stage).num_batches % accumulate == 0
    assert len(seen) == len(set(seen)) == world * plan(stage).num_batches * 4
    assert 122 - len(seen) < stage.samples_per_step
    assert all(0 <= sample < SIZES[shard] for shard, sample in seen)


def test_order_depends_on_seed_and_epoch_and_on_nothing_drawn_before() -> None:
    def order(seed: int, epoch: int) -> list[tuple[int, int]]:
        return read(plan(Stage(1, 4), Order(seed, 16), epoch), 1)

    assert order(1, 2) == order(1, 2)
    assert order(1, 2) != order(1, 3)
    assert order(1, 2) != order(2, 2)


def test_any_batch_can_be_asked_for_alone() -> None:
    whole = plan(Stage(2, 4)).samples(1, 0, 15)
    alone = [pair for batch in reversed(range(15)) for pair in pairs(plan(Stage(2, 4)).samples(1, batch))[::-1]]
    assert pairs(whole) == alone[::-1]


def test_a_block_is_shuffled_whole_and_mixes_the_shards_in_it() -> None:
    stage = Stage(2, 50)
    ranks = [TrainPlan([100] * 20, Order(0, block=500), 0, [stage]).samples(rank, 0, 20) for rank in range(2)]
    for samples in ranks:
        lines = samples.shards * 100 + samples.samples
        for block in (lines[:500], lines[500:]):
            assert len(np.unique(block // 100)) in (5, 6)  # 500 samples on the line, five whole shards here
        assert len(np.unique(samples.shards[:50])) == 5
        assert np.mean(np.diff(lines[:500]) == 1) < 0.02


def test_left_out_samples_are_others_each_epoch() -> None:
    missing = [set(read(plan(Stage(3, 7), epoch=epoch), 3)) for epoch in range(2)]
    everything = {(shard, sample) for shard, size in enumerate(SIZES) for sample in range(size)}
    assert everything - missing[0] != everything - missing[1]


def test_the_remainder_can_be_filled_with_samples_from_the_start_instead() -> None:
    order = Order(1, 16, remainder="repeat")
    seen = Counter(read(plan(Stage(3, 7), order), 3))
    assert len(seen) == 122 and seen.total() == 126 and max(seen.values()) == 2


@pytest.mark.parametrize("epoch_samples", [20, 50, 300])
def test_epochs_of_a_length_of_their_own_read_all_before_any_again(epoch_samples: int) -> None:
    order = Order(1, 16, epoch_samples=epoch_samples)
    stage = Stage(2, 4)
    line: list[tuple[tuple[int, int], int]] = []
    for epoch in range(20):
        one = plan(stage, order, epoch)
        assert one.num_batches == epoch_samples // 8
        for rank in range(2):
            for batch in range(one.num_batches):
                samples = one.samples(rank, batch)
                line += zip(pairs(samples), samples.passes.tolist(), strict=True)
    by_pass: dict[int, list[tuple[int, int]]] = {}
    for pair, number in line:
        by_pass.setdefault(number, []).append(pair)
    assert sorted(by_pass) == list(range(max(by_pass) + 1))
    for number in range(max(by_pass)):
        assert sorted(by_pass[number]) == sorted(
            (shard, sample) for shard, size in enumerate(SIZES) for sample in range(size)
        )


@pytest.mark.parametrize(
    ("others", "order"),
    [
        *(([others], ORDER) for others in ((4, 2, 1), (1, 8, 1), (2, 2, 2), (1, 1, 8))),
        *(([(4, 2, 1), (1, 4, 2)], order) for order in (ORDER, Order(3, 1), Order(3, 1000))),
        ([(4, 2, 1), (1, 4, 2)], Order(1, 16, epoch_samples=200)),
    ],
)
def test_other_ranks_go_on_with_exactly_what_is_left(others: list[tuple[int, int, int]], order: Order) -> None:
    stages = [Stage(2, 4, 1, steps=6)]
    first = plan(stages[0], order)
    trained = read(first, 2, 0, 6)
    expected = Counter(read(first, 2))
    for number, (world, batch_size, accumulate) in enumerate(others):
        now = Stage(world, batch_size, accumulate, steps=3)
        second = TrainPlan(SIZES, order, 2, [*stages, now])
        steps = 6 + 3 * number
        assert second.first_batch == steps * accumulate
        assert second.num_batches == first.num_batches * accumulate
        last = None if number + 1 == len(others) else second.first_batch + 3 * accumulate
        trained += read(second, world, second.first_batch, last)
        stages.append(now)
    assert Counter(trained) == expected


def test_ranks_that_take_other_steps_cannot_go_on_in_mid_epoch() -> None:
    with pytest.raises(ValueError, match=r"got 8 = 4 x 2 ranks x 1 accumulated, then 12 = 4 x 3 ranks x 1"):
        TrainPlan(SIZES, ORDER, 0, [Stage(2, 4, 1, steps=1), Stage(3, 4)])


@pytest.mark.parametrize(("world", "batch_size"), [(1, 4), (2, 10), (3, 1), (5, 4), (3, 200)])
def test_evaluation_reads_every_sample_once_in_order_and_in_equally_many_batches(world: int, batch_size: int) -> None:
    whole = EvalPlan(SIZES, world, batch_size)
    batches = [[pairs(whole.samples(rank, batch)) for batch in range(whole.num_batches(rank))] for rank in range(world)]
    seen = [pair for rank in batches for batch in rank for pair in batch]
    assert seen == [(shard, sample) for shard, size in enumerate(SIZES) for sample in range(size)]
    assert all(1 <= len(batch) <= batch_size for rank in batches for batch in rank)
    counts = {len(rank) for rank in batches}
    assert len(counts) == 1 or (batch_size == 1 and max(counts) - min(counts) == 1)


def test_fewer_samples_than_ranks_are_refused() -> None:
    with pytest.raises(ValueError, match="got 2 samples for 4 ranks"):
        EvalPlan([1, 1], 4, 1)


def test_an_epoch_shorter_than_a_step_keeps_its_batches() -> None:
    assert num_train_batches(30, Stage(1, 8, 4)) == 3
    assert num_train_batches(40, Stage(1, 8, 4)) == 4
    assert num_train_batches(40, Stage(1, 8, 4), "repeat") == 8


def test_a_limit_is_spread_over_the_shards() -> None:
    assert first_of_each([10, 20, 30, 40], 10) == [1, 2, 3, 4]
    assert sum(first_of_each(SIZES, 17)) == 17
    assert first_of_each(SIZES, None) == first_of_each(SIZES, 10_000) == SIZES


def test_the_hash_is_the_same_on_every_machine() -> None:
    assert stable_hash("shards", 0, 0) == 8209898785725090219


def test_a_hundred_thousand_shards_are_shared_by_4096_ranks_without_a_repetition() -> None:
    sizes = random_generator("sizes").integers(5, 16, 100_000)
    total = int(sizes.sum())
    stage = Stage(4096, 32)
    start = time.perf_counter()
    one = TrainPlan(sizes, Order(0, 5000), 3, [stage])
    one.samples(4095, one.num_batches - 1)
    assert time.perf_counter() - start < 1  # what a worker does before it reads
    ends = np.cumsum(sizes)
    seen = np.zeros(total, dtype=np.int8)
    for rank in range(4096):
        samples = one.samples(rank, 0, one.num_batches)
        assert len(samples.shards) == one.num_batches * 32  # every rank has the same number of full batches
        seen[ends[samples.shards] - sizes[samples.shards] + samples.samples] += 1
    assert seen.max() == 1
    assert total - seen.sum() < stage.samples_per_step


@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.parametrize("repeats", [2, 3, 4])
def test_with_repeats_as_many_epochs_read_every_sample_almost_once(world: int, repeats: int) -> None:
    order, stage = Order(0, 16, repeats), Stage(world, 6)
    reads = num_train_batches(122, stage) * num_reads(6, repeats)
    seen = Counter(pair for epoch in range(repeats) for pair in read(plan(stage, order, epoch), world))
    assert seen.total() == repeats * world * reads
    assert set(seen.values()) <= {1, 2}
    assert 122 - len(seen) < repeats * world * 6
    assert all(
        first != second for first, second in pairwise(read(plan(stage, order, epoch), world) for epoch in range(4))
    )
