"""The gauges that PostgreSQL knows: read every few seconds by one process of all, never by a scrape."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

import structlog
from opentelemetry.instrumentation.utils import suppress_instrumentation

from app import db
from app.errors import DatabaseUnavailable
from app.metrics import ORDER_GAUGES
from app.steps import FINAL_STEPS, Step

if TYPE_CHECKING:
    import asyncpg

    from app.settings import Settings

#: Seconds between two readings.
INTERVAL: Final = 5.0

#: Whoever holds this lock reads for all; "trellis" cut to the 63 bits of an advisory lock.
_READER_LOCK: Final = 0x7472656C6C6973

_CLAIM: Final = "SELECT pg_try_advisory_lock($1)"

# Both walk an index over what is still open, however many orders have ended. Due is who has a quarter of the review
# left: a share, because windows are of seconds or of days. An order in its second review waits for a person, and is
# not stuck at its step.
_OPEN: Final = """
SELECT state, count(*) AS orders,
       coalesce(clock_timestamp() - min(state_since) FILTER (WHERE reopened_for IS NULL), interval '0') AS oldest,
       count(*) FILTER (WHERE (state = 'awaiting_review' OR reopened_for IS NOT NULL)
           AND clock_timestamp() > review_deadline - (review_deadline - state_since) / 4) AS due
FROM orders WHERE state = ANY($1) GROUP BY state
"""
_UNSETTLED: Final = "SELECT clock_timestamp() - min(created_at) AS age FROM payments WHERE status = 'INIT'"

log = structlog.get_logger(__name__)


async def keep_reading(settings: Settings) -> None:
    """Read as long as it is not cancelled, on a connection of its own: the lock lives and dies with it, so that
    another process takes over when this one is gone."""
    with suppress_instrumentation():
        while True:
            try:
                with db.translated():
                    await _read_as_the_one(settings)
            except DatabaseUnavailable as error:
                log.warning("the gauges cannot be read", reason=db.reason(error))
            await asyncio.sleep(INTERVAL)


async def _read_as_the_one(settings: Settings) -> None:
    connection = await db.connect(settings, "trellis-gauges")
    try:
        while not await connection.fetchval(_CLAIM, _READER_LOCK):
            ORDER_GAUGES.clear()
            await asyncio.sleep(INTERVAL)
        while True:
            await read(connection)
            await asyncio.sleep(INTERVAL)
    finally:
        connection.terminate()


async def read(connection: asyncpg.Connection) -> None:
    """Read once, and publish."""
    still_open = [step for step in Step if step not in FINAL_STEPS]
    rows = await connection.fetch(_OPEN, still_open)
    age = await connection.fetchval(_UNSETTLED)
    ORDER_GAUGES.set(
        {row["state"]: row["orders"] for row in rows},
        {row["state"]: row["oldest"].total_seconds() for row in rows},
        age.total_seconds() if age else 0.0,
        sum(row["due"] for row in rows),
    )
