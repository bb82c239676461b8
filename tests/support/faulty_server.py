"""A web server on loopback that serves a folder and fails as it is told to."""

import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

PAGE = b"<!DOCTYPE html><html><title>Please log in</title>" + b" " * 3000


@dataclass
class FaultySite:
    """A running server.

    Args:
        url: Its address, without a slash at the end.
        faults: By file name, what to do wrong in the coming requests for it, the first first; None answers as it
            should. "always:" in front keeps a fault. Faults: a status ("503", "429:1" with Retry-After), "reset:1000"
            (after so many bytes), "cut:1000" (closed in good order), "truncate:1000" (likewise, and without a
            Content-Length), "drip" (a byte at a time), "hang", "page" (a web page with status 200), "length:+10" (a
            wrong Content-Length), "redirect:URL", "header" and "chunk" (a header, or the length of a chunk, a byte at a
            time), "chunked" (without a size, in chunks), "endless" (likewise, and goes on for ever).
        ranges: Whether parts of files are served.
        requests: How often each name was asked for, as "GET name"; "PROBE name" where it was for one byte.
        sent: Bytes sent of each name.
        headers: Those of each request.
    """

    url: str
    faults: dict[str, list[str | None]] = field(default_factory=dict)
    ranges: bool = True
    requests: Counter[str] = field(default_factory=Counter)
    sent: Counter[str] = field(default_factory=Counter)
    headers: list[Message] = field(default_factory=list)

    @property
    def authorizations(self) -> list[str | None]:
        """The header of this name of each request."""
        return [headers["Authorization"] for headers in self.headers]

    def next_fault(self, name: str) -> str:
        queue = self.faults.get(name) or self.faults.get("*") or [None]
        fault = queue[0] if (queue[0] or "").startswith("always:") or queue == [None] else queue.pop(0)
        return (fault or "").removeprefix("always:")


@contextmanager
def serve(folder: Path) -> Iterator[FaultySite]:
    """Serve a folder until the context ends."""
    site = FaultySite("")

    class Handler(_Handler):
        pass

    Handler.folder, Handler.site = folder, site
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    site.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield site
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    folder: Path
    site: FaultySite

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        name = self.path.partition("?")[0].rpartition("/")[2]
        method = "PROBE" if self.headers.get("Range") == "bytes=0-0" else "GET"
        self.site.requests[f"{method} {name}"] += 1
        self.site.headers.append(self.headers)
        kind, _, number = self.site.next_fault(name).partition(":")
        if kind.isdecimal():
            return self._status(int(kind), number)
        if kind == "redirect":
            return self._status(302, "", location=number)
        if kind == "page":
            return self._send(PAGE, "text/html")
        path = self.folder / name
        if not path.is_file():
            return self._status(404, "")
        content = path.read_bytes()
        etag = f'"{path.stat().st_mtime_ns:x}-{len(content):x}"'
        start, asked = 0, self.headers.get("Range")
        if asked and self.site.ranges and self.headers.get("If-Range", etag) == etag:
            first, _, last = asked.removeprefix("bytes=").partition("-")
            start = int(first)
            if start >= len(content):
                return self._status(416, "")
            stop = min(int(last) + 1, len(content)) if last else len(content)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(content)}")
        else:
            stop = len(content)
            self.send_response(200)
        if kind == "header":
            return self._drip(b"X-Slow: " + b"y" * 200)
        if kind in ("chunk", "chunked", "endless"):
            self.send_header("Transfer-Encoding", "chunked")
        elif kind != "truncate":
            self.send_header("Content-Length", str(stop - start + (int(number) if kind == "length" else 0)))
        self.send_header("ETag", etag)
        self.end_headers()
        self._body(content[start:stop], kind, number)

    def _drip(self, content: bytes) -> None:
        self.flush_headers()
        with suppress(OSError):
            for byte in content:
                self.wfile.write(bytes([byte]))
                time.sleep(0.02)

    def _chunks(self, content: bytes, name: str, *, endless: bool) -> None:
        with suppress(OSError):
            while True:
                for start in range(0, len(content), 1 << 16):
                    piece = content[start : start + (1 << 16)]
                    self.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece))
                    self.site.sent[name] += len(piece)
                if not endless:
                    self.wfile.write(b"0\r\n\r\n")
                    return

    def _body(self, content: bytes, kind: str, number: str) -> None:
        name = self.path.partition("?")[0].rpartition("/")[2]
        if kind == "chunk":
            return self._drip(b"0" * 200)
        if kind in ("chunked", "endless"):
            return self._chunks(content, name, endless=kind == "endless")
        if kind == "hang":
            time.sleep(3)
            return
        if kind == "drip":
            for byte in content:
                self.wfile.write(bytes([byte]))
                self.site.sent[name] += 1
                time.sleep(0.02)
        if kind in ("reset", "truncate", "cut"):
            content = content[: int(number)]
        self.site.sent[name] += len(content)  # before the client can see the last of them
        self.wfile.write(content)
        if kind == "reset":
            self.wfile.flush()
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()

    def _status(self, status: int, retry_after: str, location: str = "") -> None:
        self.send_response(status)
        if location:
            self.send_header("Location", location)
        if retry_after:
            self.send_header("Retry-After", retry_after)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _send(self, content: bytes, kind: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)
