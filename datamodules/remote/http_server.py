"""Files over HTTP(S), with the standard library alone: ranges, redirects, and proxies from the environment.

fsspec can read HTTP too, through aiohttp, but it lacks what this package needs: it returns no byte of a request before
the last byte has arrived, it sends no If-Range, and it follows every redirect. Its open connections also do not survive
a fork. `docs/data.md` has the measurements.
"""

import base64
import http.client
import re
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from ssmpretrain.base.errors import DataError
from ssmpretrain.datamodules.files.patience import Fault, Patience
from ssmpretrain.datamodules.remote.http_deadline import TimedHttp, TimedHttps, TimedResponse
from ssmpretrain.datamodules.remote.http_redirects import Redirects
from ssmpretrain.datamodules.remote.server import RemoteFile, Server, compare, shown_url

_PIECE = 1 << 20
_WINDOWS = 4  # a small file must arrive within this number of windows of `Patience`
_SAFE = "/%:@!$&'()*+,;=~"  # characters that are not escaped in a URL, beside letters, digits and "_.-"
_GONE = (404, 410)
_NO_SUCH_RANGE = 416
_PASSING = (408, 425, 429)  # status codes that may pass, and all codes from 500 on


class HttpServer(Server):
    """Web server.

    Args:
        options: `headers`, as {"Authorization": "Bearer ..."}, are sent with each request, but not to another host.
            `redirects` lists other hosts that redirects may lead to; see `Redirects`.
        patience: Time limits.

    Raises:
        DataError: If there are other options, or an option has a wrong type.
    """

    def __init__(self, options: Mapping[str, Any], patience: Patience) -> None:
        if unknown := sorted(set(options) - {"headers", "redirects"}):
            raise DataError(
                f"storage_options: http takes headers and redirects; got {', '.join(unknown)}. Remove them."
            )
        self.headers, allowed = options.get("headers", {}), options.get("redirects", [])
        if not isinstance(self.headers, Mapping) or not _are_texts([*self.headers, *self.headers.values()]):
            raise DataError("storage_options: headers has texts by name; got something else. Quote the values.")
        if not isinstance(allowed, list | tuple) or not _are_texts(allowed):
            raise DataError(f"storage_options: redirects is a list of hosts; got {allowed!r:.100}. Give [HOST].")
        self.patience = patience
        self._opener = urllib.request.build_opener(TimedHttp, TimedHttps, Redirects(allowed))

    def describe(self, url: str) -> RemoteFile:
        # HEAD is not used: some servers do not know it, and the signature in a URL may allow only GET.
        try:
            with self._open(url, {"Range": "bytes=0-0"}) as response:
                return _file(url, response)
        except Fault as fault:
            if isinstance(fault.__cause__, urllib.error.HTTPError) and fault.__cause__.code == _NO_SUCH_RANGE:
                return RemoteFile(url, 0)
            raise

    def read(self, file: RemoteFile, start: int) -> Iterator[bytes]:
        headers = {"Range": f"bytes={start}-"} if start else {}
        if start and file.version and not file.version.startswith("W/"):
            headers["If-Range"] = file.version
        with self._open(file.url, headers) as response:
            if response.headers.get_content_type() == "text/html":
                raise Fault("damaged shards", "the server sent a web page instead of the file", attempts=3)
            compare(file, _file(file.url, response))
            if start and not (response.status == 206 and _range(response)[0] == start):
                yield b""
            yield from self._pieces(response)

    def head(self, url: str, count: int) -> bytes:
        with self._open(url, {"Range": f"bytes=0-{count - 1}"}) as response:
            pieces, left, began = [], count, time.monotonic()
            for piece in self._pieces(response):
                pieces.append(piece[:left])
                left -= len(pieces[-1])
                if not left:
                    break
                if time.monotonic() - began > _WINDOWS * self.patience.window:
                    text = f"it had not ended after {count - left:,} bytes and {time.monotonic() - began:.0f} s"
                    raise Fault("stalled shards", text, attempts=1)
            return b"".join(pieces)

    def list(self, folder: str) -> None:
        return None

    def _open(self, url: str, headers: Mapping[str, str]) -> Any:
        request = _request(url, {"Accept-Encoding": "identity", "User-Agent": "ssmpretrain", **headers})
        for name, value in self.headers.items():
            request.add_unredirected_header(name, value)
        try:
            return self._opener.open(request, timeout=self.patience.timeout)
        except urllib.error.HTTPError as error:
            with error:
                raise _status_fault(error) from error
        except (OSError, http.client.HTTPException) as error:
            raise _connection_fault(error) from error
        except ValueError as error:  # an invalid URL or header, here or after a redirect
            raise Fault("refused shards", f"its address or a header is not valid ({error})") from error

    def _pieces(self, response: TimedResponse) -> Iterator[bytes]:
        began, received = time.monotonic(), 0
        while True:
            try:
                response.within(self.patience.timeout)
                piece = response.read1(_PIECE)
            except (OSError, http.client.HTTPException, ValueError) as error:
                raise _connection_fault(error) from error
            if not piece:
                break
            yield piece
            received += len(piece)
            if (elapsed := time.monotonic() - began) > self.patience.window:
                if received < self.patience.least_bytes:
                    raise Fault("stalled shards", f"only {received:,} bytes came in {elapsed:.0f} s")
                began, received = time.monotonic(), 0
        if response.length:  # bytes of Content-Length that did not arrive
            raise Fault("unreachable shards", f"the connection ended {response.length:,} bytes early")


