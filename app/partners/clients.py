"""The HTTP clients of those the product works with: the payment provider and the carrier.

What every call to them has in common: credentials, TLS, limits. A partner is somebody else's program: its answers are
capped in size and in time, and redirects are not followed, so that it can neither fill the memory nor send the
credentials elsewhere. Nothing of the process's environment (proxies, `.netrc`) has a say in where a call goes.
"""

from __future__ import annotations

import asyncio
import re
import ssl
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import httpx
import structlog

from app.errors import SettingsError
from app.settings import VISIBLE, PartnerSettings
from app.telemetry import traces
from app.telemetry.metrics import SANDBOX_IN_USE

if TYPE_CHECKING:
    from pathlib import Path

    from starlette.applications import Starlette

    from app.settings import Settings

#: Bytes an answer may have; a receipt has some hundred.
MAX_ANSWER: Final = 1024 * 1024

#: Seconds a whole call may take beyond the limit of each of its phases: what times out by itself says in which.
_MARGIN: Final = 0.5

log = structlog.get_logger(__name__)


class TokenUnreadable(httpx.RequestError):
    """The file with a partner's token cannot be read, or holds none. Nothing was sent."""


class AnswerTooLarge(httpx.RequestError):
    """A partner's answer is larger than any it should give, or compressed, so that it may be."""


class AnswerTooSlow(httpx.TimeoutException):
    """A partner's answer came in pieces, and the last one too late."""


@dataclass(frozen=True)
class Partners:
    """One client for each partner; paths are relative to its URL."""

    payment: httpx.AsyncClient
    carrier: httpx.AsyncClient


def check(settings: Settings) -> None:
    """Make sure that the partners can be called as the settings say. Nothing is sent.

    Raises:
        SettingsError: a partner was not chosen, or a file of its credentials cannot be used; the message names the
            variable.
    """
    settings.require_partners()
    for partner in (settings.payment, settings.carrier):
        if partner.url is not None:
            _verify(partner)
            _auth(partner)


@asynccontextmanager
async def open_partners(settings: Settings) -> AsyncIterator[Partners]:
    """The clients of both partners. Where one has no URL, it is the sandbox in this process, if that is allowed.

    Raises:
        SettingsError: see `check`.
    """
    check(settings)
    async with AsyncExitStack() as stack:
        sandbox = None
        if not (settings.payment_url and settings.carrier_url):
            # Only the sandbox needs it, and a set-up with real partners should not load it.
            from app.sandbox.app import open_sandbox

            sandbox = await stack.enter_async_context(open_sandbox(settings))
            # A command that has set up no logging has its report on standard output.
            if structlog.is_configured():
                stands_in = [each.name for each in (settings.payment, settings.carrier) if each.url is None]
                log.warning("the sandbox stands in: it moves no money and sends no parcel", partners=stands_in)
        payment = _client(settings.payment, sandbox, "/payments", settings.partner_timeout)
        carrier = _client(settings.carrier, sandbox, "/carrier", settings.partner_timeout)
        yield Partners(await stack.enter_async_context(payment), await stack.enter_async_context(carrier))


def _client(partner: PartnerSettings, sandbox: Starlette | None, path: str, timeout: float) -> httpx.AsyncClient:
    SANDBOX_IN_USE.labels(partner.name).set(partner.url is None)
    if partner.url is None and sandbox is not None:
        # Each its own: a shared one would be traced twice.
        transport: httpx.AsyncBaseTransport = httpx.ASGITransport(sandbox, raise_app_exceptions=False)
        client = httpx.AsyncClient(base_url=f"http://sandbox{path}", transport=transport, timeout=timeout)
    else:
        client = httpx.AsyncClient(
            base_url=partner.url or "",
            transport=Bounded(Renewed(partner), timeout + _MARGIN),
            timeout=timeout,
            auth=_auth(partner),
            headers={"Accept-Encoding": "identity"},
            follow_redirects=False,
            trust_env=False,
        )
    traces.instrument_client(client)
    return client


# --- limits


