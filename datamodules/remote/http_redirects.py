"""Redirects of web servers: the hosts they may lead to, and the headers that are sent there."""

import logging
import urllib.request
from collections.abc import Sequence
from http.client import HTTPMessage
from typing import IO
from urllib.parse import SplitResult, urlsplit

from ssmpretrain.datamodules.files.patience import Fault

_log = logging.getLogger(__name__)
_PORTS = {"http": 80, "https": 443}
# Hosts that redirect to signed addresses on other hosts, and these other hosts.
_KNOWN = {
    "huggingface.co": ("*.huggingface.co", "*.hf.co"),
    "github.com": ("*.githubusercontent.com",),
    "*.amazonaws.com": ("*.amazonaws.com",),
    "storage.googleapis.com": ("*.googleapis.com", "*.googleusercontent.com"),
}
_reported: set[tuple[str, str]] = set()  # in this process


class Redirects(urllib.request.HTTPRedirectHandler):
    """Handler of urllib that follows redirects within a host and port, and to other hosts that are known or allowed.

    Headers with credentials are sent only to the same host and port, also after a redirect from http to https.

    Args:
        allowed: Other hosts that redirects may lead to, as "cdn.example.org", "cdn.example.org:8080" or
            "*.example.org".
    """

    max_redirections = 10

    def __init__(self, allowed: Sequence[str]) -> None:
        self.allowed = tuple(allowed)

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> urllib.request.Request | None:
        """Return the request that follows a redirect; urllib calls this method.

        Raises:
            Fault: If the redirect is not allowed.
        """
        before, after = urlsplit(req.full_url), urlsplit(newurl)
        request = super().redirect_request(req, fp, code, msg, headers, newurl)
        if _is_same_place(before, after):
            if request is not None:  # urllib sets a new "Host"
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
    """Return whether host and port are equal, or one is http and the other https of one host, on the usual ports."""
    if before.hostname != after.hostname:
        return False
    upgraded = (before.scheme, _port(before), after.scheme, _port(after)) == ("http", 80, "https", 443)
    return upgraded or (before.scheme, _port(before)) == (after.scheme, _port(after))


def _port(parts: SplitResult) -> int | None:
    return parts.port or _PORTS.get(parts.scheme)


def _place(parts: SplitResult) -> str:
    """Return the host, with the port if it is not the usual one."""
    host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname or ""
    return host if _port(parts) == _PORTS.get(parts.scheme) else f"{host}:{_port(parts)}"


def _fits(parts: SplitResult, place: str) -> bool:
    """Return whether an address matches a host; "*." stands for all sub-domains."""
    found, place = _place(parts), place.lower()
    return found.endswith(place[1:]) if place.startswith("*.") else found == place
