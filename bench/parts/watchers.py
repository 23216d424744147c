"""Live timelines: what one watcher costs and what a thousand do, and how late the last of them hears of an event."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import asyncpg

from bench import generate
from bench.load import percentiles
from bench.stage import Ground
from bench.wire import Watcher

_DATABASE = "watched"
_EVENT = "address_changed"
_TELL = """
INSERT INTO events (order_id, type) SELECT 'waiting-' || n, $2 FROM generate_series(1, $1::int) AS n
"""


async def measure(ground: Ground, done: Callable[[], None]) -> dict[str, Any]:
    """Statements and CPU per second while nothing happens, and the delay of an event to each watcher."""
    records = []
    url = await ground.stage.database(_DATABASE)
    await generate.orders_in_review(url, max(ground.plan.watchers))
    for count in ground.plan.watchers:
        ground.stage.say(f"watchers: {count:,}")
        async with ground.program("trellis", ["api", "PORT", "on"], url, telemetry=True) as api:
            await api.serving()
            watchers = await _watch(api.port, count)
            await asyncio.sleep(1)
            before = await ground.meter.read(_DATABASE, api.pid)
            await asyncio.sleep(ground.plan.read_seconds)
            idle = (await ground.meter.read(_DATABASE, api.pid)).since(before)
            told = await _tell(url, count)
            async with asyncio.timeout(60):
                came = await asyncio.gather(*(watcher.came for watcher in watchers))
            for watcher in watchers:
                watcher.close()
        records.append(
            {
                "watchers": count,
                "statements_per_second": idle.statements / idle.seconds,
                "cpu_percent_python": idle.cpu["python"] / idle.seconds * 100,
                "cpu_percent_postgres": idle.cpu["postgres"] / idle.seconds * 100,
                **percentiles("delay", [each - told for each in came]),
            }
        )
        done()
    return {"turns": records}


async def _watch(port: int, count: int) -> list[Watcher]:
    loop = asyncio.get_running_loop()
    watchers = []
    for number in range(1, count + 1):
        path = f"/orders/waiting-{number}/events"
        _, watcher = await loop.create_connection(partial(Watcher, path, _EVENT), "127.0.0.1", port)
        watchers.append(watcher)
    await asyncio.gather(*(watcher.open for watcher in watchers))
    return watchers


async def _tell(url: str, count: int) -> float:
    """An event for every watched order, in one statement; when it was committed."""
    connection = await asyncpg.connect(url, ssl=False)
    try:
        await connection.execute(_TELL, count, _EVENT)
        return time.time()
    finally:
        await connection.close()
