"""A TCP proxy that can be told to misbehave: slow, cut, half-open, or swallowing the reply to a commit."""

from __future__ import annotations

import asyncio
import re
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from app.local.process import free_port

#: The "version" of a first message that only asks for encryption or a cancellation: another first message follows.
_ASKS_FOR_SSL = 80877103


#: A statement that writes, which outside a transaction is a commit as well.
_WRITES = re.compile(rb"\b(INSERT INTO|UPDATE \w+ SET|DELETE FROM)\b", re.IGNORECASE)


class CommitSpotter:
    """Finds the commits in what a PostgreSQL client sends: `COMMIT`, and each statement that writes and is alone.

    Alone is what is outside a transaction; most changes of an order are one such statement. It is sent as text, or
    prepared once and then asked for by its name.

    Messages are type, length, body; only the first of a connection has no type. They may come in any pieces.
    """

    def __init__(self, on_commit: Callable[[], None]) -> None:
        self._on_commit = on_commit
        self._buffer = b""
        self._started = False
        self._in_transaction = False
        self._prepared: dict[bytes, bytes] = {}

    def feed(self, data: bytes) -> None:
        """The next bytes of the client."""
        self._buffer += data
        while self._take_one():
            pass

    def _take_one(self) -> bool:
        head = 1 if self._started else 0
        if len(self._buffer) < head + 4:
            return False
        (length,) = struct.unpack_from("!I", self._buffer, head)
        if len(self._buffer) < head + length:
            return False
        kind, body = self._buffer[:head], self._buffer[head + 4 : head + length]
        self._buffer = self._buffer[head + length :]
        if not self._started:
            self._started = body[:4] != struct.pack("!I", _ASKS_FOR_SSL)
        else:
            self._look_at(kind, body)
        return True

    def _look_at(self, kind: bytes, body: bytes) -> None:
        if kind == b"P":
            name, text = body.split(b"\0")[:2]
            self._prepared[name] = text
        elif kind == b"B":
            self._asked_for(self._prepared.get(body.split(b"\0")[1], b""))
        elif kind == b"Q":
            self._asked_for(body)

    def _asked_for(self, text: bytes) -> None:
        word = text[:8].upper()
        if word.startswith((b"BEGIN", b"COMMIT", b"ROLLBACK")):
            self._in_transaction = word.startswith(b"BEGIN")
        if word.startswith(b"COMMIT") or (_WRITES.search(text) and not self._in_transaction):
            self._on_commit()


class _Connection:
    """One client, and the server behind it."""

    def __init__(self, proxy: Proxy, client: tuple[asyncio.StreamReader, asyncio.StreamWriter]) -> None:
        self._proxy = proxy
        self._client = client
        self._server: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self._swallow = False
        self._gone = asyncio.Event()
        self.frozen = False

    async def serve(self) -> None:
        """Carry bytes until one side is gone."""
        try:
            self._server = await asyncio.open_connection(self._proxy.host, self._proxy.target)
            spotter = CommitSpotter(self._commit_seen)
            to_server = self._pump(self._client[0], self._server[1], spotter.feed if self._proxy.postgres else None)
            to_client = self._pump(self._server[0], self._client[1], self._maybe_swallow)
            pumps = [asyncio.create_task(to_server), asyncio.create_task(to_client)]
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)
        except OSError:
            pass  # nobody listens there at the moment: the client is told by the closed connection
        finally:
            self.cut()

    async def _pump(
        self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, look: Callable[[bytes], None] | None
    ) -> None:
        try:
            while data := await source.read(65536):
                if look:
                    look(data)
                if self._proxy.delay:
                    await asyncio.sleep(self._proxy.delay)
                if not self.frozen:
                    sink.write(data)
                    await sink.drain()
        except OSError:
            pass
        if self.frozen:
            # Half-open means that not even the end of the other side is seen.
            await self._gone.wait()

    def _commit_seen(self) -> None:
        if self._proxy.commits_to_lose > 0 and not self._swallow:
            self._proxy.commits_to_lose -= 1
            self._swallow = True

    def _maybe_swallow(self, _: bytes) -> None:
        if self._swallow:
            # The server has answered, so it is done; the client is never told.
            self._proxy.commits_lost += 1
            self.cut()
            raise ConnectionAbortedError

    def cut(self) -> None:
        """End both sides at once, without a farewell."""
        self._gone.set()
        for side in (self._client, self._server):
            if side is not None:
                side[1].transport.abort()


class Proxy:
    """Listens on a port of its own and carries every connection to the port `target` of `host`."""

    def __init__(self, name: str, target: int, *, host: str = "127.0.0.1", postgres: bool = False) -> None:
        self.name = name
        self.target = target
        self.host = host
        self.postgres = postgres
        self.port = free_port()
        self.delay = 0.0
        self.commits_to_lose = 0
        self.commits_lost = 0
        self.cuts = 0
        self._open: set[_Connection] = set()
        self._serving: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[None]:
        """Serve, while the block runs."""
        server = await asyncio.start_server(self._accept, "127.0.0.1", self.port)
        try:
            yield
        finally:
            server.close()
            self.cut()
            await asyncio.gather(*self._serving, return_exceptions=True)

    def cut(self) -> None:
        """Cut every connection; new ones work."""
        for connection in list(self._open):
            connection.cut()
            self.cuts += 1

    def freeze(self) -> None:
        """Make every connection half-open: both ends keep it, and nothing arrives any more. New ones work."""
        for connection in self._open:
            connection.frozen = True
            self.cuts += 1

    def heal(self) -> None:
        """Be a good proxy again. What is frozen stays dead, as in a real network; it is cut."""
        self.delay, self.commits_to_lose = 0.0, 0
        for connection in list(self._open):
            if connection.frozen:
                connection.cut()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = _Connection(self, (reader, writer))
        self._open.add(connection)
        serving = asyncio.create_task(connection.serve())
        self._serving.add(serving)
        try:
            await asyncio.wait({serving})
        finally:
            self._open.discard(connection)
            self._serving.discard(serving)
