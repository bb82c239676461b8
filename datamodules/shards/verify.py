"""Verification of shards: the tar is whole, its index is correct, and every sample can be used."""

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ssmpretrain.base.errors import DataError
from ssmpretrain.datamodules.decoding.decode import MAX_PIXELS, check_sample, decode_sample
from ssmpretrain.datamodules.faults.bad_samples import BadSample
from ssmpretrain.datamodules.files.image_files import IMAGE_EXTENSIONS
from ssmpretrain.datamodules.labels.captions import Captions
from ssmpretrain.datamodules.labels.classes import UNLABELLED, Classes, Labels
from ssmpretrain.datamodules.shards.classes_beside import classes_beside
from ssmpretrain.datamodules.shards.folder_index import NAME, folder_entries
from ssmpretrain.datamodules.shards.location import Location, RemoteShard, local_path
from ssmpretrain.datamodules.shards.open_tar import renew
from ssmpretrain.datamodules.shards.shard import Shard
from ssmpretrain.datamodules.tar.index import ShardIndex, checksum, index_path, read_index
from ssmpretrain.datamodules.tar.sample import RawSample, Span
from ssmpretrain.datamodules.tar.walk import Walked, walk_tar
from ssmpretrain.datamodules.targets.annotations import annotation_of, is_annotation
from ssmpretrain.datamodules.targets.class_map import (
    CLASS_MAP,
    MOST_CLASSES,
    class_table,
    decode_class_map,
    paired_mask,
)


@dataclass(frozen=True)
class Problem:
    """A problem in a shard.

    Args:
        kind: Phrase under which the problem is counted.
        where: Name of the shard, member or file, with details.
    """

    kind: str
    where: str


@dataclass
class ShardReport:
    """Findings in one shard.

    Args:
        path: The shard.
        samples: Number of samples.
        extensions: Number of members with each extension.
        indexed: Whether the shard has an index.
        keys: Keys of the samples that could be read.
        problems: Problems that were found; empty if the shard is good.
    """

    path: Location
    samples: int = 0
    extensions: dict[str, int] = field(default_factory=dict)
    indexed: bool = False
    keys: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


def verify_shard(
    shard: Location, *, decode: bool, max_pixels: int = MAX_PIXELS, captions: Captions | None = None
) -> ShardReport:
    """Check one shard.

    Args:
        shard: The tar file. A shard on a server is fetched and compared with its index.
        decode: Whether to decode each image. Otherwise structure, index, checksums, fields and labels are checked.
        max_pixels: Largest number of pixels of an image; a larger image is a problem.
        captions: Reader of the captions that each sample should have; a missing or unusable caption is a problem. None
            checks no captions.

    Returns:
        The findings. Problems are not raised.
    """
    report = ShardReport(shard, indexed=_has_index(shard))
    try:
        if isinstance(shard, RemoteShard):
            renew(shard)
        with local_path(shard) as path:
            walked = walk_tar(path)
            report.samples, report.extensions = len(walked.offsets), walked.extensions
            if walked.damage:
                report.problems.append(Problem("damaged shards or indexes", f"{shard}: {walked.damage}"))
            elif not any(extension in walked.extensions for extension in IMAGE_EXTENSIONS):
                report.problems.append(Problem("shards without an image", shard.name))
            crc32 = _compare_index(report, path, walked) if report.indexed else None
            tar = Shard(ShardIndex(path, len(walked.offsets), path.stat().st_size, walked.extensions))
            labels = _read(report, tar, walked, crc32, max_pixels if decode else None, captions)
            _check_labels(report, labels)
    except DataError as error:
        report.problems.append(Problem("damaged shards or indexes", str(error)))
    except OSError as error:
        report.problems.append(Problem("damaged shards or indexes", f"{shard}: {error.strerror or error}"))
    return report


def compare_folder_indexes(reports: Iterable[ShardReport]) -> Iterator[Problem]:
    """Yield a problem for each local shard whose entry in the `index.json` of its folder differs from its content."""
    said: dict[Path, dict[str, ShardIndex | None]] = {}
    for report in reports:
        if isinstance(path := report.path, Path):
            folder = path.parent
            if folder not in said:
                said[folder] = folder_entries(folder) or {}
            index = said[folder].get(path.name)
            found = report.samples, report.extensions
            if path.name in said[folder] and (index is None or (index.samples, index.extensions) != found):
                yield Problem("indexes that describe other contents", f"{NAME}: {path.name}")


