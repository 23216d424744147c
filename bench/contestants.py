"""Who is measured, how each is asked for an order, and how its end is seen."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from http import HTTPStatus
from typing import Final, Protocol

import asyncpg
import httpx
from temporalio.client import Client, WorkflowExecution

from bench.stage import Ground, Program


@dataclass(frozen=True)
class Contestant:
    """One way to carry an order from its start to `shipped`."""

    name: str
    program: str
    args: tuple[str, ...] = ("PORT",)
    telemetry: bool = False
    #: Writes orders down, so that it can be checked that all of them were shipped.
    database: str | None = None
    http: bool = True
    on_temporal: bool = True


CONTESTANTS: Final = (
    Contestant("trellis", "trellis", ("all", "PORT", "on"), telemetry=True, database="trellis"),
    Contestant("trellis-without-telemetry", "trellis", ("all", "PORT", "off"), database="trellis"),
    Contestant("bare", "bare", http=False),
    Contestant("textbook", "textbook", database="textbook"),
    Contestant("dbos", "dbos_shop", database="dbos", on_temporal=False),
)


class Door(Protocol):
    """How a contestant is asked."""

    async def start(self, order_id: str) -> None:
        """Start an order; returns when it is accepted."""
        ...

    async def approve(self, order_id: str) -> None:
        """Approve it; returns when that is accepted."""
        ...


class HttpDoor:
    """The published calls."""

    def __init__(self, client: httpx.AsyncClient) -> None:
        self._client = client

    async def start(self, order_id: str) -> None:
        """See `Door.start`."""
        await self._post(
            f"/orders/{order_id}/start", {"payment_id": f"pay-{order_id}", "review_timeout_seconds": 86400}
        )

    async def approve(self, order_id: str) -> None:
        """See `Door.approve`."""
        await self._post(f"/orders/{order_id}/signals/approve")

    async def _post(self, path: str, body: dict[str, object] | None = None) -> None:
        response = await self._client.post(path, json=body)
        if response.status_code != HTTPStatus.ACCEPTED:
            raise RuntimeError(f"POST {path}: {response.status_code} {response.text[:200]}")


class LineDoor:
    """A line each way, on as many connections as there are questions at once."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._free: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def start(self, order_id: str) -> None:
        """See `Door.start`."""
        await self._ask("start", order_id)

    async def approve(self, order_id: str) -> None:
        """See `Door.approve`."""
        await self._ask("approve", order_id)

    async def close(self) -> None:
        """Give all connections back."""
        for _, writer in self._free:
            writer.close()

    async def _ask(self, verb: str, order_id: str) -> None:
        reader, writer = self._free.pop() if self._free else await asyncio.open_connection("127.0.0.1", self._port)
        writer.write(f"{verb} {order_id}\n".encode())
        if await reader.readline() != b"done\n":
            raise RuntimeError(f"{verb} {order_id}: the program hung up; see its log")
        self._free.append((reader, writer))


class Ends(Protocol):
    """How the end of an order is seen."""

    async def of(self, order_id: str) -> None:
        """Return when the order's durable workflow has ended."""
        ...


class TemporalEnds:
    """One long poll for each order, at the server."""

    def __init__(self, client: Client) -> None:
        self._client = client

    async def of(self, order_id: str) -> None:
        """See `Ends.of`."""
        await self._client.get_workflow_handle(f"order/{order_id}").result()


