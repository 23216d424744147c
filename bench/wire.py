"""Clients that cost next to nothing, so that they are not what is measured."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator


class Reader(asyncio.Protocol):
    """One connection on which a request follows each answer, until `stop`."""

    def __init__(self, paths: Iterator[str]) -> None:
        self.seconds: list[float] = []
        self.failed: list[bytes] = []
        self.ended = asyncio.get_running_loop().create_future()
        self._paths = paths
        self._received = b""
        self._sent = 0.0
        self._stopping = False
        self._transport: asyncio.Transport | None = None

    def stop(self) -> None:
        """Ask no more."""
        self._stopping = True

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._ask()

    def data_received(self, data: bytes) -> None:
        """Take an answer, and ask again."""
        self._received += data
        head, _, body = self._received.partition(b"\r\n\r\n")
        length = head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]
        if not length or len(body) < int(length):
            return
        self.seconds.append(time.monotonic() - self._sent)
        if not head.startswith(b"HTTP/1.1 200"):
            self.failed.append(self._received)
        self._received = b""
        self._ask()

    def connection_lost(self, exc: Exception | None) -> None:
        """It ends when it was told to, or the server has gone."""
        if not self.ended.done():
            if self._stopping:
                self.ended.set_result(None)
            else:
                self.ended.set_exception(exc or ConnectionError("the server hung up"))

    def _ask(self) -> None:
        assert self._transport
        if self._stopping:
            self._transport.close()
            return
        self._sent = time.monotonic()
        self._transport.write(f"GET {next(self._paths)} HTTP/1.1\r\nhost: bench\r\n\r\n".encode())


class Watcher(asyncio.Protocol):
    """One event stream; notes when an event of a type came."""

    def __init__(self, path: str, event: str) -> None:
        self.came = asyncio.get_running_loop().create_future()
        self.open = asyncio.get_running_loop().create_future()
        self._path = path
        self._event = f"event: {event}".encode()
        self._received = b""
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Ask for the stream."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.write(f"GET {self._path} HTTP/1.1\r\nhost: bench\r\naccept: text/event-stream\r\n\r\n".encode())

    def data_received(self, data: bytes) -> None:
        """Look for the head of the answer, then for the event."""
        self._received += data
        if not self.open.done() and b"\r\n\r\n" in self._received:
            if b"text/event-stream" in self._received:
                self.open.set_result(None)
            else:
                self.open.set_exception(RuntimeError(f"no event stream: {self._received[:200]!r}"))
        if not self.came.done() and self._event in self._received:
            self.came.set_result(time.time())

    def connection_lost(self, exc: Exception | None) -> None:
        """A stream that ends before its event is an error, for whoever waits for it."""
        for awaited in (self.open, self.came):
            if not awaited.done():
                awaited.set_exception(exc or ConnectionError("the stream ended"))
                awaited.exception()  # seen; it need not be told again if nobody waits any more

    def close(self) -> None:
        """Hang up."""
        if self._transport:
            self._transport.close()
