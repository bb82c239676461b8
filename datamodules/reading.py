"""Read any sample of a shard as raw bytes, through webdataset's tar reader and nothing else of it."""

import os
import tarfile
from collections.abc import Callable
from io import BytesIO
from typing import Any

from ssmpretrain.datamodules.bad_samples import BadSample
from ssmpretrain.datamodules.errors import SourceError
from ssmpretrain.datamodules.secure_webdataset import group_by_keys, tar_file_iterator
from ssmpretrain.datamodules.sources import Shard, descriptor

RawSample = dict[str, Any]  # "__key__", "__url__", and one entry of bytes per extension


def read_sample(
    shard: Shard, start: int, stop: int, on_repeated_field: Callable[[Exception], bool] = lambda error: True
) -> RawSample:
    """Read one sample of a shard, undecoded, and nothing else of it.

    Args:
        shard: The tar file; one on a server is read from its local copy.
        start: Byte at which the sample's first header begins (`load_offsets`).
        stop: Byte at which the next sample's begins, or the size of the file.
        on_repeated_field: Told of a field that the sample has twice, of which the first is kept; returns true to go on.

    Raises:
        BadSample: If the file is gone, its server does not give it, it ends early, or holds no sample there.
    """
    try:
        content = os.pread(descriptor(shard), stop - start, start)
    except SourceError as error:
        raise unavailable(shard, error) from None
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


def unavailable(shard: Shard, error: SourceError) -> BadSample:
    """What a shard that cannot be had is to each of its samples."""
    return BadSample(error.cause, str(error).removeprefix(f"{shard}: ").rstrip("."))
