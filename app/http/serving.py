"""How uvicorn serves the API: what it does not limit by itself, and what the published line does not say.

uvicorn waits forever for the head of a request, and for a client that does not read its answer. `protocol` adds both
deadlines, as asyncio's protocol callbacks, and a limit on connections.
"""

from __future__ import annotations

import asyncio
import signal
from typing import TYPE_CHECKING, ClassVar, Final

import structlog
import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

if TYPE_CHECKING:
    from app.settings import Settings

#: Seconds open requests get when the process stops. Event streams end at once; this is for clients that read no more.
GRACE: Final = 5
#: Seconds a client may leave what was sent to it unread.
WRITE_TIMEOUT: Final = 30.0

log = structlog.get_logger(__name__)


class Deadlines(HttpToolsProtocol):
    """uvicorn's protocol for a connection, which closes it when its client is too slow."""

    header_timeout: ClassVar[float]
    max_connections: ClassVar[int]

    _head: asyncio.TimerHandle | None = None
    _unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as uvicorn's
        super().connection_made(transport)
        if len(self.connections) > self.max_connections:
            transport.abort()
            return
        self._expect_head(self.header_timeout)

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget_head()
        self.resume_writing()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        # Once per head, so that a byte now and then does not put it off.
        if self._head is None and (self.cycle is None or self.cycle.response_complete):
            self._expect_head(self.header_timeout)
        super().data_received(data)

    def on_headers_complete(self) -> None:
        self._forget_head()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        super().on_message_complete()
        if self.cycle.response_complete:
            # The rest of a body, after the answer to it: it has stopped uvicorn's own timer for idle connections.
            self._forget_head()
            self._expect_head(self.timeout_keep_alive)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread = self._unread or self.loop.call_later(WRITE_TIMEOUT, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    def _expect_head(self, seconds: float) -> None:
        self._head = self.loop.call_later(seconds, self.timeout_keep_alive_handler)

    def _forget_head(self) -> None:
        if self._head is not None:
            self._head.cancel()
            self._head = None


def protocol(settings: Settings) -> type[Deadlines]:
    """uvicorn's protocol with the limits of these settings, for its option `http`."""
    limits = {
        "header_timeout": settings.api_header_timeout,
        "max_connections": settings.api_limit_concurrency + settings.max_streams,
    }
    return type("Deadlines", (Deadlines,), limits)


def adopt(settings: Settings) -> None:
    """Give these limits to the uvicorn that runs `uvicorn app.main:app`, unless its options say otherwise.

    It hands its configuration to nobody, but while it runs it handles the signals to stop, and it reads the
    configuration again for each connection and when it stops. Another server is left as it is.
    """
    server = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
    if not isinstance(server, uvicorn.Server):
        return
    if server.config.timeout_graceful_shutdown is None:
        server.config.timeout_graceful_shutdown = GRACE
    if server.config.http_protocol_class is HttpToolsProtocol:
        server.config.http_protocol_class = protocol(settings)
