"""Everything outside: a payment provider, a carrier and a collector of traces that say yes at once and keep nothing.

One process for all contestants, so that what a partner costs is in nobody's figures.
`python -m bench.programs.world <port>`
"""

from __future__ import annotations

import asyncio
import json
import sys
import uuid
from http import HTTPStatus


class Yes(asyncio.Protocol):
    """HTTP/1.1 with keep-alive, as little of it as the clients need."""

    def __init__(self) -> None:
        self._received = b""
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep what to answer to."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """Answer every request that is complete."""
        self._received += data
        while (end := self._received.find(b"\r\n\r\n")) >= 0:
            head = self._received[:end].decode("latin-1").split("\r\n")
            headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:])}
            size = end + 4 + int(headers.get("content-length", 0))
            if len(self._received) < size:
                return
            body, self._received = self._received[end + 4 : size], self._received[size:]
            self._answer(head[0].split(" ")[1], body)

    def _answer(self, path: str, body: bytes) -> None:
        status, answer = _reply(path, body)
        assert self._transport
        self._transport.write(
            f"HTTP/1.1 {status.value} {status.phrase}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(answer)}\r\n\r\n".encode()
            + answer
        )


def _reply(path: str, body: bytes) -> tuple[HTTPStatus, bytes]:
    if path.endswith("/v1/charges"):
        asked = json.loads(body)
        charge = {"id": f"ch_{uuid.uuid4().hex}", "status": "succeeded"}
        return HTTPStatus.CREATED, json.dumps(charge | {key: asked[key] for key in ("amount", "currency")}).encode()
    if path.endswith("/v1/parcels"):
        return HTTPStatus.CREATED, json.dumps({"tracking": f"trk_{uuid.uuid4().hex}"}).encode()
    if path.endswith("/v1/traces"):
        return HTTPStatus.OK, b""
    return HTTPStatus.NOT_FOUND, b"{}"


async def _serve(port: int) -> None:
    server = await asyncio.get_running_loop().create_server(Yes, "127.0.0.1", port)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(_serve(int(sys.argv[1])))
