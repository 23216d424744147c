"""What a parked order costs: resident memory of the workers with more and more orders in review, beyond what they
cache; and that none of those they forgot is lost."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable
from typing import Any

import asyncpg

from bench import fit
from bench.contestants import http_door
from bench.load import at_most
from bench.meter import resident_bytes
from bench.stage import Ground

_DATABASE = "parked"
#: Seconds after which the last tasks have been done, and memory that is free was given back if it ever is.
_SETTLE = 3.0


async def measure(ground: Ground, done: Callable[[], None]) -> dict[str, Any]:
    """Memory by the number of parked orders; and what became of them."""
    plan, stage = ground.plan, ground.stage
    url = await stage.database(_DATABASE)
    cache = {"TRELLIS_MAX_CACHED_WORKFLOWS": str(plan.cached)}
    records: list[dict[str, Any]] = []
    prefix = secrets.token_hex(4)
    async with (
        stage.looking_at(_DATABASE) as looking,
        ground.program("trellis", ["api", "PORT", "on"], url, telemetry=True) as api,
        ground.program("trellis", ["workers", "PORT", "on"], url, telemetry=True, **cache) as workers,
    ):
        await asyncio.gather(api.serving(), workers.serving())
        async with http_door(api.port) as door:
            parked = 0
            for target in plan.parked:
                stage.say(f"memory: {target:,} orders in review")
                await at_most(plan.usual, door.start, [f"{prefix}-{n}" for n in range(parked, target)])
                await _until(looking, "awaiting_review", target)
                parked = target
                await asyncio.sleep(_SETTLE)
                records.append({"parked": parked, "resident_bytes": resident_bytes(workers.pid)})
                done()
            stage.say(f"memory: approving the {plan.woken} oldest")
            await at_most(plan.usual, door.approve, [f"{prefix}-{n}" for n in range(plan.woken)])
            await _until(looking, "shipped", plan.woken)
        waiting = await looking.fetchval("SELECT count(*) FROM orders WHERE state = 'awaiting_review'")
        query = f'WorkflowId STARTS_WITH "order/{prefix}-" AND ExecutionStatus = "Running"'
        running = (await ground.client.count_workflows(query)).count
    beyond = [(each["parked"], each["resident_bytes"]) for each in records if each["parked"] >= plan.cached]
    return {
        "cached": plan.cached,
        "turns": records,
        "bytes_per_order_beyond_the_cache": fit.line(beyond)["slope"] if len(beyond) > 1 else None,
        "woken": plan.woken,
        "lost": parked - plan.woken - min(waiting, running),
    }


async def _until(looking: asyncpg.Connection, state: str, orders: int) -> None:
    async with asyncio.timeout(60 + orders):
        while True:
            if await looking.fetchval("SELECT count(*) FROM orders WHERE state = $1", state) >= orders:
                return
            await asyncio.sleep(0.2)
