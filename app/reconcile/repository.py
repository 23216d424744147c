"""Orders and payments that were left behind, and the two repairs that no feature has a use for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from app import events
from app.money import Money
from app.payment.repository import mark_charged, mark_failed
from app.steps import FINAL_STEPS, Step

if TYPE_CHECKING:
    import asyncpg

    from app.payment.gateway import Receipt

_COLUMNS = "orders.id, orders.state, orders.payment_id, orders.total, orders.currency, orders.dispatch_started_at"

_OPEN = f"""
SELECT {_COLUMNS} FROM orders
WHERE id > $1 AND NOT (state = ANY($2)) AND state_since <= clock_timestamp() - make_interval(secs => $3)
ORDER BY id LIMIT $4
"""  # noqa: S608 - a constant

_IN_DOUBT = f"""
SELECT {_COLUMNS} FROM payments JOIN orders ON orders.id = payments.order_id
WHERE payments.status = 'INIT' AND orders.id > $1 AND orders.state = ANY($2)
  AND state_since <= clock_timestamp() - make_interval(secs => $3)
ORDER BY orders.id LIMIT $4
"""  # noqa: S608

_OWNER = "SELECT order_id FROM payments WHERE payment_id = $1"


@dataclass(frozen=True)
class Left:
    """An order that was left behind."""

    order_id: str
    step: Step
    payment_id: str
    money: Money
    dispatch_began: bool


class LeftBehind:
    """What a pass works through. Keyset pages by order id."""

    def __init__(self, pool: asyncpg.Pool) -> None:
        self._pool = pool

    async def open_orders(self, after: str, seconds: float, limit: int) -> list[Left]:
        """Open orders that have not moved for so many seconds."""
        return _left(await self._pool.fetch(_OPEN, after, list(FINAL_STEPS), seconds, limit))

    async def in_doubt(self, after: str, seconds: float, limit: int) -> list[Left]:
        """Orders closed for so many seconds, of whose payment nobody knows yet whether it went through."""
        return _left(await self._pool.fetch(_IN_DOUBT, after, list(FINAL_STEPS), seconds, limit))

    async def tell(self, order_id: str, payload: dict[str, Any], key: str) -> None:
        """The event `reconciled`, before anything is done: whatever a repair has begun, the timeline says so."""
        await events.record(self._pool, order_id, "reconciled", payload, key=key)

    async def charged_late(self, left: Left, receipt: Receipt) -> None:
        """The charge of a closed order went through after all; it is still to be given back."""
        payload = {"found": "a charge after the order was closed", "reference": receipt.reference}
        async with self._pool.acquire() as connection, connection.transaction():
            await events.record(connection, left.order_id, "reconciled", payload, key="reconciled:payment")
            await mark_charged(connection, left.payment_id, receipt)

    async def never_charged(self, left: Left) -> None:
        """The charge of a closed order did not go through."""
        payload = {"found": "no charge at the provider"}
        async with self._pool.acquire() as connection, connection.transaction():
            await events.record(connection, left.order_id, "reconciled", payload, key="reconciled:payment")
            await mark_failed(connection, left.payment_id)

    async def payment_owner(self, payment_id: str) -> str | None:
        """The order that has claimed this payment id."""
        owner: str | None = await self._pool.fetchval(_OWNER, payment_id)
        return owner


def _left(rows: list[asyncpg.Record]) -> list[Left]:
    return [
        Left(
            order_id=row["id"],
            step=Step(row["state"]),
            payment_id=row["payment_id"],
            money=Money(amount=row["total"], currency=row["currency"]),
            dispatch_began=row["dispatch_started_at"] is not None,
        )
        for row in rows
    ]
