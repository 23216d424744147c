"""Orders in PostgreSQL: one literal statement per method, and nothing decided here."""

from __future__ import annotations

import base64
import binascii
from datetime import UTC, datetime
from typing import TYPE_CHECKING, NoReturn

from pydantic import AwareDatetime, RootModel

from app.db import timeline
from app.domain.money import Money, fit
from app.domain.steps import FINAL_STEPS, Step
from app.errors import InvalidRequest, OrderRejected
from app.failpoints import reach
from app.order.models import (
    AddressChange,
    CloseOrder,
    Event,
    Events,
    Item,
    NoteRequest,
    OrderId,
    OrderInput,
    OrderPage,
    OrderStatus,
    OrderSummary,
    OrderView,
    PaymentView,
    ReopenReview,
    ReviewDecision,
    ReviewPage,
    ReviewTask,
    address_digest,
    approval_digest,
    order_workflow_id,
)
from app.shipping.models import Address
from app.telemetry import metrics, traces

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

_OPEN_REVIEW = timeline.moving(
    sets=", review_deadline = clock_timestamp() + make_interval(secs => $6)",
    when="NOT EXISTS (SELECT FROM payments WHERE payment_id = $7 AND order_id <> $1)",
)

# By the step of the locked row, which is as new as can be: a charge that is written down while this waits for the lock
# is in no snapshot of the table of payments. That is asked all the same, as money would be kept for nothing.
_CLOSE = timeline.moving(
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

# Once per key, whatever has become of the order since.
_REOPEN_REVIEW = """
WITH known AS (
    SELECT id FROM orders WHERE id = $1 FOR NO KEY UPDATE
), told AS (
    INSERT INTO events (order_id, type, payload_json, key) SELECT id, 'review_reopened', $2, $3 FROM known
    ON CONFLICT (order_id, key) DO NOTHING RETURNING order_id
)
UPDATE orders SET reopened_for = 'address', review_deadline = clock_timestamp() + make_interval(secs => $4)
FROM told WHERE orders.id = told.order_id
"""

_SETTLE_REVIEW = """
WITH known AS (
    SELECT id FROM orders WHERE id = $1 FOR NO KEY UPDATE
), told AS (
    INSERT INTO events (order_id, type, payload_json, key) SELECT id, 'review_decided', $2, $3 FROM known
    ON CONFLICT (order_id, key) DO NOTHING RETURNING order_id
)
UPDATE orders SET reopened_for = NULL FROM told WHERE orders.id = told.order_id
"""

_DECIDED = "SELECT type FROM events WHERE order_id = $1 AND key = $2"

_FIND_START = """
SELECT id, request_hash, run_id FROM orders WHERE id = $1 OR payment_id = $2 ORDER BY id <> $1 LIMIT 1
"""

_ADDRESS_CHANGES = "SELECT count(*) FROM events WHERE order_id = $1 AND type = 'address_changed'"

_STATUS = "SELECT state, last_error FROM orders WHERE id = $1"

_VIEW = """
SELECT orders.*, payments.payment_id AS paid_with, payments.status, payments.amount, payments.provider_reference,
       payments.created_at AS payment_created_at,
       (SELECT payload_json ->> 'note' FROM events
        WHERE order_id = orders.id AND key IN ('charging', 'rejected') AND payload_json ? 'note') AS review_note,
       (SELECT payload_json ->> 'reason' FROM events WHERE order_id = orders.id AND key = state) AS reason
FROM orders LEFT JOIN payments ON payments.order_id = orders.id
WHERE orders.id = $1
"""

_NEWEST = """
SELECT * FROM orders
WHERE ($1::text IS NULL OR state = $1) AND ($2::timestamptz IS NULL OR (created_at, id) < ($2, $3))
ORDER BY created_at DESC, id DESC LIMIT $4
"""

_NEWEST_OF_CUSTOMER = """
SELECT * FROM orders
WHERE customer_id = $5
  AND ($1::text IS NULL OR state = $1) AND ($2::timestamptz IS NULL OR (created_at, id) < ($2, $3))
ORDER BY created_at DESC, id DESC LIMIT $4
"""

# Few orders are `charged` at any moment, so that index needs no condition of its own for the second reviews.
_IN_REVIEW = """
SELECT waiting.*, earlier.orders AS earlier_orders
FROM (
    (
        SELECT * FROM orders
        WHERE state = 'awaiting_review' AND ($1::timestamptz IS NULL OR (review_deadline, id) > ($1, $2))
        ORDER BY review_deadline, id LIMIT $3
    ) UNION ALL (
        SELECT * FROM orders
        WHERE state = 'charged' AND reopened_for IS NOT NULL
          AND ($1::timestamptz IS NULL OR (review_deadline, id) > ($1, $2))
        ORDER BY review_deadline, id LIMIT $3
    )
    ORDER BY review_deadline, id LIMIT $3
) AS waiting
LEFT JOIN LATERAL (
    SELECT count(*) AS orders FROM (
        SELECT FROM orders AS past
        WHERE past.customer_id = waiting.customer_id AND (past.created_at, past.id) < (waiting.created_at, waiting.id)
        ORDER BY past.created_at DESC, past.id DESC LIMIT 100
    ) AS counted
) AS earlier ON waiting.customer_id IS NOT NULL
ORDER BY review_deadline, id
"""

_EVENTS = "SELECT id, type, ts, payload_json FROM events WHERE order_id = $1 AND id > $2 ORDER BY id"

_EVENTS_OF_MANY = """
SELECT events.id, events.order_id, type, ts, payload_json
FROM unnest($1::text[], $2::bigint[]) AS watched (order_id, seen)
JOIN events ON events.order_id = watched.order_id AND events.id > watched.seen
ORDER BY events.id
"""
_ENDED_OF = "SELECT id FROM orders WHERE id = ANY($1) AND state = ANY($2)"


class OrderRepository:
    """The table `orders` and its timeline."""

    def __init__(self, pool: asyncpg.Pool) -> None:
        self._pool = pool

    # --- what activities change

    async def receive(self, order: OrderInput, run_id: str) -> None:
        """Write the order down, at `received`. A repeat changes nothing."""
        request, total = order.request, order.total
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
            traces.trace_id(),
        )
        if status == "INSERT 0 1":
            metrics.order_received()

    async def open_review(self, order: OrderInput) -> None:
        """Enter `awaiting_review`, with its deadline.

        Raises:
            OrderRejected: the payment id belongs to another order; the order has entered `rejected`.
        """
        payment_id, seconds = order.request.payment_id, order.review_timeout_seconds
        move = await timeline.try_to_enter(
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
            await self.reject(order.order_id, f"{payment_id} belongs to another order")
        await timeline.require_entered(self._pool, order.order_id, Step.AWAITING_REVIEW)

    async def reject(self, order_id: str, reason: str) -> NoReturn:
        """Enter `rejected`, and say so.

        Raises:
            OrderRejected: always.
        """
        move = await timeline.enter(self._pool, order_id, Step.REJECTED, {"reason": reason}, error=reason)
        metrics.entered(Step.REJECTED, move)
        raise OrderRejected(reason)

    async def close(self, request: CloseOrder, *, charging: bool = True) -> None:
        """Enter a final step without a charge.

        Args:
            charging: whether also an order may be closed whose charge has begun, and is known to lead to nothing.

        Raises:
            IllegalTransition: the order is charged: it ends by its shipment or by a refund.
        """
        payload = {"reason": request.reason} | ({"note": request.note} if request.note else {})
        move = await timeline.enter(
            self._pool, request.order_id, request.step, payload, by=_CLOSE, arguments=(charging,)
        )
        metrics.entered(request.step, move)

    async def change_address(self, change: AddressChange, key: str) -> bool:
        """Whether the address was taken: until `dispatch` starts, while the order is open.

        Decided once per `key`: a repeat gets the first answer, and an attempt that was taken for dead and comes back
        late does not undo a newer change.
        """
        async with self._pool.acquire() as connection, connection.transaction():
            await timeline.lock(connection, change.order_id)
            event = await connection.fetchval(_DECIDED, change.order_id, key)
            if event is None:
                status = await connection.execute(
                    _CHANGE_ADDRESS, change.order_id, change.address.model_dump(), list(FINAL_STEPS)
                )
                reach("change_address.in_transaction")
                event = "address_changed" if status == "UPDATE 1" else "address_refused"
                payload = _changed(change) if event == "address_changed" else {}
                await timeline.record(connection, change.order_id, event, payload, key=key)
        return bool(event == "address_changed")

    async def reopen_review(self, request: ReopenReview, key: str) -> None:
        """Put the order back into the queue of reviews, with a new deadline, at the step where it is."""
        seconds = request.review_timeout_seconds
        payload = {"changed": "address", "review_timeout_seconds": seconds, "digest": request.digest}
        await self._pool.execute(_REOPEN_REVIEW, request.order_id, payload, key, float(seconds))

    async def settle_review(self, decision: ReviewDecision, key: str) -> None:
        """Take the order out of it again."""
        note = {"note": decision.note} if decision.note else {}
        payload = {"decision": decision.decision, "digest": decision.digest, **note}
        await self._pool.execute(_SETTLE_REVIEW, decision.order_id, payload, key)

    async def note(self, note: NoteRequest, key: str) -> None:
        """Add to the timeline what did not change the order."""
        await timeline.record(self._pool, note.order_id, note.type, note.payload, key=key)

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

    async def address_changes(self, order_id: str) -> int:
        """How often the address was changed so far."""
        changes: int = await self._pool.fetchval(_ADDRESS_CHANGES, order_id)
        return changes

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
            reopened_for=row["reopened_for"] if row["state"] == Step.CHARGED else None,
            digest=_digest(row),
            tracking=row["tracking"],
            payment=row["paid_with"] and _payment(row),
            trace_id=row["trace_id"],
            review_note=row["review_note"],
            reason=row["reason"],
        )

    async def newest(
        self, step: Step | None, after: str | None, limit: int, customer_id: str | None = None
    ) -> OrderPage:
        """A page of orders, newest first; of one step, one customer, or both."""
        created_at, order_id = _parse_cursor(after)
        if customer_id is None:
            rows = await self._pool.fetch(_NEWEST, step, created_at, order_id, limit + 1)
        else:
            rows = await self._pool.fetch(_NEWEST_OF_CUSTOMER, step, created_at, order_id, limit + 1, customer_id)
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

    async def ended_of(self, order_ids: list[str]) -> list[str]:
        """Those of the orders that have ended."""
        rows = await self._pool.fetch(_ENDED_OF, order_ids, list(FINAL_STEPS))
        return [row["id"] for row in rows]


