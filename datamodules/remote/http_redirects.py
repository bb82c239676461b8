"""Redirects of web servers: the places they may lead to, and the headers that go along."""

import logging
import urllib.request
from collections.abc import Sequence
from http.client import HTTPMessage
from typing import IO
from urllib.parse import SplitResult, urlsplit

from ssmpretrain.datamodules.files.patience import Fault

_log = logging.getLogger(__name__)
_PORTS = {"http": 80, "https": 443}
# Hosts whose files lie elsewhere, and where: they redirect to addresses that are signed.
_KNOWN = {
    "huggingface.co": ("*.huggingface.co", "*.hf.co"),
    "github.com": ("*.githubusercontent.com",),
    "*.amazonaws.com": ("*.amazonaws.com",),
    "storage.googleapis.com": ("*.googleapis.com", "*.googleusercontent.com"),
}
_reported: set[tuple[str, str]] = set()  # in this process


class Redirects(urllib.request.HTTPRedirectHandler):
    """Follow redirects on one host and port, and to other hosts where that is known or allowed.

    Headers with credentials go along on the same host and port, and from http to https on the same host; no further.

    Args:
        allowed: Hosts that redirects may lead to, as "cdn.example.org", "cdn.example.org:8080" or "*.example.org".
    """

    max_redirections = 10

    def __init__(self, allowed: Sequence[str]) -> None:
        self.allowed = tuple(allowed)

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> urllib.request.Request | None:
        """Return the next request, as urllib asks for it; raise `Fault` if the redirect is not followed."""
        before, after = urlsplit(req.full_url), urlsplit(newurl)
        request = super().redirect_request(req, fp, code, msg, headers, newurl)
        if _is_same_place(before, after):
            if request is not None:  # "Host" is made anew
                kept = {name: value for name, value in req.unredirected_hdrs.items() if name != "Host"}
                request.unredirected_hdrs.update(kept)
            return request
        source, target = _place(before), _place(after)
        if before.scheme == "https" and after.scheme != "https":
            raise Fault("refused shards", f"the server redirects from https to {after.scheme}://{target}")
        if not self._may_lead_to(before, after):
            raise Fault(
                "refused shards",
                f"the server redirects to another place, {target}: if it should, set storage_options "
                f'{{redirects: ["{target}"]}}',
            )
        if (source, target) not in _reported:
            _reported.add((source, target))
            _log.warning("%s redirects to %s, which the files are read from.", source, target)
        return request

    def _may_lead_to(self, before: SplitResult, after: SplitResult) -> bool:
        known = [place for host, places in _KNOWN.items() if _fits(before, host) for place in places]
        return any(_fits(after, place) for place in (*known, *self.allowed))


def _is_same_place(before: SplitResult, after: SplitResult) -> bool:
    """Return whether host and port are the same; also from http to https on one host, each on its usual port."""
    if before.hostname != after.hostname:
        return False
    upgraded = (before.scheme, _port(before), after.scheme, _port(after)) == ("http", 80, "https", 443)
    return upgraded or (before.scheme, _port(before)) == (after.scheme, _port(after))


def _port(parts: SplitResult) -> int | None:
    return parts.port or _PORTS.get(parts.scheme)


def _place(parts: SplitResult) -> str:
    """Return the host, and the port where it is not the usual one."""
    host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname or ""
    return host if _port(parts) == _PORTS.get(parts.scheme) else f"{host}:{_port(parts)}"


def _fits(parts: SplitResult, place: str) -> bool:
    """Return whether an address is at a place; "*." stands for all sub-domains."""
    found, place = _place(parts), place.lower()
    return found.endswith(place[1:]) if place.startswith("*.") else found == place
