"""Orders in PostgreSQL: one literal statement per method, and nothing decided here."""

from __future__ import annotations

import base64
import binascii
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from pydantic import AwareDatetime, RootModel

from app import events, metrics, tracing
from app.errors import InvalidRequest, OrderRejected
from app.failpoints import reach
from app.money import quantize
from app.order.models import (
    AddressChange,
    CloseOrder,
    Event,
    Events,
    NoteRequest,
    OrderId,
    OrderInput,
    OrderPage,
    OrderStatus,
    OrderSummary,
    OrderView,
    PaymentView,
    ReviewPage,
    ReviewTask,
    order_workflow_id,
)
from app.steps import FINAL_STEPS, Step

if TYPE_CHECKING:
    import asyncpg

_RECEIVE = """
WITH received AS (
    INSERT INTO orders
        (id, state, payment_id, request_hash, run_id, customer_id, items_json, total, currency, address_json, trace_id)
    VALUES ($1, 'received', $2, $3, $4, $5, $6, $7, $8, $9, $11)
    ON CONFLICT (id) DO NOTHING
    RETURNING id
)
INSERT INTO events (order_id, type, payload_json, key) SELECT id, 'received', $10, 'received' FROM received
"""

_OPEN_REVIEW = events.moving(
    sets=", review_deadline = clock_timestamp() + make_interval(secs => $6)",
    when="NOT EXISTS (SELECT FROM payments WHERE payment_id = $7 AND order_id <> $1)",
)

# By the step of the locked row, which is as new as can be: a charge that is written down while this waits for the lock
# is in no snapshot of the table of payments. That is asked all the same, as money would be kept for nothing.
_CLOSE = events.moving(
    when="""was.state IN ('received', 'awaiting_review', CASE WHEN $6 THEN 'charging' END)
      AND NOT EXISTS (SELECT FROM payments WHERE order_id = $1 AND status IN ('CHARGED', 'REFUNDED'))"""
)

_PAYMENT_OWNER = """
SELECT order_id FROM payments WHERE payment_id = $1 AND order_id <> $2
"""

_CHANGE_ADDRESS = """
UPDATE orders SET address_json = $2
WHERE id = $1 AND dispatch_started_at IS NULL AND NOT (state = ANY($3))
"""

_DECIDED = "SELECT type FROM events WHERE order_id = $1 AND key = $2"

_FIND_START = """
SELECT id, request_hash, run_id FROM orders WHERE id = $1 OR payment_id = $2 ORDER BY id <> $1 LIMIT 1
"""

_STATUS = "SELECT state, last_error FROM orders WHERE id = $1"

_VIEW = """
SELECT orders.*, payments.payment_id AS paid_with, payments.status, payments.amount, payments.provider_reference,
       payments.created_at AS payment_created_at
FROM orders LEFT JOIN payments ON payments.order_id = orders.id
WHERE orders.id = $1
"""

_NEWEST = """
SELECT * FROM orders
WHERE ($1::text IS NULL OR state = $1) AND ($2::timestamptz IS NULL OR (created_at, id) < ($2, $3))
ORDER BY created_at DESC, id DESC LIMIT $4
"""

_IN_REVIEW = """
SELECT * FROM orders
WHERE state = 'awaiting_review' AND ($1::timestamptz IS NULL OR (review_deadline, id) > ($1, $2))
ORDER BY review_deadline, id LIMIT $3
"""

_EVENTS = "SELECT id, type, ts, payload_json FROM events WHERE order_id = $1 AND id > $2 ORDER BY id"

_EVENTS_OF_MANY = """
SELECT events.id, events.order_id, type, ts, payload_json
FROM unnest($1::text[], $2::bigint[]) AS watched (order_id, seen)
JOIN events ON events.order_id = watched.order_id AND events.id > watched.seen
ORDER BY events.id
"""


