"""Payments in PostgreSQL. Each method is one transaction; no provider is called while one is open.

Every transaction locks the order before the payment, so that no two ever wait for each other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from app.db import timeline
from app.domain.money import Money
from app.domain.steps import FINAL_STEPS, PaymentStatus, Step
from app.errors import PaymentConflict, PaymentDeclined, TooLate, TrellisError
from app.failpoints import reach
from app.payment.gateway import Receipt
from app.payment.models import ChargeRequest, RefundRequest
from app.telemetry import metrics

if TYPE_CHECKING:
    import asyncpg

    from app.db.pool import Connection

# The usual claim, in one statement: the id is new, and the order at its step.
_CLAIM_AND_ENTER = timeline.moving(
    before="""claimed AS (
    INSERT INTO payments (payment_id, order_id, status, amount, asked, currency)
    SELECT $6, id, 'INIT', 0, $7, $8 FROM was WHERE state = ANY($3)
    ON CONFLICT DO NOTHING RETURNING payment_id
)""",
    when="EXISTS (SELECT FROM claimed)",
)

_CLAIM = """
INSERT INTO payments (payment_id, order_id, status, amount, asked, currency) VALUES ($1, $2, 'INIT', 0, $3, $4)
ON CONFLICT DO NOTHING
"""

_LOOK = """
SELECT payments.order_id, status, amount, asked, payments.currency, provider_reference, orders.state
FROM payments JOIN orders ON orders.id = payments.order_id
WHERE payments.payment_id = $1
"""

_LOCK = f"{_LOOK}FOR NO KEY UPDATE OF payments"

_CHARGED = """
UPDATE payments SET status = 'CHARGED', amount = $2, provider_reference = $3, settled_at = clock_timestamp()
WHERE payment_id = $1 AND status = 'INIT'
"""

_SETTLE_AND_ENTER = timeline.moving(
    after="""settled AS (
    UPDATE payments SET status = 'CHARGED', amount = $7, provider_reference = $8, settled_at = clock_timestamp()
    FROM moved WHERE payment_id = $6 AND status = 'INIT'
)"""
)

_FAILED = """
UPDATE payments SET status = 'FAILED', settled_at = clock_timestamp() WHERE payment_id = $1 AND status = 'INIT'
"""

_REFUNDED = """
UPDATE payments SET status = 'REFUNDED', refund_reference = $2, settled_at = clock_timestamp()
WHERE payment_id = $1 AND status = 'CHARGED'
"""


class PaymentRepository:
    """The table `payments`, and the steps of an order that go with it."""

    def __init__(self, pool: asyncpg.Pool) -> None:
        self._pool = pool

    async def begin_charge(self, request: ChargeRequest) -> Receipt | None:
        """Claim the payment id for this order and amount, and enter `charging`. The receipt, if it is charged.

        Raises:
            PaymentConflict: the id belongs to another order or amount; the order has entered `payment_failed`.
            PaymentDeclined: the charge was declined in an earlier attempt; likewise.
        """
        note = {"note": request.approval_note} if request.approval_note else {}
        approved = {"digest": request.approved} if request.approved else {}
        payload = {"payment_id": request.payment_id, **approved, **note}
        money = request.money
        move = await timeline.try_to_enter(
            self._pool,
            request.order_id,
            Step.CHARGING,
            payload,
            by=_CLAIM_AND_ENTER,
            arguments=(request.payment_id, money.amount, money.currency),
        )
        if move:
            metrics.payment_entered(PaymentStatus.INIT)
            metrics.entered(Step.CHARGING, move)
            return None
        return await self._resume_charge(request, payload)

    async def _resume_charge(self, request: ChargeRequest, payload: dict[str, Any]) -> Receipt | None:
        """`begin_charge` where the id is known already: from an earlier attempt, or from somebody else's."""
        async with self._pool.acquire() as connection, connection.transaction():
            # Order before payment, as everywhere: who waits for whom is never a circle.
            await timeline.lock(connection, request.order_id)
            claimed = await connection.execute(
                _CLAIM, request.payment_id, request.order_id, request.money.amount, request.money.currency
            )
            payment = await connection.fetchrow(_LOCK, request.payment_id)
            refusal = _refusal(payment, request)
            charging = await timeline.enter(connection, request.order_id, Step.CHARGING, payload)
            failed = await _close_unpaid(connection, request, str(refusal)) if refusal else None
        if claimed == "INSERT 0 1":
            metrics.payment_entered(PaymentStatus.INIT)
        metrics.entered(Step.CHARGING, charging)
        metrics.entered(Step.PAYMENT_FAILED, failed)
        if refusal:
            raise refusal
        return _receipt(payment) if payment and payment["status"] == PaymentStatus.CHARGED else None

    async def complete_charge(self, request: ChargeRequest, receipt: Receipt) -> None:
        """Write down what was charged, and enter `charged`."""
        money = receipt.money
        move = await timeline.enter(
            self._pool,
            request.order_id,
            Step.CHARGED,
            {"payment_id": request.payment_id, "reference": receipt.reference, **_told(money)},
            by=_SETTLE_AND_ENTER,
            arguments=(request.payment_id, money.amount, receipt.reference),
        )
        if move:
            metrics.payment_entered(PaymentStatus.CHARGED)
            metrics.entered(Step.CHARGED, move)

    async def fail_charge(self, request: ChargeRequest, reason: str) -> None:
        """Write down that the provider declined, and enter `payment_failed`."""
        async with self._pool.acquire() as connection, connection.transaction():
            move = await _close_unpaid(connection, request, reason)
            reach("charge.in_settlement")
            settled = await mark_failed(connection, request.payment_id)
        _count(settled, PaymentStatus.FAILED)
        metrics.entered(Step.PAYMENT_FAILED, move)

    async def begin_refund(self, request: RefundRequest) -> bool:
        """Whether there is still something to give back. Only a look: what is true when the provider has answered, and
        that it is written down once, `complete_refund` sees to.

        Raises:
            TooLate: the order was shipped.
            PaymentConflict: there is no charge to give back.
        """
        payment = await self._pool.fetchrow(_LOOK, request.payment_id)
        if payment is None or payment["order_id"] != request.order_id:
            raise PaymentConflict(f"{request.payment_id} has no charge for order {request.order_id}")
        if payment["state"] == Step.SHIPPED:
            raise TooLate(f"{request.order_id} was shipped; nothing is refunded")
        if payment["status"] not in {PaymentStatus.CHARGED, PaymentStatus.REFUNDED}:
            raise PaymentConflict(f"{request.payment_id} is {payment['status']}, not charged")
        return bool(payment["status"] == PaymentStatus.CHARGED)

    async def complete_refund(self, request: RefundRequest, receipt: Receipt) -> None:
        """Write down what was given back, and close the order."""
        async with self._pool.acquire() as connection, connection.transaction():
            await _tell_refund(connection, request.order_id, request.payment_id, receipt)
            reach("refund.in_settlement")
            settled = await connection.execute(_REFUNDED, request.payment_id, receipt.reference)
            failed = request.close_as is Step.SHIPPING_FAILED
            move = await timeline.enter(
                connection,
                request.order_id,
                request.close_as,
                {"reason": request.reason},
                error=request.reason if failed else None,
            )
        _count(settled, PaymentStatus.REFUNDED)
        metrics.entered(request.close_as, move)

    async def is_closed(self, order_id: str) -> bool:
        """Whether the order has come to its end."""
        state = await self._pool.fetchval("SELECT state FROM orders WHERE id = $1", order_id)
        return state in FINAL_STEPS

    async def complete_late(self, order_id: str, payment_id: str, charge: Receipt, refund: Receipt) -> None:
        """Write down a charge that came through after its order was closed, together with its refund: until then the
        payment stays in doubt, so that nobody takes the matter for settled.

        A payment that was given up as FAILED stays so; the timeline tells of the refund.
        """
        async with self._pool.acquire() as connection, connection.transaction():
            await _tell_refund(connection, order_id, payment_id, refund)
            await mark_charged(connection, payment_id, charge)
            settled = await connection.execute(_REFUNDED, payment_id, refund.reference)
        _count(settled, PaymentStatus.REFUNDED)


