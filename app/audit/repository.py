"""The product's own books, read a page at a time, each page in one snapshot."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Any, Final

from app.audit.models import OrderBooks, PaymentRow, StepEvent
from app.money import Money
from app.steps import Step

if TYPE_CHECKING:
    import asyncpg

_COLUMNS: Final = """
SELECT orders.id, orders.state, orders.state_since, orders.payment_id AS named_payment, orders.total,
       orders.currency AS order_currency, orders.tracking,
       extract(epoch FROM clock_timestamp() - orders.state_since)::float8 AS state_seconds,
       (SELECT order_id FROM payments AS named WHERE named.payment_id = orders.payment_id) AS payment_owner,
       payments.payment_id, payments.status, payments.amount, payments.asked, payments.currency,
       payments.provider_reference, payments.refund_reference
FROM orders LEFT JOIN payments ON payments.order_id = orders.id
"""

_PAGE: Final = f"""{_COLUMNS}
WHERE orders.id > $1 AND ($2::timestamptz IS NULL OR orders.state_since >= $2)
ORDER BY orders.id LIMIT $3
"""

_AGAIN: Final = f"{_COLUMNS} WHERE orders.id = ANY($1)"

# Failed attempts are events too, and an order that waited a night for a provider has hundreds: they are left out.
_EVENTS: Final = """
SELECT order_id, type, payload_json ->> 'amount' AS amount, payload_json ->> 'currency' AS currency
FROM events WHERE order_id = ANY($1) AND type = ANY($2) ORDER BY id
"""

# The unique index on (order_id, key) answers this without reading the table.
_WITHOUT_ORDER: Final = """
SELECT DISTINCT order_id FROM events
WHERE order_id > $1 AND NOT EXISTS (SELECT FROM orders WHERE orders.id = events.order_id)
ORDER BY order_id LIMIT $2
"""

_KNOWN: Final = "SELECT id FROM orders WHERE id = ANY($1)"

_TOLD: Final = [*Step, "refunded"]


class BooksRepository:
    """Orders with their payments and timelines, as an auditor reads them."""

    def __init__(self, pool: asyncpg.Pool) -> None:
        self._pool = pool

    async def page(self, after: str, since: datetime | None, limit: int) -> list[OrderBooks]:
        """The next orders by id, of those that moved at or after `since`."""
        return await self._read(_PAGE, after, since, limit)

    async def again(self, order_ids: list[str]) -> list[OrderBooks]:
        """These orders as they are now."""
        return await self._read(_AGAIN, order_ids)

    async def without_order(self, after: str, limit: int) -> list[str]:
        """Ids that have a timeline and no row."""
        rows = await self._pool.fetch(_WITHOUT_ORDER, after, limit)
        return [row["order_id"] for row in rows]

    async def unknown(self, order_ids: list[str]) -> set[str]:
        """Those of the ids that have no row."""
        rows = await self._pool.fetch(_KNOWN, order_ids)
        return set(order_ids) - {row["id"] for row in rows}

    async def _read(self, sql: str, *arguments: Any) -> list[OrderBooks]:
        # One snapshot, or an order that moves between the two statements would have an event too many.
        async with (
            self._pool.acquire() as connection,
            connection.transaction(isolation="repeatable_read", readonly=True),
        ):
            rows = await connection.fetch(sql, *arguments)
            told = await connection.fetch(_EVENTS, [row["id"] for row in rows], _TOLD)
        events: dict[str, list[StepEvent]] = {}
        for event in told:
            events.setdefault(event["order_id"], []).append(
                StepEvent(type=event["type"], amount=event["amount"], currency=event["currency"])
            )
        return [_books(row, events.get(row["id"], [])) for row in rows]


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
