"""Fetch the shards that will be read next while the present ones are read."""

import logging
import os
import threading
from collections import deque
from collections.abc import Iterable

from ssmpretrain.base.errors import DataError
from ssmpretrain.datamodules.shards.location import Location, RemoteShard, local_path

_log = logging.getLogger(__name__)


def fetch_ahead(shards: Iterable[Location]) -> None:
    """Start to fetch shards in a thread of this process, in the given order, and return at once.

    A new call replaces the shards that the thread has not started yet. If a shard fails, the thread continues with the
    next; reading the shard later raises the error. Pass only a few shards, because they take space in the cache from
    the shards that are being read. Call the function in the process that reads, such as a worker of a loader, because
    a process that forks while the thread is fetching may pass on a held lock.

    Args:
        shards: The shards to fetch next; local shards are skipped.
    """
    global _thread
    wanted = [shard for shard in shards if isinstance(shard, RemoteShard)]
    if _thread is None or _thread.pid != os.getpid():  # a forked process has no threads of its parent
        if not wanted:
            return
        _thread = _Ahead()
    _thread.want(wanted)


class _Ahead:
    def __init__(self) -> None:
        self.pid = os.getpid()
        self._wanted: deque[RemoteShard] = deque()
        self._changed = threading.Condition()
        threading.Thread(target=self._work, name="fetch-ahead", daemon=True).start()

    def want(self, shards: list[RemoteShard]) -> None:
        with self._changed:
            self._wanted = deque(shards)
            self._changed.notify()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._wanted)
                shard = self._wanted.popleft()
            try:
                with local_path(shard):
                    pass
            except (DataError, OSError) as error:
                _log.info("fetching ahead: %s", error)


_thread: _Ahead | None = None
