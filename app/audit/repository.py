"""The product's own books, read a page at a time, each page in one snapshot.

No statement reads more than a batch by key, however large the tables: an audit of everything takes as long as it takes,
and each of its statements milliseconds.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final

from app.audit.models import OrderBooks, Page, PaymentRow, StepEvent
from app.domain.money import Money
from app.domain.steps import Step
from app.errors import DatabaseUnavailable

if TYPE_CHECKING:
    import asyncpg

    from app.db.pool import Connection

    _Rows = list[asyncpg.Record]

_COLUMNS: Final = """
SELECT orders.id, orders.state, orders.state_since, orders.payment_id AS named_payment, orders.total,
       orders.currency AS order_currency, orders.tracking,
       extract(epoch FROM clock_timestamp() - orders.state_since)::float8 AS state_seconds,
       (SELECT order_id FROM payments AS named WHERE named.payment_id = orders.payment_id) AS payment_owner,
       payments.payment_id, payments.status, payments.amount, payments.asked, payments.currency,
       payments.provider_reference, payments.refund_reference
FROM orders LEFT JOIN payments ON payments.order_id = orders.id
"""

#: Rows that a statement goes through by key: of orders, to find those that moved; of events, to find their orders.
WINDOW_ROWS: Final = 10_000
TIMELINE_ROWS: Final = 20_000

#: Seconds for a statement of the audit. It waits longer than a request may: nobody waits for it.
READ_SECONDS: Final = 60.0

_WINDOW_END: Final = "SELECT max(id) FROM (SELECT id FROM orders WHERE id > $1 ORDER BY id LIMIT $2) AS next_orders"

_PAGE: Final = f"""{_COLUMNS}
WHERE orders.id > $1 AND orders.id <= $2 AND ($3::timestamptz IS NULL OR orders.state_since >= $3)
ORDER BY orders.id LIMIT $4
"""

_AGAIN: Final = f"{_COLUMNS} WHERE orders.id = ANY($1)"

# Failed attempts are events too, and an order that waited a night for a provider has hundreds: they are left out.
_EVENTS: Final = """
SELECT order_id, type, payload_json ->> 'amount' AS amount, payload_json ->> 'currency' AS currency
FROM events WHERE order_id = ANY($1) AND type = ANY($2) ORDER BY id
"""

# The unique index on (order_id, key) answers this without reading the table.
_TIMELINES: Final = """
WITH next_events AS MATERIALIZED (
    SELECT order_id FROM events WHERE order_id > $1 ORDER BY order_id LIMIT $2
)
SELECT (SELECT max(order_id) FROM next_events) AS last, ARRAY(
    SELECT DISTINCT order_id FROM next_events
    WHERE NOT EXISTS (SELECT FROM orders WHERE orders.id = next_events.order_id) ORDER BY order_id
) AS lost
"""

_KNOWN: Final = "SELECT id FROM orders WHERE id = ANY($1)"

_TOLD: Final = [*Step, "refunded"]


class BooksRepository:
    """Orders with their payments and timelines, as an auditor reads them.

    Raises:
        DatabaseUnavailable: from every method; it says so if a statement took longer than it may.
    """

    def __init__(self, pool: asyncpg.Pool, seconds: float = READ_SECONDS) -> None:
        """`seconds` is the time limit of a statement, whatever the pool's is."""
        self._pool = pool
        self._seconds = seconds

    async def pages(self, since: datetime | None, limit: int) -> AsyncIterator[Page]:
        """All orders by id, `limit` at a time; those that moved at or after `since`, if that is given."""
        after = ""
        while end := await self._window_end(after):
            while rows := await self._read(_PAGE, after, end, since, limit):
                yield _page(*rows)
                after = rows[0][-1]["id"]
            after = end

    async def again(self, order_ids: list[str]) -> Page:
        """These orders as they are now."""
        rows = await self._read(_AGAIN, order_ids)
        return _page(*rows) if rows else Page()

    async def without_order(self) -> AsyncIterator[list[str]]:
        """Ids that have a timeline and no row, some at a time."""
        after = ""
        while True:
            async with self._reading() as connection:
                batch = await connection.fetchrow(_TIMELINES, after, TIMELINE_ROWS, timeout=self._seconds)
            if batch is None or batch["last"] is None:
                return
            after = batch["last"]
            yield batch["lost"]

    async def unknown(self, order_ids: list[str]) -> set[str]:
        """Those of the ids that have no row."""
        async with self._reading() as connection:
            rows = await connection.fetch(_KNOWN, order_ids, timeout=self._seconds)
        return set(order_ids) - {row["id"] for row in rows}

    async def _window_end(self, after: str) -> str | None:
        async with self._reading() as connection:
            end: str | None = await connection.fetchval(_WINDOW_END, after, WINDOW_ROWS, timeout=self._seconds)
            return end

    @asynccontextmanager
    async def _reading(self) -> AsyncIterator[Connection]:
        """A connection, for statements that have the audit's time limit each."""
        async with self._pool.acquire() as connection:
            try:
                yield connection
            except TimeoutError as error:
                # Ours, not the pool's: whoever hears of it can ask with more time.
                raise DatabaseUnavailable(f"a read of the tables took longer than {self._seconds:g} s") from error

    async def _read(self, sql: str, *arguments: Any) -> tuple[_Rows, _Rows] | None:
        """Orders and their events; None without any order."""
        # One snapshot, or an order that moves between the two statements would have an event too many.
        async with (
            self._reading() as connection,
            connection.transaction(isolation="repeatable_read", readonly=True),
        ):
            rows = await connection.fetch(sql, *arguments, timeout=self._seconds)
            if not rows:
                return None
            return rows, await connection.fetch(_EVENTS, [row["id"] for row in rows], _TOLD, timeout=self._seconds)


def _page(rows: _Rows, told: _Rows) -> Page:
    events: dict[str, list[StepEvent]] = {}
    for event in told:
        events.setdefault(event["order_id"], []).append(
            StepEvent(type=event["type"], amount=event["amount"], currency=event["currency"])
        )
    page = Page()
    for row in rows:
        try:
            page.books.append(_books(row, events.get(row["id"], [])))
        except ValueError as error:
            page.unreadable[row["id"]] = type(error).__name__
    return page


def _books(row: asyncpg.Record, events: list[StepEvent]) -> OrderBooks:
    return OrderBooks(
        order_id=row["id"],
        step=row["state"],
        step_since=row["state_since"],
        step_seconds=row["state_seconds"],
        payment_id=row["named_payment"],
        total=Money(amount=row["total"], currency=row["order_currency"]),
        tracking=row["tracking"],
        payment=PaymentRow(**dict(row)) if row["payment_id"] else None,
        payment_owner=row["payment_owner"],
        events=events,
    )
