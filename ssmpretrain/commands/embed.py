"""`embed`: the features of every image, in one file with keys and labels."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ssmpretrain.base import ranks
from ssmpretrain.base.errors import UserError
from ssmpretrain.base.whole_files import moved_into_place
from ssmpretrain.commands.shared import evaluation_data, frozen_encoder
from ssmpretrain.commands.shared.evaluation_data import EvaluationData, load_data, skipped_lines
from ssmpretrain.commands.shared.frozen_encoder import FrozenEncoder, load_frozen
from ssmpretrain.commands.shared.new_files import check_new
from ssmpretrain.evaluation.feature_files import DTYPES, SUFFIXES, check_format, write_features
from ssmpretrain.evaluation.features import Encoded, encode_batches


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    frozen_encoder.add_arguments(parser)
    parser.add_argument("out", metavar="OUT", help="a new file, .npz or .parquet; nothing is overwritten")
    evaluation_data.add_arguments(parser)
    parser.add_argument(
        "--split",
        choices=("val", "train"),
        help="validation images, or training images without augmentation (default: val, unless --train alone is named)",
    )
    parser.add_argument("--limit", type=int, help="take this many images, evenly spread (default: all)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the features (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Encode every image of a split once, in order, and write one file. Under torchrun all ranks share the work.

    Rank 0 writes. The other ranks hold the features of their part until rank 0 asks for them.
    """
    out = check_new(args.out, SUFFIXES, where="embed")
    check_format(out, where="embed")
    args.split = _split(args)
    with ranks.joined_ranks():
        encoder = load_frozen(args, where="embed")
        data = load_data(args, encoder, args.train, args.val)
        batches = data.batches(args.split, args.limit)
        parts = ranks.in_order(encode_batches(encoder, batches, encoder.device))
        if ranks.rank() == 0:
            lines = _write(out, parts, args, encoder, data)
            print(f"loaded {encoder.report}", *lines, sep="\n")
        else:
            for _ in parts:
                raise AssertionError("in_order yields on rank 0 alone")
            data.skipped(args.split)
    return 0


def _split(args: argparse.Namespace) -> str:
    """Return the split to encode; raise if the command names images, but none of this split."""
    named = [split for split in ("val", "train") if getattr(args, split)]
    split = args.split or (named[0] if named else "val")
    if named and split not in named:
        raise UserError(f"embed: --split {split} needs images; got --{named[0]} alone. Name some with --{split}.")
    return str(split)


def _write(
    out: Path, parts: Iterator[Encoded], args: argparse.Namespace, encoder: FrozenEncoder, data: EvaluationData
) -> list[str]:
    """Write the file, and return the lines to print."""
    skipped: dict[str, int] = {}

    def outcome() -> dict[str, Any]:
        skipped.update(data.skipped(args.split))
        return {"skipped": skipped}

    protocol = {**encoder.protocol(), "dtype": args.dtype, "limit": args.limit, "data": data.describe(args.split)}
    with moved_into_place(out) as partial:
        count, width = write_features(partial, out.suffix, parts, args.dtype, protocol, outcome)
    wrote = f"wrote {out}: {count:,} images x {width} features, {args.dtype}; {encoder}"
    return [wrote, *skipped_lines(args.split, skipped)]
