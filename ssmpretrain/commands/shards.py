"""`shards`: pack a folder of images into tar shards, index shards that exist, verify them."""

import argparse
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from ssmpretrain.base import byte_sizes
from ssmpretrain.base.shown_names import shown
from ssmpretrain.commands.shared.mask_packing import add_mask_options, has_masks, pack_masks
from ssmpretrain.commands.shared.object_packing import add_object_options, has_objects, pack_objects

if TYPE_CHECKING:
    from ssmpretrain.datamodules.shards.verify import Problem, ShardReport
    from ssmpretrain.datamodules.tar.index import ShardIndex

_SHOWN = 3  # examples of each kind of problem


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define `shards pack`, `shards index` and `shards verify`."""
    actions = parser.add_subparsers(dest="action", metavar="{pack,index,verify}", required=True)

    pack = actions.add_parser("pack", help="pack a folder of images into shards", description=_PACK)
    pack.add_argument(
        "folder", help="images (jpg, jpeg, png, webp); first-level sub-folders are classes, if there are any"
    )
    pack.add_argument("out", help="folder for the shards; nothing in it is overwritten")
    pack.add_argument("--prefix", default="shard", help="start of the file names (default: %(default)s)")
    pack.add_argument(
        "--max-bytes", type=parse_size, default="1G", help="size of a shard, as 500M (default: %(default)s)"
    )
    pack.add_argument("--samples-per-shard", type=_positive, default=10_000, help="at most (default: %(default)s)")
    pack.add_argument("--seed", type=int, default=0, help="decides the order of the images (default: %(default)s)")
    pack.add_argument(
        "--classes",
        metavar="FILE",
        help="number the classes in the order of this list: the folder or classes.json of another set, or a file with "
        "one name per line (default: the class folders in sorted order)",
    )
    pack.add_argument(
        "--no-captions", dest="captions", action="store_false", help="leave out NAME.txt and NAME.json beside NAME.jpg"
    )
    pack.add_argument(
        "--follow-links",
        action="store_true",
        help="follow links to folders and files outside of the folder (default: leave them out)",
    )
    add_mask_options(pack)
    add_object_options(pack)

    index = actions.add_parser("index", help="write the index beside each shard", description=_INDEX)
    index.add_argument("paths", nargs="+", metavar="PATH", help="tar files, folders, brace patterns or globs")

    verify = actions.add_parser("verify", help="check shards: structure, index, images, labels", description=_VERIFY)
    verify.add_argument("paths", nargs="+", metavar="PATH", help="tar files, folders, brace patterns, globs, URLs")
    verify.add_argument(
        "--caption", action="append", metavar="FIELD", help="check captions too: txt, json.FIELD; may be repeated"
    )
    verify.add_argument("--fast", action="store_true", help="do not decode the images")
    verify.add_argument("--workers", type=_positive, default=min(8, os.cpu_count() or 1), help="(default: %(default)s)")


_PACK = (
    "Pack images, bytes unchanged and in shuffled order, into webdataset tar shards with an index beside each. "
    "A caption beside an image (NAME.txt, NAME.json) is packed along, for ImageTextShards. Class folders become "
    "numbers: pack further sets of the same classes with --classes and the classes.json of the first. "
    "With --masks or --layout, each image is packed with its mask; with --annotations, with its objects."
)
_INDEX = (
    "Write the index (samples, bytes, checksum, offsets) beside each shard, and index.json for the folder: "
    "training then starts without a scan."
)
_VERIFY = (
    "Check that shards are whole, agree with their index, hold no key twice, and that every image, label, class map "
    "and annotation is good; "
    "with --caption, that every image has a caption that can be used."
)


def run(args: argparse.Namespace) -> int:
    """Run `shards pack`, `shards index` or `shards verify`.

    Returns:
        0, or 2 after problems, which are printed.

    Raises:
        ValueError, OSError: If the paths cannot be used.
    """
    return {"pack": _pack, "index": _index, "verify": _verify}[args.action](args)


def parse_size(text: str) -> int:
    """Read a size in bytes from a command-line argument, as `byte_sizes.parse_size`.

    Raises:
        argparse.ArgumentTypeError: If it is not a positive size.
    """
    try:
        return byte_sizes.parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _pack(args: argparse.Namespace) -> int:
    from pathlib import Path

    from tqdm import tqdm

    from ssmpretrain.datamodules.dense.mask_files import OTHER_ENDING
    from ssmpretrain.datamodules.files.image_files import MET, find_images
    from ssmpretrain.datamodules.labels.classes import CLASSES_FILE, read_classes
    from ssmpretrain.datamodules.shards.pack import CAPTION_EXTENSIONS, pack_folder

    listed = None
    if args.classes:
        path = Path(args.classes).expanduser()
        listed = read_classes(path / CLASSES_FILE if path.is_dir() else path)
    progress = partial(tqdm, desc="packing", unit=" images", disable=None)
    pack = pack_objects if has_objects(args) else pack_masks if has_masks(args) else None
    if pack is not None:
        shards, left_out, classes = pack(args, listed, progress)
        _say_packed(shards, left_out, f"{classes}, ")
        return 2 if any(reason != MET and not reason.startswith(OTHER_ENDING) for reason in left_out) else 0
    files = find_images(args.folder, where="shards pack", follow_links=args.follow_links)
    shards, left_out = pack_folder(
        files,
        Path(args.out).expanduser(),
        prefix=args.prefix,
        samples_per_shard=args.samples_per_shard,
        bytes_per_shard=args.max_bytes,
        seed=args.seed,
        captions=args.captions,
        classes=listed,
        progress=progress,
    )
    classes = f"{len(files.classes):,} classes" if files.classes else "no labels"
    captions = "".join(
        f"{count:,} .{extension} captions, "
        for extension in CAPTION_EXTENSIONS
        if (count := sum(shard.extensions.get(extension, 0) for shard in shards))
    )
    _say_packed(shards, left_out, f"{classes}, {captions}")
    if listed and (without := [name for name in listed.names if name not in files.classes]):
        print(f"classes with no image: {len(without):,} of {len(listed.names):,}: {shown(_few(without))}")
    return 2 if left_out.keys() - {MET} else 0


def _say_packed(shards: "Sequence[ShardIndex]", left_out: "Mapping[str, Sequence[str]]", content: str) -> None:
    """Print what was packed, and what was left out."""
    from ssmpretrain.datamodules.files.image_files import IMAGE_EXTENSIONS, describe_left_out

    samples, size = sum(shard.samples for shard in shards), byte_sizes.show_size(sum(shard.bytes for shard in shards))
    print(f"packed {samples:,} images, {content}into {len(shards):,} shards, {size}: {_show_pattern(shards)}")
    kinds = {name for shard in shards for name in shard.extensions if name in IMAGE_EXTENSIONS}
    if len(kinds) > 1:
        print(
            f"note: the images are of {len(kinds)} kinds ({', '.join(sorted(kinds))}): Hugging Face's load_dataset "
            "refuses several. Convert the images to one kind if you need it."
        )
    for line in describe_left_out(left_out):
        print(line)


def _index(args: argparse.Namespace) -> int:
    from pathlib import Path

    from tqdm import tqdm

    from ssmpretrain.base.errors import DataError
    from ssmpretrain.datamodules.remote.server import is_remote
    from ssmpretrain.datamodules.shards.folder_index import write_folder_indexes
    from ssmpretrain.datamodules.shards.paths import find_shards
    from ssmpretrain.datamodules.tar.index import write_index

    if remote := [path for path in args.paths if is_remote(path)]:
        raise DataError(f"shards index: writes beside local shards; got {remote[0]}. Index the shards before upload.")
    paths = [path for path in find_shards(args.paths, where="shards index") if isinstance(path, Path)]
    indexes = [write_index(path) for path in tqdm(paths, desc="indexing", unit=" shards", disable=None)]
    write_folder_indexes(indexes)
    print(f"indexed {len(indexes):,} shards, {sum(index.samples for index in indexes):,} samples")
    return 0


def _verify(args: argparse.Namespace) -> int:
    from concurrent.futures import ThreadPoolExecutor

    from tqdm import tqdm

    from ssmpretrain.datamodules.labels.captions import Captions
    from ssmpretrain.datamodules.shards.describe import load_indexes
    from ssmpretrain.datamodules.shards.location import RemoteShard
    from ssmpretrain.datamodules.shards.paths import find_shards
    from ssmpretrain.datamodules.shards.verify import verify_shard
    from ssmpretrain.datamodules.tar.index import ShardIndex

    captions = Captions(args.caption, "shards verify") if args.caption else None
    paths = find_shards(args.paths, where="shards verify")
    if any(isinstance(path, RemoteShard) for path in paths):  # a fetched shard is compared with its index
        found = zip(paths, load_indexes(paths), strict=True)
        paths = [index.path if isinstance(index, ShardIndex) else path for path, index in found]
    check = partial(verify_shard, decode=not args.fast, captions=captions)
    with ThreadPoolExecutor(args.workers) as pool:  # decoding and checksums release the GIL
        results = pool.map(check, paths)
        return _report(list(tqdm(results, total=len(paths), desc="verifying", unit=" shards", disable=None)))


def _report(reports: "Sequence[ShardReport]") -> int:
    """Print the faults, one line per kind, and a summary."""
    from ssmpretrain.datamodules.shards.verify import compare_folder_indexes
    from ssmpretrain.datamodules.tar.index import describe_several_images

    each = (problem for report in reports for problem in report.problems)
    problems = [*each, *compare_folder_indexes(reports), *_repeated_keys(reports)]
    kinds = Counter(problem.kind for problem in problems)
    for kind, count in kinds.most_common():
        print(f"{count:>8,}  {kind}: {shown(_few([problem.where for problem in problems if problem.kind == kind]))}")
    without = sum(not report.indexed for report in reports)
    note = f" ({without:,} without an index: `ssmpretrain shards index` writes it)" if without else ""
    samples = sum(report.samples for report in reports)
    if several := describe_several_images((report.samples, report.extensions) for report in reports):
        print(f"note: {several}")
    verdict = f"problems: {len(problems):,}" if problems else "all good"
    print(f"verified {len(reports):,} shards{note}, {samples:,} samples: {verdict}")
    return 2 if problems else 0


def _repeated_keys(reports: "Sequence[ShardReport]") -> "Iterable[Problem]":
    from ssmpretrain.datamodules.shards.verify import Problem

    first: dict[str, str] = {}
    for report in reports:
        for key in report.keys:
            if key in first:
                yield Problem("keys used twice", f"{key} in {first[key]} and {report.path.name}")
            first.setdefault(key, report.path.name)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1; got {text!r}")
    return int(text)


def _few(texts: Sequence[str]) -> str:
    return "; ".join(texts[:_SHOWN]) + (f"; and {len(texts) - _SHOWN:,} more" if len(texts) > _SHOWN else "")


def _show_pattern(shards: "Sequence[ShardIndex]") -> str:
    """Return the brace pattern that names the shards in a recipe."""
    first = str(shards[0].path)
    if len(shards) == 1:
        return first
    return f"{first[:-10]}{{{first[-10:-4]}..{str(shards[-1].path)[-10:-4]}}}.tar"