class OrderRepository:
    """The table `orders` and its timeline."""

    def __init__(self, pool: asyncpg.Pool) -> None:
        self._pool = pool

    # --- what activities change

    async def receive(self, order: OrderInput, run_id: str) -> None:
        """Write the order down, at `received`. A repeat changes nothing."""
        request, total = order.request, order.request.total
        status = await self._pool.execute(
            _RECEIVE,
            order.order_id,
            request.payment_id,
            request.fingerprint,
            run_id,
            request.customer_id,
            [item.model_dump(mode="json") for item in request.items],
            total.amount,
            total.currency,
            request.address.model_dump() if request.address else None,
            {"payment_id": request.payment_id, "amount": str(total.amount), "currency": total.currency},
            tracing.trace_id(),
        )
        if status == "INSERT 0 1":
            metrics.order_received()

    async def open_review(self, order: OrderInput) -> None:
        """Enter `awaiting_review`, with its deadline.

        Raises:
            OrderRejected: the payment id belongs to another order; the order has entered `rejected`.
        """
        payment_id, seconds = order.request.payment_id, order.review_timeout_seconds
        move = await events.try_to_enter(
            self._pool,
            order.order_id,
            Step.AWAITING_REVIEW,
            {"review_timeout_seconds": seconds},
            by=_OPEN_REVIEW,
            arguments=(float(seconds), payment_id),
        )
        metrics.entered(Step.AWAITING_REVIEW, move)
        if move:
            return
        if await self._pool.fetchval(_PAYMENT_OWNER, payment_id, order.order_id):
            reason = f"{payment_id} belongs to another order"
            move = await events.enter(self._pool, order.order_id, Step.REJECTED, {"reason": reason}, error=reason)
            metrics.entered(Step.REJECTED, move)
            raise OrderRejected(reason)
        await events.require_entered(self._pool, order.order_id, Step.AWAITING_REVIEW)

    async def close(self, request: CloseOrder, *, charging: bool = True) -> None:
        """Enter a final step without a charge.

        Args:
            charging: whether also an order may be closed whose charge has begun, and is known to lead to nothing.

        Raises:
            IllegalTransition: the order is charged: it ends by its shipment or by a refund.
        """
        payload = {"reason": request.reason} | ({"note": request.note} if request.note else {})
        move = await events.enter(self._pool, request.order_id, request.step, payload, by=_CLOSE, arguments=(charging,))
        metrics.entered(request.step, move)

    async def change_address(self, change: AddressChange, key: str) -> bool:
        """Whether the address was taken: until `dispatch` starts, while the order is open.

        Decided once per `key`: a repeat gets the first answer, and an attempt that was taken for dead and comes back
        late does not undo a newer change.
        """
        async with self._pool.acquire() as connection, connection.transaction():
            await events.lock(connection, change.order_id)
            event = await connection.fetchval(_DECIDED, change.order_id, key)
            if event is None:
                status = await connection.execute(
                    _CHANGE_ADDRESS, change.order_id, change.address.model_dump(), list(FINAL_STEPS)
                )
                reach("change_address.in_transaction")
                event = "address_changed" if status == "UPDATE 1" else "address_refused"
                await events.record(connection, change.order_id, event, {}, key=key)
        return bool(event == "address_changed")

    async def note(self, note: NoteRequest, key: str) -> None:
        """Add to the timeline what did not change the order."""
        await events.record(self._pool, note.order_id, note.type, note.payload, key=key)

    # --- what the API reads

    async def find_start(self, order_id: str, payment_id: str) -> asyncpg.Record | None:
        """The order with this id, else one with this payment id: `id`, `request_hash`, `run_id`."""
        return await self._pool.fetchrow(_FIND_START, order_id, payment_id)

    async def status(self, order_id: str) -> OrderStatus | None:
        """Step and last error, from one indexed row."""
        row = await self._pool.fetchrow(_STATUS, order_id)
        if row is None:
            return None
        return OrderStatus(order_id=order_id, step=row["state"], last_error=row["last_error"])

    async def view(self, order_id: str) -> OrderView | None:
        """All of an order."""
        row = await self._pool.fetchrow(_VIEW, order_id)
        if row is None:
            return None
        return OrderView(
            **_summary(row).model_dump(),
            workflow_id=order_workflow_id(order_id),
            run_id=row["run_id"],
            items=row["items_json"],
            address=row["address_json"],
            review_deadline=row["review_deadline"],
            tracking=row["tracking"],
            payment=row["paid_with"] and _payment(row),
            trace_id=row["trace_id"],
        )

    async def newest(self, step: Step | None, after: str | None, limit: int) -> OrderPage:
        """A page of orders, newest first."""
        created_at, order_id = _parse_cursor(after)
        rows = await self._pool.fetch(_NEWEST, step, created_at, order_id, limit + 1)
        return OrderPage(
            orders=[_summary(row) for row in rows[:limit]],
            next=_cursor(rows[limit - 1], "created_at") if len(rows) > limit else None,
        )

    async def in_review(self, after: str | None, limit: int) -> ReviewPage:
        """A page of the clerk's queue, most urgent first."""
        deadline, order_id = _parse_cursor(after)
        rows = await self._pool.fetch(_IN_REVIEW, deadline, order_id, limit + 1)
        return ReviewPage(
            reviews=[_review_task(row) for row in rows[:limit]],
            next=_cursor(rows[limit - 1], "review_deadline") if len(rows) > limit else None,
        )

    async def events(self, order_id: str, after: int = 0) -> Events:
        """The timeline of one order, past event `after`."""
        rows = await self._pool.fetch(_EVENTS, order_id, after)
        return Events(events=[_event(row) for row in rows])

    async def events_of_many(self, seen: dict[str, int]) -> list[tuple[str, Event]]:
        """What is new in several timelines at once, each past its own last seen event."""
        rows = await self._pool.fetch(_EVENTS_OF_MANY, list(seen), list(seen.values()))
        return [(row["order_id"], _event(row)) for row in rows]