class Bounded(httpx.AsyncBaseTransport):
    """Reads each answer at once, up to a size and within a time that is for all of the call.

    The time limits of httpx are for each piece: a partner that sends a byte now and then would keep an attempt for
    ever.

    Args:
        inner: what sends.
        seconds: from the first byte sent to the last one received.
        limit: bytes of a body.
    """

    def __init__(self, inner: httpx.AsyncBaseTransport, seconds: float, limit: int = MAX_ANSWER) -> None:
        self._inner = inner
        self._seconds = seconds
        self._limit = limit

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send, and answer with a response whose body is here.

        Raises:
            AnswerTooLarge: it is not read to its end.
            AnswerTooSlow: it did not end in time.
        """
        try:
            async with asyncio.timeout(self._seconds):
                response = await self._inner.handle_async_request(request)
                try:
                    body = await self._read(response)
                finally:
                    await response.aclose()
        except TimeoutError:
            raise AnswerTooSlow(f"not here after {self._seconds:g} s", request=request) from None
        return httpx.Response(
            response.status_code,
            headers=response.headers,
            stream=httpx.ByteStream(body),
            extensions=response.extensions,
        )

    async def _read(self, response: httpx.Response) -> bytes:
        # A small compressed answer may be a large one; we asked for none.
        if response.headers.get("content-encoding", "identity").lower() not in {"", "identity"}:
            raise AnswerTooLarge("it is compressed")
        body = bytearray()
        async for piece in response.aiter_raw():
            body += piece
            if len(body) > self._limit:
                raise AnswerTooLarge(f"more than {self._limit} bytes")
        return bytes(body)

    async def aclose(self) -> None:
        """Close the connections."""
        await self._inner.aclose()


# --- credentials


class Bearer(httpx.Auth):
    """`Authorization: Bearer ...`, with a token that is asked for anew for each call: it may have been replaced."""

    def __init__(self, token: Callable[[], str]) -> None:
        self._token = token

    def auth_flow(self, request: httpx.Request) -> Iterator[httpx.Request]:  # type: ignore[override]
        """Add the header."""
        request.headers["Authorization"] = f"Bearer {self._token()}"
        yield request


def _auth(partner: PartnerSettings) -> httpx.Auth | None:
    if partner.token is not None:
        token = partner.token.get_secret_value()
        return Bearer(lambda: token)
    if partner.token_file is None:
        return None
    file = partner.token_file

    def read() -> str:
        try:
            token = file.read_text(encoding="ascii").strip()
        except (OSError, ValueError) as error:
            raise TokenUnreadable(type(error).__name__) from None
        if not re.fullmatch(VISIBLE, token):
            raise TokenUnreadable("empty, or not a token")
        return token

    try:
        read()
    except TokenUnreadable as error:
        raise SettingsError(f"{partner.variable('token_file')}: {file} holds no token ({error})") from None
    return Bearer(read)


class Renewed(httpx.AsyncBaseTransport):
    """Connections to a partner with the certificates that its files hold now: they are replaced while we run.

    Connections that are open go on with what they began with; each is closed after a few idle seconds.
    """

    def __init__(self, partner: PartnerSettings) -> None:
        self._partner = partner
        self._seen = self._state()
        self._context = _verify(partner)
        self._inner = httpx.AsyncHTTPTransport(verify=self._context, trust_env=False)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send it; a connection that is opened for it has the files of this moment."""
        state = self._state()
        if state != self._seen:
            self._seen = state
            self._renew()
        return await self._inner.handle_async_request(request)

    def _renew(self) -> None:
        try:
            # Tried on another: half of a pair, read in the moment of its replacement, would spoil the one in use.
            _verify(self._partner)
            _load(self._partner, self._context)
        except SettingsError as error:
            log.warning("certificates that were replaced cannot be used; the old ones stay", reason=str(error))
        else:
            log.info("certificates were replaced", partner=self._partner.name)

    def _state(self) -> list[tuple[int, int] | None]:
        return [
            _identity(file) for file in (self._partner.tls_ca, self._partner.tls_cert, self._partner.tls_key) if file
        ]

    async def aclose(self) -> None:
        """Close the connections."""
        await self._inner.aclose()


def _identity(file: Path) -> tuple[int, int] | None:
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns


def _verify(partner: PartnerSettings) -> ssl.SSLContext:
    ca = partner.tls_ca
    try:
        context = ssl.create_default_context(cafile=ca) if ca else httpx.create_ssl_context(trust_env=False)
    except (OSError, ssl.SSLError) as error:
        raise SettingsError(f"{partner.variable('tls_ca')}: {ca} holds no certificate ({_reason(error)})") from None
    _load(partner, context)
    return context


def _load(partner: PartnerSettings, context: ssl.SSLContext) -> None:
    """Read the files of a partner into a context; a CA beside those that it has."""
    ca, cert, key = partner.tls_ca, partner.tls_cert, partner.tls_key
    if ca is not None:
        context.load_verify_locations(ca)
    if cert is not None and key is not None:
        try:
            # Without a password, OpenSSL would ask for that of an encrypted key on the terminal.
            context.load_cert_chain(cert, key, password="")
        except (OSError, ssl.SSLError) as error:
            names = f"{partner.variable('tls_cert')} and {partner.variable('tls_key')}"
            raise SettingsError(f"{names}: {cert} and {key} are no certificate and key ({_reason(error)})") from None


def _reason(error: OSError) -> str:
    return error.reason if isinstance(error, ssl.SSLError) and error.reason else error.strerror or type(error).__name__