def _summary(row: asyncpg.Record) -> OrderSummary:
    return OrderSummary(
        order_id=row["id"],
        step=row["state"],
        last_error=row["last_error"],
        payment_id=row["payment_id"],
        total=fit(row["total"], row["currency"]),
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
        amount=fit(row["amount"], row["currency"]),
        provider_reference=row["provider_reference"],
        created_at=row["payment_created_at"],
    )


def _review_task(row: asyncpg.Record) -> ReviewTask:
    return ReviewTask(
        order_id=row["id"],
        review_deadline=row["review_deadline"],
        seconds_left=round((row["review_deadline"] - datetime.now(UTC)).total_seconds(), 1),
        total=fit(row["total"], row["currency"]),
        currency=row["currency"],
        items=row["items_json"],
        customer_id=row["customer_id"],
        payment_id=row["payment_id"],
        earlier_orders=row["earlier_orders"],
        created_at=row["created_at"],
        reopened_for=row["reopened_for"],
        digest=_digest(row),
    )


def _digest(row: asyncpg.Record) -> str:
    address = row["address_json"]
    return approval_digest(
        row["id"],
        row["payment_id"],
        [Item.model_validate(item) for item in row["items_json"]],
        Money(amount=row["total"], currency=row["currency"]),
        Address.model_validate(address) if address else None,
    )


def _changed(change: AddressChange) -> dict[str, str]:
    """What the timeline says of a new address: not the address itself, which it would keep for ever."""
    digest = {"digest": change.digest} if change.digest else {}
    return {"address": address_digest(change.order_id, change.address), **digest}


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