def _summary(row: asyncpg.Record) -> OrderSummary:
    return OrderSummary(
        order_id=row["id"],
        step=row["state"],
        last_error=row["last_error"],
        payment_id=row["payment_id"],
        total=quantize(row["total"], row["currency"]),
        currency=row["currency"],
        customer_id=row["customer_id"],
        created_at=row["created_at"],
        step_since=row["state_since"],
    )


def _payment(row: asyncpg.Record) -> PaymentView:
    return PaymentView(
        payment_id=row["paid_with"],
        status=row["status"],
        # A column of all currencies has two digits for each.
        amount=quantize(row["amount"], row["currency"]),
        provider_reference=row["provider_reference"],
        created_at=row["payment_created_at"],
    )


def _review_task(row: asyncpg.Record) -> ReviewTask:
    return ReviewTask(
        order_id=row["id"],
        review_deadline=row["review_deadline"],
        seconds_left=round((row["review_deadline"] - datetime.now(UTC)).total_seconds(), 1),
        total=quantize(row["total"], row["currency"]),
        currency=row["currency"],
        items=row["items_json"],
        customer_id=row["customer_id"],
        created_at=row["created_at"],
    )


def _event(row: asyncpg.Record) -> Event:
    return Event(id=row["id"], type=row["type"], ts=row["ts"], payload=row["payload_json"])


# --- keyset cursors: where a page ended, opaque to the caller


class _Position(RootModel[tuple[AwareDatetime, OrderId]]):
    """The sort key of the last row of a page."""


def _cursor(row: asyncpg.Record, column: str) -> str:
    return base64.urlsafe_b64encode(_Position((row[column], row["id"])).model_dump_json().encode()).decode()


def _parse_cursor(after: str | None) -> tuple[datetime | None, str | None]:
    if after is None:
        return None, None
    try:
        moment, order_id = _Position.model_validate_json(base64.urlsafe_b64decode(after)).root
        # In UTC, as the driver will want it: the first and the last day of the calendar overflow.
        return moment.astimezone(UTC), order_id
    except (ValueError, OverflowError, binascii.Error) as error:
        raise InvalidRequest("after: not a cursor from an earlier page") from error
