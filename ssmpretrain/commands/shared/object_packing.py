"""Packing of images with objects into shards: the options, and the packing itself."""

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssmpretrain.base.errors import UserError
from ssmpretrain.commands.shared.mask_packing import has_masks

if TYPE_CHECKING:
    from ssmpretrain.datamodules.labels.classes import Classes
    from ssmpretrain.datamodules.tar.index import ShardIndex

_WHERE = "shards pack"


def add_object_options(parser: argparse.ArgumentParser) -> None:
    """Define the options of `shards pack` for images with objects."""
    group = parser.add_argument_group("images with objects, for DetectionShards (see docs/data.md)")
    group.add_argument("--annotations", metavar="FILE", help="COCO instances (JSON); file_name is relative to FOLDER")


def has_objects(args: argparse.Namespace) -> bool:
    """Return whether the options ask for images with objects.

    Raises:
        UserError: If options contradict each other.
    """
    if args.annotations is None:
        return False
    if has_masks(args):
        other = "--masks" if args.masks is not None else "--layout"
        raise UserError(
            f"{_WHERE}: --annotations packs objects, and {other} class maps; got both. Pack them one by one, into two "
            "folders."
        )
    return True


def pack_objects(
    args: argparse.Namespace, classes: "Classes | None", progress: Callable[[Iterable[int]], Iterable[int]]
) -> "tuple[list[ShardIndex], dict[str, list[str]], str]":
    """Pack images with objects. A sample has the image, unchanged, and `json` with the final numbers of the classes.

    All objects that can be evaluated are packed. Those that do not train are left out when shards are read to train.

    Args:
        args: Arguments of `shards pack`.
        classes: Names that --classes gives, which number the classes; None for those of the file in the order of ids.
        progress: Wraps the iteration over the numbers of the samples.

    Returns:
        The index of each shard, the images that were left out, by the reason, and a phrase about the objects.

    Raises:
        UserError: If the folder or the file cannot be used, or no image could be packed.
    """
    import json

    from ssmpretrain.datamodules.dense.coco_file import describe_counts
    from ssmpretrain.datamodules.dense.coco_split import open_coco
    from ssmpretrain.datamodules.faults.bad_samples import BadSample
    from ssmpretrain.datamodules.faults.dropped_objects import count_causes
    from ssmpretrain.datamodules.files.image_files import LEAVING
    from ssmpretrain.datamodules.shards.pack import ShardWriter, pack_samples
    from ssmpretrain.datamodules.targets.annotations import annotation_of, renumber

    found = open_coco(args.folder, args.annotations, _WHERE, train=False)
    own, reader = found.file.classes, found.reader()
    numbers = None if classes is None else own.numbers_in(classes, where=_WHERE)
    packed, inside = 0, found.folder.resolve()

    def read(number: int) -> tuple[str, dict[str, bytes]]:
        nonlocal packed
        raw: dict[str, Any] = reader.read(number)
        key = raw.pop("__key__")
        if not args.follow_links and not (found.folder / key).resolve().is_relative_to(inside):
            raise BadSample(LEAVING, key=key)
        try:
            annotation = renumber(annotation_of(raw, len(own.names), own.source), numbers)
        except BadSample as bad:
            raise BadSample(bad.cause, bad.detail, key) from None
        packed += len(annotation["objects"])
        return key, {**raw, "json": json.dumps(annotation).encode()}

    writer = ShardWriter(
        Path(args.out).expanduser(),
        args.prefix,
        samples_per_shard=args.samples_per_shard,
        bytes_per_shard=args.max_bytes,
    )
    left_out: dict[str, list[str]] = {}
    names = (classes or own).names
    pack_samples(len(reader), read, writer, names, left_out, where=args.folder, seed=args.seed, progress=progress)
    dropped = found.dropped()
    lost = f" ({len(dropped):,} dropped: {describe_counts(count_causes(dropped))})" if dropped else ""
    return writer.shards, left_out, f"{packed:,} objects of {len(names):,} classes{lost}"
