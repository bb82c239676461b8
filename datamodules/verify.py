"""Look at every byte of a shard: is it whole, is its index right, can every sample be used?"""

from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from ssmpretrain.datamodules.bad_samples import BadSample
from ssmpretrain.datamodules.errors import DataError
from ssmpretrain.datamodules.index import checksum, index_path, load_index, walk
from ssmpretrain.datamodules.reading import read_sample
from ssmpretrain.datamodules.samples import check_sample, decode_sample


@dataclass(frozen=True)
class Problem:
    """Something wrong: what kind, and which member or file."""

    kind: str
    where: str


@dataclass
class ShardReport:
    """What was found in one shard; `problems` is empty if all is well."""

    path: Path
    samples: int = 0
    indexed: bool = False
    keys: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


def verify_shard(path: Path, *, decode: bool) -> ShardReport:
    """Check one shard.

    Args:
        path: The tar file.
        decode: Whether to decode each image; without, only structure, index, checksum, fields and labels are checked.
    """
    report = ShardReport(path, indexed=index_path(path).exists())
    try:
        contents, _ = walk(path)
        report.samples = contents.samples
        if not contents.images:
            report.problems.append(Problem("shards without an image", path.name))
        if report.indexed:
            _compare_index(report, contents.samples, contents.extensions)
        _read(report, decode=decode)
    except (DataError, OSError) as error:
        report.problems.append(Problem("damaged shards or indexes", str(error)))
    return report


def _compare_index(report: ShardReport, samples: int, extensions: dict[str, int]) -> None:
    index = load_index(report.path)
    if (index.samples, index.extensions) != (samples, extensions) or index.sha256 != checksum(report.path):
        report.problems.append(Problem("indexes that describe other contents", index_path(report.path).name))


def _read(report: ShardReport, *, decode: bool) -> None:
    def repeated(error: Exception) -> bool:
        report.problems.append(Problem("samples with a field twice", f"{report.path.name}: {error.args[0]}"))
        return True

    contents, offsets = walk(report.path)
    for start, stop in pairwise([*offsets.tolist(), contents.bytes]):
        key = f"byte {start:,}"
        try:
            raw = read_sample(report.path, start, stop, repeated)
            key = raw["__key__"]
            report.keys.append(key)
            decode_sample(raw) if decode else check_sample(raw)
        except BadSample as bad:
            detail = f" ({bad.detail})" if bad.detail else ""
            report.problems.append(Problem(bad.cause, f"{report.path.name}: {key}{detail}"))
