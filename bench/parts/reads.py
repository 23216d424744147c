"""Status reads: the product's, with telemetry and without, beside the least that FastAPI and asyncpg can do."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Callable
from typing import Any

from bench import generate
from bench.load import percentiles
from bench.stage import Ground
from bench.wire import Reader

_DATABASE = "reads"
_ROWS = 10_000

#: Program, its arguments, and whether telemetry is on.
_WHO: dict[str, tuple[str, list[str], bool]] = {
    "trellis": ("trellis", ["api", "PORT", "on"], True),
    "trellis-without-telemetry": ("trellis", ["api", "PORT", "off"], False),
    "one-row": ("one_row", ["PORT"], False),
}


async def measure(ground: Ground, done: Callable[[], None]) -> dict[str, Any]:
    """Reads per second, CPU and latency of each, turn by turn."""
    url = await ground.stage.database(_DATABASE)
    await generate.shipped_orders(url, _ROWS)
    records = []
    for number in range(ground.plan.rounds):
        for name, (program, args, telemetry) in _WHO.items():
            ground.stage.say(f"reads, turn {number + 1}: {name}")
            async with ground.program(program, args, url, telemetry=telemetry) as running:
                await running.serving()
                await _read(ground, running.port, 0.5)
                before = await ground.meter.read(_DATABASE, running.pid)
                seconds = await _read(ground, running.port, ground.plan.read_seconds)
                used = (await ground.meter.read(_DATABASE, running.pid)).since(before)
                figures = used.per_order(len(seconds))
                records.append(
                    {
                        "contestant": name,
                        "reads_per_second": len(seconds) / used.seconds,
                        "cpu_ms_python": figures["cpu_ms_python"],
                        "cpu_ms_postgres": figures["cpu_ms_postgres"],
                        "sql_statements": figures["sql_statements"],
                        **percentiles("read", seconds),
                    }
                )
            done()
    return {"turns": records}


async def _read(ground: Ground, port: int, seconds: float) -> list[float]:
    dice = random.Random(port)
    paths = (f"/orders/old-{dice.randint(1, _ROWS)}/status" for _ in itertools.count())
    loop = asyncio.get_running_loop()
    readers = [
        (await loop.create_connection(lambda: Reader(paths), "127.0.0.1", port))[1] for _ in range(ground.plan.readers)
    ]
    await asyncio.sleep(seconds)
    for reader in readers:
        reader.stop()
    await asyncio.gather(*(reader.ended for reader in readers))
    failed = [answer for reader in readers for answer in reader.failed]
    if failed:
        raise RuntimeError(f"{len(failed)} reads failed: {failed[0][:200]!r}")
    return [each for reader in readers for each in reader.seconds]