def _has_index(shard: Location) -> bool:
    return index_path(shard).exists() if isinstance(shard, Path) else shard.samples >= 0


def _compare_index(report: ShardReport, path: Path, walked: Walked) -> NDArray[np.int64] | None:
    """Compare the shard with its index.

    Returns:
        The checksum of each sample if the samples must be compared one by one; otherwise None.
    """
    if isinstance(report.path, RemoteShard):  # its bytes were checked when it was fetched
        if report.path.samples != len(walked.offsets):
            report.problems.append(Problem("indexes that describe other contents", report.path.name))
        return None
    index, layout = read_index(index_path(path))
    same = np.array_equal(layout.offsets, walked.offsets)
    described = index.bytes, index.extensions, index.sha256
    if same and described == (path.stat().st_size, walked.extensions, checksum(path)):
        return None
    report.problems.append(Problem("indexes that describe other contents", index_path(path).name))
    return layout.crc32 if same else None


def _read(
    report: ShardReport,
    tar: Shard,
    walked: Walked,
    crc32: NDArray[np.int64] | None,
    max_pixels: int | None,
    captions: Captions | None,
) -> dict[str, int]:
    """Read every sample, and decode it unless `max_pixels` is None; return the label of each good sample by key."""
    found: dict[str, int] = {}
    annotated: dict[str, bool] = {}
    labels = Labels(classes_beside(report.path))
    labels.judged = True
    size = tar.index.bytes
    for number, (start, stop) in enumerate(pairwise([*walked.offsets.tolist(), size])):
        key = f"byte {start:,}"
        checksum = None if crc32 is None else int(crc32[number])
        try:
            raw = tar.read_span(Span(start, stop, stop == size, checksum))
            key = raw["__key__"]
            report.keys.append(key)
            if captions is not None:
                report.problems.extend(_problem(report, fault, key) for fault in captions.sort(raw)[1])
            found[key] = check_sample(raw, labels)[1]
            if max_pixels is not None:
                decode_sample(raw, labels, max_pixels)
            if CLASS_MAP in walked.extensions:
                _check_class_map(raw, labels.own, max_pixels)
            if "json" in walked.extensions:
                annotated[key] = is_annotation(raw)
                if annotated[key]:
                    _check_annotation(raw, labels.own)
        except BadSample as bad:
            report.problems.append(_problem(report, bad, bad.key or key))
    if (without := [key for key, is_one in annotated.items() if not is_one]) and len(without) < len(annotated) / 2:
        cause = "images without an annotation where most have one"
        report.problems.extend(Problem(cause, f"{report.path.name}: {key}") for key in without)
    return found


def _check_class_map(raw: RawSample, classes: Classes, max_pixels: int | None) -> None:
    """Raise a BadSample if the class map of a sample is missing or bad; decode it unless `max_pixels` is None."""
    if max_pixels is None:
        paired_mask(raw)
    else:
        count = len(classes.names) or MOST_CLASSES
        named = f"{classes.source} names {count:,} classes" if classes else f"there are up to {count:,} classes"
        decode_class_map(raw, class_table(count), named, max_pixels)


def _check_annotation(raw: RawSample, classes: Classes) -> None:
    """Raise a BadSample if the objects of a sample are bad, or their classes are not among those that are named."""
    count = len(classes.names) or sys.maxsize
    named = f"{classes.source} names {count:,} classes"
    annotation_of(raw, count, named)


def _problem(report: ShardReport, bad: BadSample, key: str) -> Problem:
    detail = f" ({bad.detail})" if bad.detail else ""
    return Problem(bad.cause, f"{report.path.name}: {key}{detail}")


def _check_labels(report: ShardReport, labels: dict[str, int]) -> None:
    """Report samples without a label if most other samples of the shard have one."""
    without = [key for key, label in labels.items() if label == UNLABELLED]
    if len(without) < len(labels) / 2:
        cause = "samples without a label where most have one"
        report.problems.extend(Problem(cause, f"{report.path.name}: {key}") for key in without)