class DbosEnds:
    """One look at DBOS's own table for all orders, every few milliseconds."""

    _INTERVAL = 0.02

    def __init__(self, connection: asyncpg.Connection) -> None:
        self._connection = connection
        self._awaited: dict[str, asyncio.Future[None]] = {}

    async def of(self, order_id: str) -> None:
        """See `Ends.of`."""
        self._awaited[f"order/{order_id}"] = ended = asyncio.get_running_loop().create_future()
        await ended

    async def keep_looking(self) -> None:
        """Until it is cancelled."""
        while True:
            rows = await self._connection.fetch(
                "SELECT workflow_uuid, status, output FROM dbos.workflow_status "
                "WHERE workflow_uuid = ANY($1) AND status NOT IN ('PENDING', 'ENQUEUED')",
                list(self._awaited),
            )
            for workflow_id, status, output in rows:
                ended = self._awaited.pop(workflow_id)
                if status == "SUCCESS":
                    ended.set_result(None)
                else:
                    ended.set_exception(RuntimeError(f"{workflow_id} is {status}: {output}"))
            await asyncio.sleep(self._INTERVAL)


@dataclass(frozen=True)
class Running:
    """A contestant that serves."""

    contestant: Contestant
    ground: Ground
    program: Program
    database: str
    door: Door
    ends: Ends

    async def check(self, prefix: str, orders: int) -> None:
        """Make sure that every order was shipped: a batch of failures would be quick.

        Raises:
            RuntimeError: some were not.
        """
        if self.contestant.database is None:
            return  # its workflows return "shipped", and `Ends.of` fails for one that failed
        async with self.ground.stage.looking_at(self.database) as connection:
            shipped = await connection.fetchval(
                "SELECT count(*) FROM orders WHERE id LIKE $1 || '-%' AND state = 'shipped'", prefix
            )
        if shipped != orders:
            raise RuntimeError(f"{self.contestant.name}: {shipped} of {orders} orders were shipped")

    async def history(self, prefix: str, orders: int) -> dict[str, float]:
        """Events and bytes of history per order, the shipment's with it; {} where there is none."""
        if not self.contestant.on_temporal:
            return {}
        events = size = 0
        for kind in ("order", "shipping"):
            query = f'WorkflowId STARTS_WITH "{kind}/{prefix}-" AND ExecutionStatus = "Completed"'
            found: list[WorkflowExecution] = []
            async with asyncio.timeout(30):
                while len(found) < orders:  # what is listed is written a moment after the end
                    found = [each async for each in self.ground.client.list_workflows(query)]
            events += sum(each.history_length for each in found)
            size += sum(each.raw_info.history_size_bytes for each in found)
        return {"history_events": events / orders, "history_bytes": size / orders}


@asynccontextmanager
async def http_door(port: int) -> AsyncIterator[HttpDoor]:
    """The door of an API on this port."""
    # A connection is given up before uvicorn's default, 5 s, does it: a request on one that is just closed is lost.
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=2)
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60, limits=limits) as client:
        yield HttpDoor(client)


@asynccontextmanager
async def serve(contestant: Contestant, ground: Ground, database: str | None = None) -> AsyncIterator[Running]:
    """A fresh process of the contestant, on the database of its own or on another one, while the block runs."""
    name = database or contestant.database or "bare"
    url = await ground.stage.database(name, migrated=contestant.program == "trellis")
    async with AsyncExitStack() as stack:
        program = await stack.enter_async_context(
            ground.program(contestant.program, contestant.args, url, telemetry=contestant.telemetry)
        )
        await program.serving()
        door: Door
        if contestant.http:
            door = await stack.enter_async_context(http_door(program.port))
        else:
            door = line_door = LineDoor(program.port)
            stack.push_async_callback(line_door.close)
        ends = await _ends(contestant, ground, name, stack)
        yield Running(contestant, ground, program, name, door, ends)


async def _ends(contestant: Contestant, ground: Ground, database: str, stack: AsyncExitStack) -> Ends:
    if contestant.on_temporal:
        return TemporalEnds(ground.client)
    ends = DbosEnds(await stack.enter_async_context(ground.stage.looking_at(database)))
    # In a group: if it fails, so does whoever waits for an end.
    group = await stack.enter_async_context(asyncio.TaskGroup())
    stack.callback(group.create_task(ends.keep_looking()).cancel)
    return ends
