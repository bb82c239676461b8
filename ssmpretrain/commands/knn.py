"""`knn`: classify images by a vote of their nearest neighbours among frozen features."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from ssmpretrain.base import ranks
from ssmpretrain.base.errors import UserError
from ssmpretrain.base.whole_files import replace_json
from ssmpretrain.commands.shared import evaluation_data, frozen_encoder
from ssmpretrain.commands.shared.evaluation_data import EvaluationData, load_data, skipped_lines
from ssmpretrain.commands.shared.frozen_encoder import FrozenEncoder, load_frozen
from ssmpretrain.commands.shared.new_files import check_new
from ssmpretrain.evaluation.accuracy import percent
from ssmpretrain.evaluation.features import collect_features, linear_probe_accuracy
from ssmpretrain.evaluation.few_shot import draw_shots
from ssmpretrain.evaluation.nearest_neighbours import Bank, count_hits, find_neighbours_over_ranks

_FEW = 5
_MOST_DRAWS = 10_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    frozen_encoder.add_arguments(parser)
    evaluation_data.add_arguments(parser)
    parser.add_argument("--max-bank", type=int, help="training images to look among, evenly spread (default: all)")
    parser.add_argument("--max-queries", type=int, help="validation images to classify, likewise (default: all)")
    vote = parser.add_argument_group("vote", "weights exp(similarity / temperature), cosine similarity")
    vote.add_argument("--k", type=int, nargs="+", default=[10, 20, 100, 200], help="neighbours (default: %(default)s)")
    vote.add_argument("--temperature", type=float, nargs="+", default=[0.07], help="(default: %(default)s)")
    vote.add_argument("--shots", type=int, nargs="+", default=[], help="also with this many training images per class")
    vote.add_argument("--repeats", type=int, default=3, help="draws for each number of shots (default: %(default)s)")
    vote.add_argument("--seed", type=int, default=0, help="decides the draws (default: %(default)s)")
    parser.add_argument(
        "--logistic",
        action="store_true",
        help="also logistic regression on standardised features, as OnlineEvaluation's linear probe; under torchrun "
        "rank 0 holds all features",
    )
    parser.add_argument("--json", metavar="OUT", help="write the results to this new .json file too")


@dataclass(frozen=True)
class Labelled:
    """Features (n, D) and labels (n,) of this rank's labelled images, and the unlabelled images of all ranks."""

    features: Tensor
    labels: Tensor
    unlabelled: int


@dataclass(frozen=True)
class Row:
    """Accuracies in [0, 1] of one vote.

    Attributes:
        shots: Bank images per class; None for the whole bank.
        k: Neighbours that voted.
        temperature: Temperature of the weights of the votes.
        top1, top5: Mean accuracy over the draws.
        top1_std, top5_std: Standard deviation over the draws, with n - 1; None for a single draw.
    """

    shots: int | None
    k: int
    temperature: float
    top1: float
    top5: float
    top1_std: float | None = None
    top5_std: float | None = None


def run(args: argparse.Namespace) -> int:
    """Encode bank and queries, find neighbours, and print the accuracies of their vote.

    Under torchrun all ranks share the work. Each holds its part of the features. All parts together take 3.9 GB for
    1.28 million images with 768 features in float32, and twice that for a moment.
    """
    _check(args)
    out = check_new(args.json, (".json",), where="knn") if args.json else None
    with ranks.joined_ranks():
        encoder = load_frozen(args, where="knn")
        data = load_data(args, encoder, args.train, args.val)
        data.use_labels()
        images = _labelled(encoder, data, "train", args.max_bank)
        queries = _labelled(encoder, data, "val", args.max_queries)
        bank = Bank.over_ranks(images.features, images.labels)
        rows = [*_whole_bank(bank, queries, args, encoder.device), *_few_shot(bank, queries, args, encoder.device)]
        probe = _logistic(images, queries) if args.logistic else None
        notes = _notes(bank, images, queries, data, args)
        num_queries = sum(ranks.gather(len(queries.labels)))
        if ranks.rank() > 0:
            return 0
    print(f"loaded {encoder.report}")
    num_classes = len(torch.unique(bank.labels))
    print(f"bank {bank.size:,} images of {num_classes:,} classes, queries {num_queries:,}; {encoder}")
    print(*notes, *_table(rows), sep="\n")
    if probe is not None:
        print(f"logistic regression: top-1 {percent(probe)}")
    if out is not None:
        protocol = {**encoder.protocol(), "train": data.describe("train"), "val": data.describe("val")}
        sizes = {"bank": bank.size, "classes": num_classes, "queries": num_queries, "seed": args.seed}
        content = {**protocol, **sizes, "notes": notes, "knn": [asdict(row) for row in rows], "logistic": probe}
        replace_json(out, content)
    return 0


def _check(args: argparse.Namespace) -> None:
    for name, values in (("k", args.k), ("shots", args.shots), ("repeats", [args.repeats])):
        if wrong := [value for value in values if value < 1]:
            raise UserError(f"knn: --{name} is at least 1; got {wrong[0]}.")
    if args.repeats > _MOST_DRAWS:
        raise UserError(f"knn: --repeats is at most {_MOST_DRAWS:,}; got {args.repeats:,}. 3 is usual.")
    if wrong := [value for value in args.temperature if not 0 < value < math.inf]:
        raise UserError(f"knn: --temperature is finite and above 0; got {wrong[0]}. 0.07 is usual.")
    if bool(args.train) != bool(args.val):
        raise UserError("knn: a bank and queries are needed; got one of --train and --val. Name both.")


