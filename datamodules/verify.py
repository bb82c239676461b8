"""Look at every byte of a shard: is it whole, is its index right, can every sample be used?"""

from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ssmpretrain.datamodules.bad_samples import BadSample
from ssmpretrain.datamodules.errors import DataError
from ssmpretrain.datamodules.index import load_index
from ssmpretrain.datamodules.reading import read_sample
from ssmpretrain.datamodules.samples import check_sample, decode_sample
from ssmpretrain.datamodules.shard_index import ShardIndex, checksum, index_path, walk
from ssmpretrain.datamodules.sources import RemoteShard, Shard, local_path


@dataclass(frozen=True)
class Problem:
    """Something wrong: what kind, and which member or file."""

    kind: str
    where: str


@dataclass
class ShardReport:
    """What was found in one shard; `problems` is empty if all is well."""

    path: Shard
    samples: int = 0
    indexed: bool = False
    keys: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


def verify_shard(shard: Shard, *, decode: bool) -> ShardReport:
    """Check one shard.

    Args:
        shard: The tar file; one on a server is fetched, and compared with its index by that.
        decode: Whether to decode each image; without, only structure, index, checksum, fields and labels are checked.
    """
    report = ShardReport(shard, indexed=_has_index(shard))
    try:
        with local_path(shard) as path:
            contents, offsets = walk(path)
            report.samples = contents.samples
            if not contents.images:
                report.problems.append(Problem("shards without an image", shard.name))
            if report.indexed:
                _compare_index(report, path, contents)
            _read(report, offsets, contents.bytes, decode=decode)
    except (DataError, OSError) as error:
        report.problems.append(Problem("damaged shards or indexes", str(error)))
    return report


def _has_index(shard: Shard) -> bool:
    return index_path(shard).exists() if isinstance(shard, Path) else shard.samples >= 0


def _compare_index(report: ShardReport, path: Path, contents: ShardIndex) -> None:
    if isinstance(report.path, RemoteShard):
        agrees, name = report.path.samples == contents.samples, report.path.name
    else:
        index, name = load_index(path), index_path(path).name
        agrees = (index.samples, index.extensions) == (contents.samples, contents.extensions)
        agrees = agrees and index.sha256 == checksum(path)
    if not agrees:
        report.problems.append(Problem("indexes that describe other contents", name))


def _read(report: ShardReport, offsets: NDArray[np.int64], size: int, *, decode: bool) -> None:
    def repeated(error: Exception) -> bool:
        report.problems.append(Problem("samples with a field twice", f"{report.path.name}: {error.args[0]}"))
        return True

    for start, stop in pairwise([*offsets.tolist(), size]):
        key = f"byte {start:,}"
        try:
            raw = read_sample(report.path, start, stop, repeated)
            key = raw["__key__"]
            report.keys.append(key)
            decode_sample(raw) if decode else check_sample(raw)
        except BadSample as bad:
            detail = f" ({bad.detail})" if bad.detail else ""
            report.problems.append(Problem(bad.cause, f"{report.path.name}: {key}{detail}"))
