"""How fast a backlog is worked off: orders are placed and approved while no worker runs, then workers come."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from typing import Any

from bench import fit
from bench.contestants import http_door
from bench.load import at_most
from bench.stage import Ground

_DATABASE = "backlog"
#: Points of a curve that are kept for those who want to see it; the fit has all.
_POINTS = 200
_SHIPPED = "SELECT count(*) FROM orders WHERE id LIKE $1 || '-%' AND state = 'shipped'"


async def measure(ground: Ground, done: Callable[[], None]) -> dict[str, Any]:
    """For each number of worker processes: seconds, and the line through what was shipped when."""
    records = []
    for workers in ground.plan.workers:
        ground.stage.say(f"drain: a backlog of {ground.plan.backlog:,} and {workers} worker processes")
        prefix = await _place(ground)
        curve = await _drain(ground, prefix, workers)
        # While they are starting, and when the last orders leave most of them idle, is not how fast they work.
        steady = [(at, shipped) for at, shipped in curve if 0.1 <= shipped / ground.plan.backlog <= 0.9]
        records.append(
            {
                "workers": workers,
                "orders": ground.plan.backlog,
                "seconds": curve[-1][0],
                "curve": curve[:: len(curve) // _POINTS + 1],
                "fit": fit.line(steady) if len({at for at, _ in steady}) > 1 else None,
            }
        )
        done()
    return {"turns": records}


async def _place(ground: Ground) -> str:
    prefix = secrets.token_hex(4)
    url = await ground.stage.database(_DATABASE)
    async with ground.program("trellis", ["api", "PORT", "on"], url, telemetry=True) as api:
        await api.serving()
        async with http_door(api.port) as door:

            async def place(order_id: str) -> None:
                await door.start(order_id)
                await door.approve(order_id)

            await at_most(ground.plan.usual, place, [f"{prefix}-{n}" for n in range(ground.plan.backlog)])
    return prefix


async def _drain(ground: Ground, prefix: str, workers: int) -> list[tuple[float, int]]:
    """What was shipped after how many seconds."""
    url, curve, began = await ground.stage.database(_DATABASE), [(0.0, 0)], time.monotonic()
    async with AsyncExitStack() as stack, asyncio.timeout(120 + ground.plan.backlog * 2):
        for _ in range(workers):
            program = ground.program("trellis", ["workers", "PORT", "on"], url, telemetry=True)
            await stack.enter_async_context(program)
        looking = await stack.enter_async_context(ground.stage.looking_at(_DATABASE))
        while curve[-1][1] < ground.plan.backlog:
            await asyncio.sleep(0.25)
            curve.append((round(time.monotonic() - began, 3), await looking.fetchval(_SHIPPED, prefix)))
    return curve
