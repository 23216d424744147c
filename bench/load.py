"""Carrying orders: so many at once, each started, approved at once, and awaited."""

from __future__ import annotations

import asyncio
import secrets
import statistics
import time
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from bench.contestants import Running


@dataclass(frozen=True)
class Batch:
    """Orders that were carried, and how long each took."""

    prefix: str
    seconds: float
    start_seconds: list[float]
    end_to_end_seconds: list[float]

    def figures(self) -> dict[str, float]:
        """Rate and latencies, the latter in milliseconds."""
        return {
            "orders_per_second": len(self.end_to_end_seconds) / self.seconds,
            **percentiles("start", self.start_seconds),
            **percentiles("end_to_end", self.end_to_end_seconds),
        }


async def at_most(at_once: int, work: Callable[[str], Coroutine[Any, Any, None]], order_ids: Iterable[str]) -> None:
    """Do `work` for each order, so many at once; the first error ends all."""
    ids = iter(order_ids)

    async def some() -> None:
        for order_id in ids:
            await work(order_id)

    async with asyncio.TaskGroup() as group:
        for _ in range(at_once):
            group.create_task(some())


async def carry(running: Running, orders: int, at_once: int, done: Callable[[], None] = lambda: None) -> Batch:
    """Carry a batch: a closed loop, as the next order starts when one has ended. `done` is told of each."""
    prefix = secrets.token_hex(4)
    starts: list[float] = []
    ends: list[float] = []

    async def one(order_id: str) -> None:
        began = time.monotonic()
        await running.door.start(order_id)
        starts.append(time.monotonic() - began)
        await running.door.approve(order_id)
        await running.ends.of(order_id)
        ends.append(time.monotonic() - began)
        done()

    began = time.monotonic()
    async with asyncio.timeout(60 + orders * 2):
        await at_most(at_once, one, [f"{prefix}-{number}" for number in range(orders)])
    seconds = time.monotonic() - began
    await running.check(prefix, orders)
    return Batch(prefix, seconds, starts, ends)


def percentiles(name: str, seconds: Sequence[float]) -> dict[str, float]:
    """Median and 99th percentile, in milliseconds."""
    ordered = sorted(seconds)
    return {
        f"{name}_p50_ms": statistics.median(ordered) * 1000,
        f"{name}_p99_ms": ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))] * 1000,
    }
