"""`plan`: the samples that a run would read on a number of ranks, without training, and a check of the whole plan."""

from __future__ import annotations

import argparse
import time
import tracemalloc
from typing import TYPE_CHECKING, Any

import numpy as np

from ssmpretrain.base.errors import UserError
from ssmpretrain.base.yaml_files import read_recipe

if TYPE_CHECKING:
    from ssmpretrain.datamodules.order.plan import Order, Stage

_SHUFFLE_BUFFER = 5000  # the default of ImageShards


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define `plan`."""
    parser.add_argument("shards", nargs="*", metavar="PATH", help="tar files, folders, brace patterns, globs or URLs")
    parser.add_argument("--config", help="a recipe or a run's config.yaml, for options that are not given here")
    parser.add_argument("--simulate", nargs=2, type=int, metavar=("SHARDS", "SAMPLES"), help="assume equal shards")
    parser.add_argument("--ranks", type=int, help="processes that train (default: 1)")
    parser.add_argument("--batch-size", type=int, help="images per rank and batch (default: 64)")
    parser.add_argument("--accumulate", type=int, help="batches of a rank in one optimizer step (default: 1)")
    parser.add_argument("--epoch-samples", type=int, help="length of an epoch (default: all samples)")
    parser.add_argument("--epoch", type=int, default=0, help="which one to plan (default: %(default)s)")
    parser.add_argument("--check", action="store_true", help="check on all ranks that each sample is read once")


def run(args: argparse.Namespace) -> int:
    """Print the plan.

    Raises:
        ValueError, OSError: If the shards cannot be used, or a number is out of range.
    """
    from ssmpretrain.datamodules.order.plan import MOST_SAMPLES, Order, Stage

    recipe = read_recipe(args.config) if args.config else {}
    data, trainer = recipe.get("data", {}).get("init_args", {}), recipe.get("trainer", {})
    devices = trainer.get("devices", 1) if isinstance(trainer.get("devices", 1), int) else 1

    def chosen(option: str, otherwise: Any, least: int = 1) -> Any:
        value = getattr(args, option)
        if value is not None and value < least:
            raise UserError(f"plan: --{option.replace('_', '-')} is at least {least}; got {value}.")
        if value is not None and value > MOST_SAMPLES:
            raise UserError(f"plan: --{option.replace('_', '-')} is at most {MOST_SAMPLES:,}; got {value:,}.")
        return otherwise if value is None else value

    stage = Stage(
        chosen("ranks", devices * trainer.get("num_nodes", 1)),
        chosen("batch_size", data.get("batch_size", 64)),
        chosen("accumulate", trainer.get("accumulate_grad_batches", 1)),
    )
    order = Order(
        seed=data.get("seed", 0),
        block=data.get("shuffle_buffer", _SHUFFLE_BUFFER),
        repeats=data.get("repeats", 1),
        epoch_samples=chosen("epoch_samples", data.get("epoch_samples")),
        remainder=data.get("remainder", "drop"),
    )
    chosen("epoch", 0, least=0)
    if args.simulate and min(args.simulate) < 1:
        raise UserError(f"plan: --simulate takes two numbers of at least 1; got {' '.join(map(str, args.simulate))}.")
    if args.simulate and args.simulate[0] * args.simulate[1] > MOST_SAMPLES:
        raise UserError(
            f"plan: --simulate takes numbers whose product is at most {MOST_SAMPLES:,}; got "
            f"{' '.join(map(str, args.simulate))}."
        )
    if args.simulate and args.shards:
        raise UserError("plan: --simulate replaces shards; got both. Leave one of them out.")
    sizes = np.full(args.simulate[0], args.simulate[1]) if args.simulate else _sizes(args.shards or data.get("train"))
    _print_plan(sizes, order, stage, args.epoch)
    if args.check:
        return _check(sizes, order, stage, args.epoch)
    return 0


def _sizes(shards: str | list[str] | None) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Count the samples in each shard."""
    from ssmpretrain.datamodules.shards.damage import keep_usable
    from ssmpretrain.datamodules.shards.describe import load_indexes
    from ssmpretrain.datamodules.shards.paths import find_shards

    if not shards:
        raise UserError(
            "plan: no shards. Give tar files, --config with a recipe that names some (data.init_args.train), or "
            "--simulate SHARDS SAMPLES."
        )
    paths = find_shards(shards, where="plan")
    kept, _ = keep_usable(paths, load_indexes(paths), 1.0, "plan")
    return np.asarray([index.samples for index in kept])


