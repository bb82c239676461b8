"""Time limits of HTTP connections: a server that sends one byte per second is given up."""

import http.client
import io
import time
import urllib.request
from typing import Any


class TimedResponse(http.client.HTTPResponse):
    """HTTP response with a time limit for all its headers together, and for each read after a call of `within`.

    The timeout of a socket counts for each byte alone, so a header or the length of a chunk could take for ever.
    """

    def __init__(self, sock: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(sock, *args, **kwargs)
        self._timed = _Timed(self.fp.detach(), sock)
        self.fp = io.BufferedReader(self._timed)

    def within(self, seconds: float) -> None:
        """Set a new time limit: a read later than this number of seconds from now raises `TimeoutError`."""
        self._timed.deadline = time.monotonic() + seconds


class _Timed(io.RawIOBase):
    """The bytes that a socket receives until a deadline."""

    def __init__(self, raw: Any, sock: Any) -> None:
        self._raw, self._sock = raw, sock
        self._timeout = sock.gettimeout() or 60.0
        self.deadline = time.monotonic() + self._timeout

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("timed out")
        self._sock.settimeout(min(left, self._timeout))
        count: int | None = self._raw.readinto(buffer)
        return count

    def close(self) -> None:
        self._raw.close()
        super().close()


class _Connection(http.client.HTTPConnection):
    response_class = TimedResponse


class _SecureConnection(http.client.HTTPSConnection):
    response_class = TimedResponse


class TimedHttp(urllib.request.HTTPHandler):
    """Handler of urllib for http:// URLs, with time limits."""

    def http_open(self, req: urllib.request.Request) -> Any:
        """Open a URL; urllib calls this method."""
        return self.do_open(_Connection, req)


class TimedHttps(urllib.request.HTTPSHandler):
    """Handler of urllib for https:// URLs, with time limits."""

    def https_open(self, req: urllib.request.Request) -> Any:
        """Open a URL; urllib calls this method."""
        return self.do_open(_SecureConnection, req)
