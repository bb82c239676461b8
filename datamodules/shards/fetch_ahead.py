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
    """Begin to fetch shards, in this order, in a thread of this process; return at once.

    What was asked for before and has not begun is forgotten. A shard that fails is passed over: whoever reads it is
    told. Ask for a few at a time: those ahead take room in the cache from those that are read. Ask in the process that
    reads, such as a loader's worker: a process that forks while a thread is fetching may hand a locked lock on.

    Args:
        shards: The next ones; local ones are passed over.
    """
    global _thread
    wanted = [shard for shard in shards if isinstance(shard, RemoteShard)]
    if _thread is None or _thread.pid != os.getpid():  # threads do not come along into a fork
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
