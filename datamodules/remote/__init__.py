"""Files on servers: HTTP, object stores, downloads, and the cache of copies on the local disk.

It imports datamodules.files, tar, and base.
"""

from typing import TYPE_CHECKING

from ssmpretrain.base.lazy_names import lazy_names

if TYPE_CHECKING:
    from ssmpretrain.datamodules.remote.cache import ShardCache, make_cache
    from ssmpretrain.datamodules.remote.connect import connect
    from ssmpretrain.datamodules.remote.server import RemoteFile, Server, is_remote

__all__ = ["RemoteFile", "Server", "ShardCache", "connect", "is_remote", "make_cache"]
__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "RemoteFile": "server",
        "Server": "server",
        "ShardCache": "cache",
        "connect": "connect",
        "is_remote": "server",
        "make_cache": "cache",
    },
    former=(
        "ssmpretrain.datamodules.files.patience",
        "ssmpretrain.datamodules.remote.server",
    ),
)
