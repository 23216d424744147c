"""What an order costs: every contestant in turn, again and again, at several concurrencies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from bench.contestants import Contestant, Running, serve
from bench.load import carry
from bench.stage import Backend, Stage


async def measure(
    stage: Stage, contestants: Sequence[Contestant], backends: Sequence[Backend], done: Callable[[], None]
) -> list[dict[str, Any]]:
    """One record for each turn and concurrency."""
    records: list[dict[str, Any]] = []
    for backend in backends:
        async with stage.temporal(backend) as ground:
            for number in range(stage.plan.rounds):
                for contestant in contestants:
                    stage.say(f"{backend}, turn {number + 1}: {contestant.name}")
                    async with serve(contestant, ground) as running:
                        await carry(running, stage.plan.warm_up, stage.plan.usual)
                        for at_once in stage.plan.at_once:
                            figures = await turn(running, stage.plan.orders_at(at_once), at_once, done)
                            records.append(
                                {"backend": backend, "contestant": contestant.name, "at_once": at_once, **figures}
                            )
    return records


async def turn(running: Running, orders: int, at_once: int, done: Callable[[], None]) -> dict[str, float]:
    """Carry a batch between two readings of the meter."""
    meter = running.ground.meter
    await meter.checkpoint()
    before = await meter.read(running.database, running.program.pid)
    batch = await carry(running, orders, at_once, done)
    used = (await meter.read(running.database, running.program.pid)).since(before)
    costs = used.per_order(orders)
    together = sum(costs[f"cpu_ms_{name}"] for name in ("temporal", "postgres", "python"))
    return {**batch.figures(), **costs, "cpu_ms": together, **await running.history(batch.prefix, orders)}
