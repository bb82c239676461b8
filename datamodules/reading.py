"""Read samples of a shard as raw bytes, from any sample on, through webdataset's tar reader and nothing else of it."""

import os
import tarfile
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

# Read by webdataset when it is imported: its openers then start no shell and its decoders unpickle nothing. Neither is
# called here; this keeps the door closed for whatever else imports webdataset in this process.
os.environ.setdefault("WDS_SECURE", "1")

from webdataset.tariterators import base_plus_ext, group_by_keys, tar_file_iterator

from ssmpretrain.datamodules.errors import DataError

__all__ = ["RawSample", "base_plus_ext", "read_samples"]

RawSample = dict[
    str, Any
]  # "__key__", "__url__", and one entry of bytes per extension; "__error__" if it was unreadable


def read_samples(
    shard: Path, offset: int, count: int, on_repeated_field: Callable[[Exception], bool] = lambda error: True
) -> Iterator[RawSample]:
    """Yield `count` samples of a shard from a byte offset on, undecoded.

    Args:
        shard: The tar file.
        offset: Where the first sample's header lies (`load_offsets`).
        count: Number of samples to read.
        on_repeated_field: Told of a field that a sample has twice, of which the first is kept; returns true to go on.

    Raises:
        DataError: If the file ends early or its headers are damaged.
    """
    found = 0
    try:
        with shard.open("rb") as file:
            file.seek(offset)
            members = ({**member, "__url__": str(shard)} for member in tar_file_iterator(file))
            for sample in islice(group_by_keys(members, handler=on_repeated_field), count):
                found += 1
                yield sample
    except (tarfile.TarError, OSError) as error:
        raise DataError(
            f"{shard}: cannot be read past byte {offset:,} and {found:,} samples ({error}). "
            "Check it with `ssmpretrain shards verify`, and fetch it again."
        ) from error
    if found < count:
        raise DataError(
            f"{shard}: {count:,} samples expected from byte {offset:,}; got {found:,}. It changed while it was read, "
            "or its index is of another file: check it with `ssmpretrain shards verify`."
        )