def _labelled(encoder: FrozenEncoder, data: EvaluationData, split: str, limit: int | None) -> Labelled:
    features, labels = collect_features(encoder, data.batches(split, limit), encoder.device)
    has_label = labels >= 0
    there, missing = (sum(ranks.gather(int(count))) for count in (has_label.sum(), (~has_label).sum()))
    if not there:
        raise UserError(
            f"knn: neighbours vote with labels; got {missing:,} images of {split} without one. "
            "Label them, or write their features with `ssmpretrain embed`."
        )
    return Labelled(features[has_label], labels[has_label], missing)


def _whole_bank(bank: Bank, queries: Labelled, args: argparse.Namespace, device: torch.device) -> Iterator[Row]:
    for (k, temperature), (top1, top5) in _accuracies(bank, queries, args, device).items():
        yield Row(None, k, temperature, top1, top5)


def _few_shot(bank: Bank, queries: Labelled, args: argparse.Namespace, device: torch.device) -> Iterator[Row]:
    seeds = torch.randint(2**62, (args.repeats,), generator=torch.Generator().manual_seed(args.seed)).tolist()
    for shots in args.shots:
        chosen = [bank.chosen(draw_shots(bank.labels, shots, seed)) for seed in seeds]
        draws = [_accuracies(few, queries, args, device) for few in chosen]
        for k, temperature in draws[0]:
            values = torch.tensor([draw[k, temperature] for draw in draws], dtype=torch.float64)
            mean = values.mean(0).tolist()
            spread = values.std(0).tolist() if len(seeds) > 1 else (None, None)
            yield Row(shots, k, temperature, *mean, *spread)


def _accuracies(
    bank: Bank, queries: Labelled, args: argparse.Namespace, device: torch.device
) -> dict[tuple[int, float], tuple[float, float]]:
    """Return top-1 and top-5 accuracy over the queries of all ranks, by k (at most the bank) and temperature."""
    ks = sorted({min(k, bank.size) for k in args.k})
    neighbours = find_neighbours_over_ranks(bank, queries.features, ks[-1], device)
    total = sum(ranks.gather(len(queries.labels)))
    found = {}
    for temperature in args.temperature:
        for k, hits in count_hits(neighbours, queries.labels, ks, temperature).items():
            first, five = torch.stack(ranks.gather(hits)).sum(0).tolist()
            found[k, temperature] = (first / total, five / total)
    return found


def _logistic(images: Labelled, queries: Labelled) -> float:
    """Return on rank 0 the top-1 accuracy of logistic regression on the features of all ranks; 0 on other ranks."""
    parts = [ranks.gather_rows(part, 0) for one in (images, queries) for part in (one.features, one.labels)]
    if ranks.rank() > 0:
        return 0.0
    bank, bank_labels, features, labels = (torch.cat(part) for part in parts)
    return linear_probe_accuracy(bank, bank_labels, features, labels)


def _notes(
    bank: Bank, images: Labelled, queries: Labelled, data: EvaluationData, args: argparse.Namespace
) -> list[str]:
    """Return notes about the data that the user needs to understand the accuracies."""
    notes = [line for split in ("train", "val") for line in skipped_lines(split, data.skipped(split))]
    for split, labelled in (("train", images), ("val", queries)):
        if labelled.unlabelled:
            notes.append(f"left out of {split}: {labelled.unlabelled:,} images without a label")
    lacking = torch.cat(ranks.gather(queries.labels[~torch.isin(queries.labels, bank.labels)]))
    if len(lacking):
        which = torch.unique(lacking).tolist()
        some = ", ".join(str(label) for label in which[:_FEW]) + (", ..." if len(which) > _FEW else "")
        notes.append(f"wrong by necessity: {len(lacking):,} queries of classes that the bank lacks: {some}")
    if cut := [k for k in args.k if k > bank.size]:
        notes.append(f"k {', '.join(map(str, cut))} is cut to {bank.size}, the images in the bank")
    fewest = int(torch.unique(bank.labels, return_counts=True)[1].min())
    if short := [shots for shots in args.shots if shots > fewest]:
        notes.append(f"shots {', '.join(map(str, short))}: some classes have {fewest} images, and give all they have")
    return notes


def _table(rows: list[Row]) -> list[str]:
    head = [f"{'shots':>6}{'k':>7}{'T':>7}{'top-1':>10}{'top-5':>10}"]
    return head + [_line(row) for row in rows]


def _line(row: Row) -> str:
    shots = "all" if row.shots is None else row.shots
    line = f"{shots:>6}{row.k:>7}{row.temperature:>7g}{percent(row.top1):>10}{percent(row.top5):>10}"
    if row.top1_std is None or row.top5_std is None:
        return line
    return f"{line}   +- {percent(row.top1_std)}, {percent(row.top5_std)}"