async def mark_charged(connection: Connection, payment_id: str, receipt: Receipt) -> None:
    """INIT becomes CHARGED, with what the provider said."""
    await connection.execute(_CHARGED, payment_id, receipt.money.amount, receipt.reference)


async def mark_failed(connection: Connection, payment_id: str) -> str:
    """INIT becomes FAILED; the command tag tells whether it was INIT."""
    return await connection.execute(_FAILED, payment_id)


async def _tell_refund(connection: Connection, order_id: str, payment_id: str, receipt: Receipt) -> None:
    payload = {"payment_id": payment_id, "reference": receipt.reference, **_told(receipt.money)}
    await timeline.record(connection, order_id, "refunded", payload, key="refunded")


def _refusal(payment: asyncpg.Record | None, request: ChargeRequest) -> TrellisError | None:
    if payment is None:
        return PaymentConflict(f"order {request.order_id} already has another payment")
    if payment["order_id"] != request.order_id:
        return PaymentConflict(f"{request.payment_id} belongs to another order")
    if (payment["asked"], payment["currency"]) != (request.money.amount, request.money.currency):
        return PaymentConflict(f"{request.payment_id} was used for another amount")
    if payment["status"] == PaymentStatus.FAILED:
        return PaymentDeclined(f"{request.payment_id} was declined before")
    if payment["status"] == PaymentStatus.REFUNDED:
        return PaymentConflict(f"{request.payment_id} was refunded")
    return None


async def _close_unpaid(connection: Connection, request: ChargeRequest, reason: str) -> timeline.Move | None:
    payload = {"payment_id": request.payment_id, "reason": reason}
    return await timeline.enter(connection, request.order_id, Step.PAYMENT_FAILED, payload, error=reason)


def _count(updated: str, status: PaymentStatus) -> None:
    if updated == "UPDATE 1":
        metrics.payment_entered(status)


def _receipt(payment: asyncpg.Record) -> Receipt:
    money = Money(amount=payment["amount"], currency=payment["currency"])
    return Receipt(reference=payment["provider_reference"], money=money)


def _told(money: Money) -> dict[str, str]:
    return {"amount": str(money.amount), "currency": money.currency}
