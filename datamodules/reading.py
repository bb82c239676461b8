"""Read any sample of a shard as raw bytes, through webdataset's tar reader and nothing else of it."""

import os
import tarfile
from collections.abc import Callable
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

# Read by webdataset when it is imported: its openers then start no shell and its decoders unpickle nothing. Neither is
# called here; this keeps the door closed for whatever else imports webdataset in this process.
os.environ.setdefault("WDS_SECURE", "1")

from webdataset.tariterators import base_plus_ext, group_by_keys, tar_file_iterator

from ssmpretrain.datamodules.bad_samples import BadSample

__all__ = ["RawSample", "base_plus_ext", "read_sample"]

RawSample = dict[str, Any]  # "__key__", "__url__", and one entry of bytes per extension


def read_sample(
    shard: Path, start: int, stop: int, on_repeated_field: Callable[[Exception], bool] = lambda error: True
) -> RawSample:
    """Read one sample of a shard, undecoded, and nothing else of it.

    Args:
        shard: The tar file.
        start: Byte at which the sample's first header begins (`load_offsets`).
        stop: Byte at which the next sample's begins, or the size of the file.
        on_repeated_field: Told of a field that the sample has twice, of which the first is kept; returns true to go on.

    Raises:
        BadSample: If the file is gone, ends early, or holds no sample there.
    """
    try:
        content = os.pread(_opened(shard).fileno(), stop - start, start)
    except OSError as error:
        raise BadSample("unreadable shards", error.strerror or str(error)) from None
    short = f"it ends at byte {start + len(content):,}" if len(content) < stop - start else ""
    try:
        members = ({**member, "__url__": str(shard)} for member in tar_file_iterator(BytesIO(content)))
        sample: RawSample | None = next(group_by_keys(members, handler=on_repeated_field), None)
    except tarfile.TarError as error:
        raise BadSample(
            "truncated shards" if short else "damaged shards", short or f"{error}; byte {start:,}"
        ) from None
    if sample is None:
        raise BadSample("truncated shards" if short else "damaged shards", short or f"no sample at byte {start:,}")
    return sample


@lru_cache(maxsize=64)
def _opened(shard: Path) -> BinaryIO:
    """A shard that stays open, and is read to its end even if it is removed meanwhile; closed when it is forgotten."""
    return shard.open("rb", buffering=0)
