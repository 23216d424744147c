"""Moving money: claim, ask the provider, write down. No transaction is open while the provider is asked."""

from __future__ import annotations

from typing import TYPE_CHECKING

from temporalio import activity

from app.errors import IllegalTransition, PaymentConflict, PaymentDeclined, RefundRefused
from app.failpoints import reach
from app.payment.gateway import Receipt
from app.payment.models import ChargeRequest, RefundRequest

if TYPE_CHECKING:
    from app.payment.gateway import PaymentGateway
    from app.payment.repository import PaymentRepository


class PaymentActivities:
    """`charge` and `refund`, each safe to repeat from any point at which it can break off."""

    def __init__(self, payments: PaymentRepository, gateway: PaymentGateway) -> None:
        self._payments = payments
        self._gateway = gateway

    @activity.defn
    async def charge(self, request: ChargeRequest) -> Receipt:
        """Take the money once, whatever crashes: a repeat asks the provider with the same idempotency key.

        Raises:
            PaymentDeclined: the provider said no; the order is `payment_failed`.
            PaymentConflict: the payment id belongs to another order or amount, here or at the provider; likewise.
            PaymentUnavailable: no answer; the order stays `charging` and the attempt is repeated.
            IllegalTransition: the order was closed meanwhile; what was taken is given back.
        """
        reach("charge.before_claim")
        charged_before = await self._payments.begin_charge(request)
        if charged_before:
            reach("charge.before_reply")
            return charged_before
        reach("charge.before_gateway")
        try:
            receipt = await self._gateway.charge(request.payment_id, request.money)
        except (PaymentDeclined, PaymentConflict) as refused:
            await self._payments.fail_charge(request, str(refused))
            reach("charge.before_reply")
            raise
        reach("charge.after_gateway")
        try:
            await self._payments.complete_charge(request, receipt)
        except IllegalTransition:
            await self._give_back_late(request, receipt)
            raise
        reach("charge.before_reply")
        return receipt

    async def _give_back_late(self, request: ChargeRequest, receipt: Receipt) -> None:
        """The order was closed without this charge while the provider was asked: the attempt had been taken for dead.
        Only this process knows of the money for certain, so it gives it back; failing that, `reconcile` will."""
        if await self._payments.is_closed(request.order_id):
            refund = await self._gateway.refund(request.payment_id, receipt.money)
            await self._payments.complete_late(request.order_id, request.payment_id, receipt, refund)

    @activity.defn
    async def refund(self, request: RefundRequest) -> None:
        """Give the money back once and close the order.

        Raises:
            PaymentUnavailable, RefundRefused: the order keeps its step and the attempt is repeated.
            TooLate: the order was shipped in the meantime.
            PaymentConflict: our books have no charge to give back.
        """
        reach("refund.before_check")
        if not await self._payments.begin_refund(request):
            return
        reach("refund.before_gateway")
        try:
            receipt = await self._gateway.refund(request.payment_id, request.money)
        except PaymentConflict as refused:
            raise RefundRefused(refused.detail) from refused
        reach("refund.after_gateway")
        await self._payments.complete_refund(request, receipt)
        reach("refund.before_reply")
