"""What an order costs when there are many in the tables already: a turn with few, a turn with many, and again."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from bench import fit, generate
from bench.contestants import CONTESTANTS, serve
from bench.load import carry
from bench.parts.orders import turn
from bench.stage import Ground


async def measure(ground: Ground, done: Callable[[], None]) -> dict[str, Any]:
    """Figures of every turn, and the line through them by the logarithm of the number of orders."""
    plan, stage = ground.plan, ground.stage
    for rows in plan.rows:
        stage.say(f"growth: generating {rows:,} orders")
        await generate.shipped_orders(await stage.database(_database(rows)), rows)
    records = []
    for number in range(plan.rounds):
        for rows in plan.rows:
            stage.say(f"growth, turn {number + 1}: {rows:,} orders in the tables")
            async with serve(CONTESTANTS[0], ground, _database(rows)) as running:
                await carry(running, plan.warm_up, plan.usual)
                figures = await turn(running, plan.orders, plan.usual, done)
                records.append({"rows": rows, **figures})
    points = [(math.log10(each["rows"]), each["cpu_ms_postgres"] + each["cpu_ms_python"]) for each in records]
    return {"turns": records, "fit": fit.line(points)}


def _database(rows: int) -> str:
    return f"rows_{rows}"
