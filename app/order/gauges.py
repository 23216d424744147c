"""The gauges that PostgreSQL knows: read every few seconds by one process of all, never by a scrape."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from datetime import timedelta
from typing import TYPE_CHECKING, Final

import structlog
from opentelemetry.instrumentation.utils import suppress_instrumentation

from app.db.pool import UNAVAILABLE, connect, reason, translated
from app.domain.steps import FINAL_STEPS, Step
from app.errors import DatabaseUnavailable
from app.telemetry.metrics import ORDER_GAUGES

if TYPE_CHECKING:
    import asyncpg

    from app.settings import Settings

#: Seconds between two readings.
INTERVAL: Final = 5.0

#: Intervals for which a claim holds: as long as another process may not have been heard of.
CLAIM_INTERVALS: Final = 4

_KEY: Final = "gauges_reader"

# In a row, with a limit, as a lock of the session would stay behind in a pooler's. Asked first: the conflict alone
# would lock the row, and write, for everybody who does not get it.
_CLAIM: Final = """
INSERT INTO system AS held (key, value)
SELECT $1, $2 WHERE NOT EXISTS (
    SELECT FROM system WHERE key = $1 AND value <> $2 AND set_at >= clock_timestamp() - $3::interval
)
ON CONFLICT (key) DO UPDATE SET value = excluded.value, set_at = clock_timestamp()
WHERE held.value = excluded.value OR held.set_at < clock_timestamp() - $3::interval
RETURNING true
"""
_RELEASE: Final = "DELETE FROM system WHERE key = $1 AND value = $2"

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
    """Read as long as it is not cancelled, on a connection of its own; another process takes over when this one has
    not been heard of for some intervals."""
    reader = uuid.uuid4().hex
    with suppress_instrumentation():
        while True:
            try:
                with translated():
                    await _read_as(reader, settings)
            except DatabaseUnavailable as error:
                log.warning("the gauges cannot be read", reason=reason(error))
            await asyncio.sleep(INTERVAL)


async def _read_as(reader: str, settings: Settings) -> None:
    connection = await connect(settings, "trellis-gauges")
    try:
        while True:
            if await connection.fetchval(_CLAIM, _KEY, reader, timedelta(seconds=INTERVAL * CLAIM_INTERVALS)):
                await read(connection)
            else:
                ORDER_GAUGES.clear()
            await asyncio.sleep(INTERVAL)
    except asyncio.CancelledError:
        await _leave(connection, reader)
        raise
    finally:
        connection.terminate()


async def _leave(connection: asyncpg.Connection, reader: str) -> None:
    """Let the next one begin at once, if that takes no time."""
    with contextlib.suppress(*UNAVAILABLE):
        await connection.execute(_RELEASE, _KEY, reader, timeout=1.0)


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