def _print_plan(sizes: np.ndarray[Any, Any], order: Order, stage: Stage, epoch: int) -> None:
    from ssmpretrain.datamodules.order.plan import TrainPlan, num_reads

    tracemalloc.start()
    start = time.perf_counter()
    plan = TrainPlan(sizes, order, epoch, [stage])
    if not plan.num_batches:
        raise UserError(
            f"plan: an epoch needs a full batch on every rank; got {order.epoch_samples or int(sizes.sum()):,} samples "
            f"in an epoch, for {stage.world:,} ranks of {stage.batch_size:,}. Use fewer ranks or a smaller batch."
        )
    plan.samples(stage.world - 1, plan.num_batches - 1)
    seconds, memory = time.perf_counter() - start, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    total, reads = int(sizes.sum()), plan.num_batches * num_reads(stage.batch_size, order.repeats)
    left = total - stage.world * reads
    remainder = f"{left:,} samples left out, others each epoch" if left >= 0 else f"{-left:,} samples read twice"
    if order.epoch_samples:
        remainder = f"none: an epoch is {1 - left / total:.2f} passes over the data, and the next goes on where it ends"
    shards = plan.samples(0, 0, plan.num_batches).shards
    rows = {
        "data": f"{len(sizes):,} shards of {sizes.min():,} to {sizes.max():,} samples, {total:,} in all",
        "step": f"{stage.samples_per_step:,} images = {stage.batch_size:,} x {stage.world:,} ranks x "
        f"{stage.accumulate:,} accumulated",
        "epoch": f"{-(-plan.num_batches // stage.accumulate):,} steps; each rank reads {reads:,} samples in "
        f"{plan.num_batches:,} batches, rank 0 from {len(np.unique(shards)):,} shards",
        "remainder": remainder,
        "planned": f"by one process in {seconds * 1e3:,.0f} ms with {memory / 1e6:,.1f} MB",
    }  # fmt: skip
    for name, text in rows.items():
        print(f"{name:<12}{text}")


def _check(sizes: np.ndarray[Any, Any], order: Order, stage: Stage, epoch: int) -> int:
    """Check the plan of all ranks. Return 0 if all read equally many samples and repeat none without need, else 1."""
    from ssmpretrain.datamodules.order.plan import TrainPlan

    start = time.perf_counter()
    plan = TrainPlan(sizes, order, epoch, [stage])
    first = np.cumsum(sizes) - sizes
    seen = np.zeros(int(sizes.sum()), dtype=np.uint16)
    counts, shards = set(), []
    for rank in range(stage.world):
        samples = plan.samples(rank, 0, plan.num_batches)
        np.add.at(seen, first[samples.shards] + samples.samples, 1)
        counts.add(len(samples.shards))
        shards.append(len(np.unique(samples.shards)))
    # An epoch that is longer than the data reads all samples before it repeats any.
    spread = int(seen.max()) - int(seen.min())
    good = len(counts) == 1 and spread <= (2 if order.epoch_samples else 1)
    often = f"each sample {seen.min()} to {seen.max()} times" if seen.max() > 1 else "no sample twice"
    reads = " or ".join(f"{count:,}" for count in sorted(counts))
    verdict = "as it should be" if good else "WRONG, please report this"
    print(
        f"{'checked':<12}all {stage.world:,} ranks: {often}, {int((seen == 0).sum()):,} not read; every rank {reads} "
        f"samples from {min(shards):,} to {max(shards):,} shards: {verdict} ({time.perf_counter() - start:.1f} s)"
    )
    return 0 if good else 1
