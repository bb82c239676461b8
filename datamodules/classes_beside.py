"""The list of classes beside shards, on a local disk or on a server."""

import logging
from pathlib import Path

from ssmpretrain.datamodules.classes import CLASSES_FILE, Classes, parse_classes, read_classes
from ssmpretrain.datamodules.errors import DataError, SourceError
from ssmpretrain.datamodules.remote_index import read_beside
from ssmpretrain.datamodules.sources import Shard

_log = logging.getLogger(__name__)
_MOST_BYTES = 16 << 20


def folder_of(shard: Shard) -> str:
    """The folder that a shard lies in; a URL without its query."""
    return str(shard.parent) if isinstance(shard, Path) else str(shard).rpartition("/")[0]


def classes_beside(shard: Shard) -> Classes:
    """What `classes.json` beside a shard says; no names where it is missing, or a file of something else.

    Raises:
        SourceError: If a server cannot be reached.
    """
    folder = folder_of(shard)
    unknown = Classes((), folder)
    try:
        if isinstance(shard, Path):
            path = shard.parent / CLASSES_FILE
            return read_classes(path) if path.is_file() else unknown
        content = read_beside(shard, CLASSES_FILE, _MOST_BYTES)
        return parse_classes(content, f"{folder}/{CLASSES_FILE}") if content else unknown
    except SourceError:
        raise
    except DataError as error:
        _log.warning("%s It is passed over, and labels are read as numbers.", error)
        return unknown
