"""One shard of a run: its planned content, the check that the file has not changed, and reading of its samples."""

import logging
import os
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

from ssmpretrain.base.errors import DataError, SourceError
from ssmpretrain.datamodules.faults.bad_samples import BadSample
from ssmpretrain.datamodules.files.patience import patiently
from ssmpretrain.datamodules.shards.location import Location, RemoteShard
from ssmpretrain.datamodules.shards.open_tar import OpenTar, close_local, open_tar, renew
from ssmpretrain.datamodules.tar.index import Layout, ShardIndex, checksum, index_path, read_index
from ssmpretrain.datamodules.tar.sample import RawSample, Span, read_sample
from ssmpretrain.datamodules.tar.walk import walk_tar

_log = logging.getLogger(__name__)
_OF_BYTES = ("damaged samples", "truncated shards", "unreadable shards")  # causes that a damaged copy may have


class Shard:
    """A shard in the plan of a run. Any process can read any of its samples.

    Args:
        index: Index of the shard at the time when it was found.
    """

    __slots__ = ("_is_longer", "index")

    def __init__(self, index: ShardIndex) -> None:
        self.index = index
        self._is_longer = False  # whether a warning about more samples than planned was logged

    def __str__(self) -> str:
        return str(self.index.path)

    @property
    def location(self) -> Location:
        """Place of the tar: a local path, or a shard on a server."""
        place: Location = self.index.path
        return place

    def read_sample(self, number: int) -> RawSample:
        """Return the undecoded fields of one sample.

        If the local copy of a shard on a server was damaged on the disk, the shard is fetched again.

        Args:
            number: Number of the sample in the shard, from 0.

        Raises:
            BadSample: If the sample is damaged, or the shard has changed, is missing or cannot be fetched.
        """
        try:
            return self._patiently(lambda: self._read(number))
        except BadSample as bad:
            if bad.cause not in _OF_BYTES or not self._renew():
                raise
        return self._patiently(lambda: self._read(number))

    def read_span(self, span: Span) -> RawSample:
        """Return the undecoded fields of the sample at a given place; the planned content is not checked.

        Raises:
            BadSample: If the sample is damaged, or the shard is missing or cannot be fetched.
        """
        return self._patiently(lambda: read_sample(open_tar(self.location).fileno(), span, str(self)))

    def _read(self, number: int) -> RawSample:
        tar = self._open_unchanged()
        raw = read_sample(tar.fileno(), self._span(tar.layout, number), str(self))
        if number in tar.layout.repeated:
            raise BadSample("keys used twice", "an earlier sample of the shard has it", raw["__key__"])
        return raw

    def _open_unchanged(self) -> OpenTar:
        """Open the tar; raise if it is not the file with which the run was planned.

        A file that was only copied counts as the same file, because its checksum is that of the index. Without an
        index, any whole tar of the same size counts as the same file, with a warning.
        """
        index = self.index
        tar = open_tar(self.location, index.bytes)
        # For a shard on a server no time is known; its local copy does not change.
        if index.mtime_ns in (0, os.fstat(tar.fileno()).st_mtime_ns):
            return tar
        close_local()  # this process may still have a file of an earlier run open
        tar = open_tar(self.location, index.bytes)
        found = os.fstat(tar.fileno())
        if found.st_mtime_ns != index.mtime_ns and not _is_same(
            self.location, index.bytes, found.st_size, found.st_mtime_ns
        ):
            text = f"it is not the file of {index.bytes:,} bytes that it was when the run began"
            raise BadSample("changed shards", text)
        return tar

    def _span(self, layout: Layout, number: int) -> Span:
        """Return the place of a sample.

        If the number of samples comes from the file of another tool, the shard may hold more samples than planned; the
        surplus is not read.
        """
        offsets, planned, end = layout.offsets, self.index.samples, self.index.bytes
        if number >= len(offsets) or (self.index.extensions and planned != len(offsets)):
            raise BadSample("changed shards", f"it has {len(offsets):,} samples, other than its index said")
        if len(offsets) > planned and not self._is_longer:
            self._is_longer = True
            _log.warning(
                "%s: has %d samples, and _info.json or sizes.json say %d: the others are not read. Write an index with "
                "`ssmpretrain shards index`, or correct the numbers.",
                self,
                len(offsets),
                planned,
            )
        last = number + 1 == len(offsets)
        stop = end if last else int(offsets[number + 1])
        return Span(int(offsets[number]), stop, last, None if layout.crc32 is None else int(layout.crc32[number]))

    def _renew(self) -> bool:
        """Drop the local copy of a shard on a server if it is damaged; return whether a new copy will be read."""
        location = self.location
        if not isinstance(location, RemoteShard):
            return False
        try:
            return renew(location)
        except SourceError as error:
            raise self._unavailable(error) from None

    def _patiently(self, action: Callable[[], RawSample]) -> RawSample:
        """Read from the tar; if an error may pass, open the tar again and repeat.

        Raises:
            BadSample: If the tar is missing or cannot be read, or the server does not deliver it.
        """
        try:
            return patiently(self.location, action, between=close_local)
        except SourceError as error:
            raise self._unavailable(error) from None

    def _unavailable(self, error: SourceError) -> BadSample:
        """Return the error of each sample of a shard that cannot be read."""
        return BadSample(error.cause, str(error).removeprefix(f"{self}: ").rstrip("."))


@lru_cache(maxsize=64)
def _is_same(path: Path, size: int, size_now: int, mtime_ns: int) -> bool:
    # The time is part of the cache's key, so that a rewritten file is checked again.
    if size != size_now:
        return False
    with suppress(DataError, FileNotFoundError):
        expected = read_index(index_path(path))[0].sha256
        return bool(checksum(path) == expected)
    whole = not walk_tar(path).damage
    if whole:
        _log.warning("%s: was written while the run reads it; it has no index to compare it with.", path)
    return whole
