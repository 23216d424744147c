"""Orders and payments that were left behind, and the two repairs that no feature has a use for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from app.db import timeline
from app.domain.money import Money
from app.domain.steps import FINAL_STEPS, PaymentStatus, Step
from app.payment.repository import mark_failed

if TYPE_CHECKING:
    import asyncpg

# Ids alone: a row that cannot be read must not take its page with it. By the steps that are open, for which there is an
# index: however many orders have ended, the page is short.
_OPEN = """
SELECT id FROM orders
WHERE id > $1 AND state = ANY($2) AND state_since <= clock_timestamp() - make_interval(secs => $3)
ORDER BY id LIMIT $4
"""

_IN_DOUBT = """
SELECT orders.id FROM payments JOIN orders ON orders.id = payments.order_id
WHERE payments.status = 'INIT' AND orders.id > $1 AND orders.state = ANY($2)
  AND state_since <= clock_timestamp() - make_interval(secs => $3)
ORDER BY orders.id LIMIT $4
"""

_LOOK = """
SELECT orders.id, orders.state, orders.payment_id, orders.total, orders.currency, orders.dispatch_started_at,
       orders.run_id, payments.status, extract(epoch FROM clock_timestamp() - orders.state_since)::float8 AS seconds
FROM orders LEFT JOIN payments ON payments.order_id = orders.id
WHERE orders.id = $1
"""

# By the newest orders, for which there is an index. What is settled for so long no look-up that lags can miss.
_KNOWN = """
SELECT payments.payment_id FROM orders JOIN payments ON payments.order_id = orders.id
WHERE payments.status IN ('CHARGED', 'REFUNDED')
  AND payments.settled_at <= clock_timestamp() - make_interval(secs => $1)
ORDER BY orders.created_at DESC, orders.id DESC LIMIT 1
"""

_OWNER = "SELECT order_id FROM payments WHERE payment_id = $1"


@dataclass(frozen=True)
class Left:
    """An order as it is written down at this moment."""

    order_id: str
    step: Step
    #: How long it has been there.
    seconds: float
    run_id: str | None
    payment_id: str
    #: None before a charge has begun.
    payment: PaymentStatus | None
    money: Money
    dispatch_began: bool


class LeftBehind:
    """What a pass works through. Keyset pages by order id."""

    def __init__(self, pool: asyncpg.Pool) -> None:
        self._pool = pool

    async def open_orders(self, after: str, seconds: float, limit: int) -> list[str]:
        """Ids of open orders that have not moved for so many seconds."""
        return _ids(await self._pool.fetch(_OPEN, after, _OPEN_STEPS, seconds, limit))

    async def in_doubt(self, after: str, seconds: float, limit: int) -> list[str]:
        """Ids of orders closed for so many seconds, of whose payment nobody knows yet whether it went through."""
        return _ids(await self._pool.fetch(_IN_DOUBT, after, list(FINAL_STEPS), seconds, limit))

    async def look(self, order_id: str) -> Left | None:
        """The order as it is now; None if it has no row.

        Raises:
            ValidationError, ValueError: somebody wrote a row that is no order.
        """
        row = await self._pool.fetchrow(_LOOK, order_id)
        return _left(row) if row else None

    async def tell(self, order_id: str, payload: dict[str, Any], key: str) -> None:
        """The event `reconciled`, before anything is done: whatever a repair has begun, the timeline says so."""
        await timeline.record(self._pool, order_id, "reconciled", payload, key=key)

    async def never_charged(self, order_id: str, payment_id: str) -> None:
        """The charge of a closed order did not go through. Nothing, if somebody has settled it in the meantime."""
        payload = {"found": "no charge at the provider"}
        async with self._pool.acquire() as connection, connection.transaction():
            await timeline.lock(connection, order_id)
            if await mark_failed(connection, payment_id) == "UPDATE 1":
                await timeline.record(connection, order_id, "reconciled", payload, key="reconciled:payment")

    async def known_charge(self, seconds: float) -> str | None:
        """The payment id of a charge that was written down so many seconds ago; None if there is none."""
        found: str | None = await self._pool.fetchval(_KNOWN, seconds)
        return found

    async def payment_owner(self, payment_id: str) -> str | None:
        """The order that has claimed this payment id."""
        owner: str | None = await self._pool.fetchval(_OWNER, payment_id)
        return owner


_OPEN_STEPS: Final = [step for step in Step if step not in FINAL_STEPS]


def _ids(rows: list[asyncpg.Record]) -> list[str]:
    return [row["id"] for row in rows]


def _left(row: asyncpg.Record) -> Left:
    return Left(
        order_id=row["id"],
        step=Step(row["state"]),
        seconds=row["seconds"],
        run_id=row["run_id"],
        payment_id=row["payment_id"],
        payment=PaymentStatus(row["status"]) if row["status"] else None,
        money=Money(amount=row["total"], currency=row["currency"]),
        dispatch_began=row["dispatch_started_at"] is not None,
    )
