"""Shards on local disks and servers: find, describe, read, pack and verify them.

It imports datamodules.tar, remote, labels, files, faults, base, and decoding to verify images.
"""

from typing import TYPE_CHECKING

from ssmpretrain.base.lazy_names import lazy_names

if TYPE_CHECKING:
    from ssmpretrain.datamodules.shards.damage import keep_usable
    from ssmpretrain.datamodules.shards.describe import load_index, load_indexes
    from ssmpretrain.datamodules.shards.folder_index import write_folder_indexes
    from ssmpretrain.datamodules.shards.location import Location, RemoteShard
    from ssmpretrain.datamodules.shards.pack import ShardWriter, pack_folder
    from ssmpretrain.datamodules.shards.paths import find_shards
    from ssmpretrain.datamodules.shards.shard import Shard
    from ssmpretrain.datamodules.shards.verify import verify_shard

__all__ = [
    "Location",
    "RemoteShard",
    "Shard",
    "ShardWriter",
    "find_shards",
    "keep_usable",
    "load_index",
    "load_indexes",
    "pack_folder",
    "verify_shard",
    "write_folder_indexes",
]
__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "Location": "location",
        "RemoteShard": "location",
        "Shard": "shard",
        "ShardWriter": "pack",
        "find_shards": "paths",
        "keep_usable": "damage",
        "load_index": "describe",
        "load_indexes": "describe",
        "pack_folder": "pack",
        "verify_shard": "verify",
        "write_folder_indexes": "folder_index",
    },
)