def _are_texts(values: Sequence[Any]) -> bool:
    return all(isinstance(value, str) for value in values)


def _request(url: str, headers: Mapping[str, str]) -> urllib.request.Request:
    """Return the request for a URL, which may contain spaces, a user and a password."""
    parts = urlsplit(url)
    user, at, host = parts.netloc.rpartition("@")
    plain = urlunsplit((parts.scheme, host, quote(parts.path, safe=_SAFE), quote(parts.query, safe=_SAFE + "?"), ""))
    request = urllib.request.Request(plain, headers=dict(headers))
    if at:
        token = base64.b64encode(unquote(user).encode()).decode()
        request.add_unredirected_header("Authorization", f"Basic {token}")
    return request


def _file(url: str, response: http.client.HTTPResponse) -> RemoteFile:
    length = response.headers.get("Content-Length", "")
    size = int(length) if re.fullmatch(r"[0-9]{1,18}", length) else -1
    if response.status == 206:
        size = _range(response)[1]
    version = response.headers.get("ETag") or response.headers.get("Last-Modified") or ""
    return RemoteFile(url, size, version=version)


def _range(response: http.client.HTTPResponse) -> tuple[int, int]:
    """Return (first byte, size of the file) from `Content-Range`: `bytes 1000-1999/2000` -> (1000, 2000).

    A value that the header does not give is -1.
    """
    match = re.match(r"bytes ([0-9]{1,18})-[0-9]+/([0-9]{1,18}|\*)", response.headers.get("Content-Range", ""))
    if match is None:
        return -1, -1
    return int(match.group(1)), -1 if match.group(2) == "*" else int(match.group(2))


def _status_fault(error: urllib.error.HTTPError) -> Fault:
    said = f"the server says {error.code} {error.reason}"
    if error.msg.startswith(Redirects.inf_msg):
        return Fault("refused shards", "the server redirects in a circle")
    if error.code in _GONE:
        return Fault("missing shards", said)
    if error.code == _NO_SUCH_RANGE:
        return Fault("changed shards", f"{said}: the file is shorter than it was")
    if error.code >= 500 or error.code in _PASSING:
        return Fault("unreachable shards", said, wait=_retry_after(error.headers.get("Retry-After", "")))
    hint = ": check the address and storage_options" if error.code in (401, 403) else ""
    return Fault("refused shards", said + hint)


def _retry_after(text: str) -> float:
    """Return the seconds to wait from a `Retry-After` header: a number of seconds or a date; 0 if it is neither."""
    if text.strip().isdecimal():
        return float(text)
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, OverflowError, OSError):  # not a valid date
        return 0.0


def _connection_fault(error: Exception) -> Fault:
    reason = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(reason, ssl.SSLCertVerificationError):
        return Fault("refused shards", f"the server's certificate is not valid ({reason.verify_message})")
    if isinstance(reason, TimeoutError):
        return Fault("stalled shards", "the server does not answer (timed out)")
    return Fault("unreachable shards", f"the connection failed ({shown_url(str(reason)) or type(reason).__name__})")
