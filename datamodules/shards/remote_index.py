"""Indexes of shards on a server, read with as few requests as possible."""

import logging
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from ssmpretrain.base.errors import DataError, PathMissing, SourceError
from ssmpretrain.datamodules.files.local_files import MOST_INDEX
from ssmpretrain.datamodules.remote.connect import ask
from ssmpretrain.datamodules.remote.server import RemoteFile, shown_url
from ssmpretrain.datamodules.shards.folder_index import COUNT_NAMES, NAME, can_have, parse_counts, parse_folder_index
from ssmpretrain.datamodules.shards.location import Location, RemoteShard, local_path
from ssmpretrain.datamodules.tar.index import ShardIndex, index_from, index_path, read_index_head

_log = logging.getLogger(__name__)
_HEAD = 4096  # the offsets of an index file begin within these first bytes
_NOT_THERE = ("missing shards", "refused shards")  # S3 answers "refused" for a missing file if listing is not allowed


def load_remote_indexes(shards: Sequence[RemoteShard]) -> dict[Location, ShardIndex | DataError]:
    """Return the index of each shard on a server, or the error for a damaged shard.

    The index comes from the index of the folder, from the index beside the shard, or from a walk over the fetched
    shard.

    Raises:
        FileNotFoundError: If shards are missing. The message counts and names them.
        SourceError: If a server cannot be reached.
    """
    found: dict[Location, ShardIndex | DataError] = {}
    folders: defaultdict[str, list[RemoteShard]] = defaultdict(list)
    for shard in shards:
        folders[shard.file.url.partition("?")[0].rpartition("/")[0]].append(shard)
    for url, members in folders.items():
        found.update(_Folder(url, members).describe())
    return found


def read_small(file: RemoteShard, most: int) -> bytes:
    """Read the first bytes of a file in a folder of shards; return nothing if there is no such file.

    Args:
        file: The file, as a shard.
        most: Largest number of bytes to read.

    Raises:
        SourceError: If the server cannot be reached.
    """
    url = file.file.url.partition("?")[0].rpartition("/")[0]
    return _Folder(url, [file])._read(file.name, count=most)


class _Folder:
    """The shards of one folder on a server."""

    def __init__(self, url: str, shards: Sequence[RemoteShard]) -> None:
        self.url = url
        self.shards = shards
        self.options = shards[0].cache.options
        self.counts: dict[str, int] = {}
        self.listing: dict[str, RemoteFile] | None = None
        self.said = False

    def describe(self) -> dict[Location, ShardIndex | DataError]:
        found: dict[Location, ShardIndex | DataError] = {}
        described = parse_folder_index(self._read(NAME), shown_url(f"{self.url}/{NAME}")) or {}
        for shard in self.shards:
            if (content := described.get(shard.name)) is not None:
                found[shard] = _identified(index_from(content, shard))
        rest = [shard for shard in self.shards if shard not in found]
        if rest:
            found.update(self._describe_each(rest))
        return found

    def _describe_each(self, shards: Sequence[RemoteShard]) -> dict[Location, ShardIndex | DataError]:
        if len(shards) > 1:
            self.listing = ask(self.url, self.options, lambda server: server.list(self.url))
        for name in COUNT_NAMES if self.listing is None else self.listing.keys() & set(COUNT_NAMES):
            self.counts.update(parse_counts(self._read(name)))
        with ThreadPoolExecutor(16) as pool:
            known = dict(zip(shards, pool.map(self._describe_one, shards), strict=True))
        self._check_present([shard for shard, index in known.items() if index is None])
        return {shard: index for shard, index in known.items() if index is not None}

    def _describe_one(self, shard: RemoteShard) -> ShardIndex | DataError | None:
        """Return the index of a shard, the error if it is damaged, or None if it is missing."""
        try:
            if self.listing is not None and shard.name not in self.listing:
                return None
            if (index := self._own_index(shard)) is not None:
                return _identified(index)
            url = shard.file.url
            listed = (self.listing or {}).get(shard.name) or ask(url, self.options, lambda server: server.describe(url))
        except SourceError as error:
            if error.cause == "missing shards":
                return None
            raise
        shard = replace(shard, file=replace(listed, url=url))
        samples = self.counts.get(shard.name, 0)
        if can_have(samples, shard.file.bytes):
            return ShardIndex(replace(shard, samples=samples), samples, shard.file.bytes, {}, indexed=True)
        return self._walk(shard)

    def _walk(self, shard: RemoteShard) -> ShardIndex | DataError:
        """Fetch a shard without any index, unless it was fetched before, and return the index from a walk over it."""
        try:
            while (index := shard.cache.known(shard.file)) is None:
                self._say_once("%s, and perhaps more, has no index and is fetched to be counted.", shard)
                with local_path(shard):
                    pass
        except SourceError as error:
            if error.cause == "damaged shards":
                return error
            raise
        return replace(index, path=replace(shard, samples=index.samples))

    def _say_once(self, message: str, shard: RemoteShard) -> None:
        if not self.said:
            self.said = True
            _log.warning(message, shard)

    def _own_index(self, shard: RemoteShard) -> ShardIndex | None:
        name = index_path(Path(shard.name)).name
        if self.listing is not None and name not in self.listing:
            return None
        head = self._read(name, query=shard.file.url.partition("?")[2], count=_HEAD)
        return read_index_head(head, shard)

    def _read(self, name: str, query: str = "", count: int = MOST_INDEX) -> bytes:
        """Read the first bytes of a file of the folder; return nothing if there is no such file."""
        query = query or self.shards[0].file.url.partition("?")[2]
        url = f"{self.url}/{name}" + (f"?{query}" if query else "")
        try:
            return ask(url, self.options, lambda server: server.head(url, count))
        except SourceError as error:
            if error.cause in _NOT_THERE:
                return b""
            raise

    def _check_present(self, missing: Sequence[RemoteShard]) -> None:
        if not missing:
            return
        names = ", ".join(shard.name for shard in missing[:5])
        more = f" and {len(missing) - 5:,} more" if len(missing) > 5 else ""
        raise PathMissing(
            f"{shown_url(self.url)}: {len(missing):,} of the {len(self.shards):,} shards are missing: {names}{more}. "
            "Correct the address, upload them, or name the shards that are there."
        )


def _identified(index: ShardIndex) -> ShardIndex:
    """Return the index with its shard, to which the expected size, checksum and number of samples are added."""
    assert isinstance(index.path, RemoteShard)
    file = RemoteFile(index.path.file.url, index.bytes, index.sha256)
    return replace(index, path=replace(index.path, file=file, samples=index.samples))
