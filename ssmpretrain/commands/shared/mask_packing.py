"""Packing of images with masks into shards: the options, and the packing itself."""

import argparse
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssmpretrain.base.errors import UserError

if TYPE_CHECKING:
    from ssmpretrain.datamodules.labels.classes import Classes
    from ssmpretrain.datamodules.tar.index import ShardIndex

_WHERE = "shards pack"
# Options of images with masks, and their arguments of MaskSource.
_OPTIONS = ("layout", "mask", "image_ending", "class_map", "ignore", "reduce_zero", "num_classes")


def add_mask_options(parser: argparse.ArgumentParser) -> None:
    """Define the options of `shards pack` for images with masks."""
    group = parser.add_argument_group("images with masks, for SegmentationShards (see docs/data.md)")
    group.add_argument("--masks", metavar="FOLDER", help="folder of the masks; may be the folder of the images")
    group.add_argument(
        "--layout", metavar="NAME", help="FOLDER is a whole data set: ade20k, voc, cityscapes, cityscapes_ids, folders"
    )
    group.add_argument("--split", choices=("train", "val"), help="part of a data set with --layout to pack")
    group.add_argument(
        "--mask", metavar="TEMPLATE", help="path of a mask below its folder (default: {folder}/{stem}.png)"
    )
    group.add_argument("--image-ending", metavar="TEXT", help="end of the images' stems that masks do not share")
    group.add_argument(
        "--class-map",
        metavar="JSON",
        type=_class_map,
        help='class of each number: {"0": "road", "7": 255}; 255 ignores',
    )
    group.add_argument(
        "--ignore", metavar="N,N", type=_numbers, default=(), help="further numbers in the masks to ignore"
    )
    group.add_argument(
        "--reduce-zero",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="0 is ignored, and each other number is one more than its class",
    )
    group.add_argument("--num-classes", metavar="K", type=int, help="number of classes, if nothing names them")


def has_masks(args: argparse.Namespace) -> bool:
    """Return whether the options ask for images with masks.

    Raises:
        UserError: If options contradict each other.
    """
    if args.layout is not None and args.split is None:
        raise UserError(f"{_WHERE}: a data set with --layout is packed part by part. Add --split train or --split val.")
    if args.split is not None and args.layout is None:
        raise UserError(f"{_WHERE}: --split is a part of a data set with --layout; got no layout. Leave out --split.")
    if args.masks is not None or args.layout is not None:
        return True
    given = [name for name in _OPTIONS if getattr(args, name) not in (None, ())]
    if given:
        option = f"--{given[0].replace('_', '-')}"
        raise UserError(f"{_WHERE}: {option} is for images with masks. Add --masks FOLDER, or --layout NAME.")
    return False


def pack_masks(
    args: argparse.Namespace, classes: "Classes | None", progress: Callable[[Iterable[int]], Iterable[int]]
) -> "tuple[list[ShardIndex], dict[str, list[str]], str]":
    """Pack images with masks. A sample has the image, unchanged, and `seg.png` with the final numbers of the classes.

    Args:
        args: Arguments of `shards pack`.
        classes: Names that --classes gives; None for those of the data.
        progress: Wraps the iteration over the numbers of the samples.

    Returns:
        The index of each shard, what was left out, by the reason, and a phrase about the classes.

    Raises:
        UserError: If the folders cannot be used, or no image could be packed.
    """
    from ssmpretrain.datamodules.dense.mask_source import MaskSource
    from ssmpretrain.datamodules.faults.bad_samples import BadSample
    from ssmpretrain.datamodules.shards.pack import ShardWriter, pack_samples
    from ssmpretrain.datamodules.targets.class_map import class_table, decode_class_map

    split = args.split or "train"
    source = MaskSource(
        where=_WHERE,
        images={split: args.folder},
        masks={} if args.masks is None else {split: args.masks},
        classes=classes,
        follow_links=args.follow_links,
        **{name: getattr(args, name) for name in _OPTIONS},
    )
    found = source.open(split, 1.0)
    if shared := found.files.describe_shared():
        print(f"note: {shared}")
    reader, numbers = found.reader(), found.numbers
    table = class_table(numbers.count)

    def read(number: int) -> tuple[str, dict[str, bytes]]:
        raw: dict[str, Any] = reader.read(number)
        key = raw.pop("__key__")
        try:
            decode_class_map(raw, table, numbers.described)
        except BadSample as bad:
            raise BadSample(bad.cause, bad.detail, key) from None
        return key, raw

    writer = ShardWriter(
        Path(args.out).expanduser(),
        args.prefix,
        samples_per_shard=args.samples_per_shard,
        bytes_per_shard=args.max_bytes,
    )
    left_out = {reason: list(paths) for reason, paths in found.files.left_out.items()}
    names, folder = numbers.classes.names, str(found.files.folders.images)
    pack_samples(len(reader), read, writer, names, left_out, where=folder, seed=args.seed, progress=progress)
    said = f"masks of {numbers.count:,} classes"
    return writer.shards, left_out, said if names else f"{said} without names (num_classes: {numbers.count})"


def _class_map(text: str) -> dict[int, int | str]:
    try:
        return {int(number): label for number, label in json.loads(text).items()}
    except (ValueError, AttributeError):
        raise argparse.ArgumentTypeError(
            f'expected JSON with the class of each number, such as {{"0": "road", "7": 255}}; got {text[:60]!r}'
        ) from None


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(number) for number in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected numbers such as 0,255; got {text[:60]!r}") from None
