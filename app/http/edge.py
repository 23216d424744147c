"""Who may call, and how much at once: requests for another host's name, and those another site makes a browser send.

The API has no cookies and, on a desk, no login: whoever reaches it may approve. A browser reaches what its user
does, so a foreign page must not be able to use it: neither by sending forms here, nor by giving its own name our
address (DNS rebinding).
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

from app.domain.hosts import is_loopback
from app.http.problems import Problem, ProblemResponse

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from app.settings import Settings

#: Methods that change nothing.
_SAFE: Final = frozenset({"GET", "HEAD", "OPTIONS"})
_PROBES: Final = ("/healthz", "/readyz")
_UNCOUNTED: Final = ("/events", *_PROBES)
#: What a browser says of a request that no other site had it send.
_OWN_SITE: Final = frozenset({b"same-origin", b"none"})

#: On every answer: it is data, never a page, and tells nobody where its reader came from.
SECURITY_HEADERS: Final = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
)
_CSP: Final = b"content-security-policy"
#: Unless the answer is a page that brings its own.
NO_PAGE: Final = (_CSP, b"default-src 'none'; frame-ancestors 'none'")


def secure(message: Message) -> None:
    """Add the security headers to the start of an answer."""
    headers = message["headers"] = [*message.get("headers", ()), *SECURITY_HEADERS]
    if not any(name == _CSP for name, _ in headers):
        headers.append(NO_PAGE)


class Edge:
    """Refuses foreign hosts (421), cross-site changes (403) and what is too much at once (503)."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self.app = app
        self.hosts = Hosts(settings.allowed_hosts, listens_locally=is_loopback(settings.api_host))
        self._most = settings.api_limit_concurrency
        self._running = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        refused = self._refused(scope)
        # Timelines that are watched have a limit of their own, and probes must be answered.
        counts = not scope["path"].endswith(_UNCOUNTED)
        if refused is None and counts and self._running >= self._most:
            refused = _refusal(503, "Too much is asked at once", f"{self._most} requests at most", "Overloaded")
        self._running += counts
        try:
            await (refused or self.app)(scope, receive, send)
        finally:
            self._running -= counts

    def _refused(self, scope: Scope) -> ProblemResponse | None:
        host = site = origin = b""
        for name, value in scope["headers"]:
            if name == b"host":
                host = value
            elif name == b"sec-fetch-site":
                site = value
            elif name == b"origin":
                origin = value
        if host and not self.hosts.allow(host, scope.get("server")):
            return _refusal(421, "This is not a name of this API", "TRELLIS_ALLOWED_HOSTS lists them", "HostNotAllowed")
        if scope["method"] not in _SAFE and not is_own_site(site, origin, host):
            return _refusal(403, "Another site may not change orders", "a browser sent it for that site", "CrossSite")
        return None


def is_probe(scope: Scope) -> bool:
    """Whether it is asked every few seconds by whoever watches the process."""
    path: str = scope["path"]
    return path.endswith(_PROBES) and path.removeprefix(scope.get("root_path", "")) in _PROBES


def _refusal(status: int, title: str, detail: str, code: str) -> ProblemResponse:
    return ProblemResponse(Problem(title=title, status=status, detail=detail, code=code))


def is_own_site(site: bytes, origin: bytes, host: bytes) -> bool:
    """Whether a request comes from a page of this API, or from no page at all, by `Sec-Fetch-Site`, which current
    browsers send to HTTPS and loopback, else by `Origin` and `Host`. Programs such as curl send none of the two."""
    if site:
        return site in _OWN_SITE
    if not origin:
        return True
    return urlsplit(origin).netloc.lower() == host.lower() != b""


class Hosts:
    """Whether a `Host` is one of this API's names. Addresses always are: rebinding needs a name.

    Args:
        allowed: names, `*.example.com` for those below one, `*` for all. None: every name, but where only this
            machine can have called, its own.
        listens_locally: the address that the settings say is a loopback one.
    """

    def __init__(self, allowed: Sequence[str] | None, *, listens_locally: bool) -> None:
        self._all = "*" in allowed if allowed is not None else not listens_locally
        self._chosen = allowed is not None
        self._names = frozenset(allowed or ())
        self._suffixes = tuple(name[1:] for name in allowed or () if name.startswith("*."))
        self._known: dict[tuple[bytes, str], bool] = {}

    def allow(self, host: bytes, server: tuple[str, int | None] | None) -> bool:
        """Whether a request with this `Host`, which arrived at the address `server`, is for this API."""
        if self._all:
            return True
        key = (host, server[0] if server else "")
        known = self._known.get(key)
        if known is None:
            known = self._decide(*key)
            if len(self._known) < 100:  # strangers choose what is asked
                self._known[key] = known
        return known

    def _decide(self, host: bytes, address: str) -> bool:
        name = _name(host)
        if _is_address(name):
            return True
        if self._chosen:
            return name in self._names or name.endswith(self._suffixes)
        return name == "localhost" or name.endswith(".localhost") or not is_loopback(address)


def _name(host: bytes) -> str:
    """A `Host` without its port and brackets, in lower case."""
    text = host.decode("latin-1").lower()
    if text.startswith("["):
        return text[1:].partition("]")[0]
    return text.partition(":")[0].removesuffix(".")


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
