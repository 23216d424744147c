"""Settles what a workflow left behind when it ended by force: terminated, failed, or lost with Temporal's data.

Every repair goes the way the workflow would have gone, through the same activities and repositories, so that it can
be broken off anywhere, repeated, and done by two at once. Nothing is touched that a running workflow may touch.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Final

from temporalio.service import RPCError

from app.errors import InvalidRequest, TrellisError
from app.order.models import CloseOrder
from app.payment.models import ChargeRequest, RefundRequest
from app.reconcile.models import ReconcileReport, ReconcileRequest, Repair
from app.shipping.models import Shipment
from app.steps import Step

if TYPE_CHECKING:
    from app.audit.executions import ClosedOrder, Executions, Fate
    from app.audit.repository import BooksRepository
    from app.order.repository import OrderRepository
    from app.payment.activities import PaymentActivities
    from app.payment.gateway import PaymentGateway
    from app.payment.repository import PaymentRepository
    from app.reconcile.repository import Left, LeftBehind
    from app.shipping.activities import ShippingActivities

_PAGE: Final = 100

#: Ends of a workflow after which its order may be left behind. One that completed has closed its order itself.
_BROKEN_ENDS: Final = ("terminated", "failed", "timed_out", "canceled")


@dataclass(frozen=True)
class Tools:
    """What a reconciler works with: the features' own parts."""

    left: LeftBehind
    books: BooksRepository
    executions: Executions
    orders: OrderRepository
    payments: PaymentRepository
    gateway: PaymentGateway
    paying: PaymentActivities
    shipping: ShippingActivities


class Reconciler:
    """One pass over everything that was left behind."""

    def __init__(self, tools: Tools, request: ReconcileRequest, beat: Callable[[], None] = lambda: None) -> None:
        """`beat` is called before each order."""
        self._tools = tools
        self._request = request
        self._beat = beat
        self._report = ReconcileReport()

    async def run(self) -> ReconcileReport:
        """The pass.

        Raises:
            InvalidRequest: this Temporal knows none of the orders: most likely it is the wrong one.
            Exception: PostgreSQL or Temporal does not answer; what was settled stays settled.
        """
        tools, request = self._tools, self._request
        async for left in _pages(tools.left.open_orders, request.grace_seconds):
            await self._settle_if_orphaned(left)
        async for order in tools.executions.closed_orders(_BROKEN_ENDS):
            await self._write_down_if_missing(order)
        async for left in _pages(tools.left.in_doubt, request.settle_seconds):
            await self._repair(left.order_id, f"{left.step}, payment in doubt", "look the charge up", self._doubt(left))
        return self._report

    # --- open orders

    async def _settle_if_orphaned(self, left: Left) -> None:
        self._beat()
        self._report.looked_at += 1
        fates = await self._tools.executions.fates(left.order_id)
        if any(fate.running or self._fresh(fate.closed_at) for fate in fates):
            return
        order, shipment = fates
        if order.status is None and not await self._tools.executions.knows_any_order():
            raise InvalidRequest("this Temporal namespace has never seen an order: is it the right one?")
        found = f"{left.step}, workflow {order.told}" + (f", shipment {shipment.told}" if shipment.status else "")
        action, settle = self._plan(left, order)
        await self._repair(left.order_id, found, action, settle)

    def _plan(self, left: Left, fate: Fate) -> tuple[str, Callable[[], Awaitable[None]]]:
        reason = f"its workflow is gone ({fate.told})"
        match left.step:
            case Step.CHARGING:
                return "look the charge up; refund what was charged; cancel", lambda: self._charging(left, reason)
            case Step.CHARGED | Step.PREPARED:
                return "ask the carrier; shipped if it has the parcel, else refund", lambda: self._paid(left, reason)
            case _:
                return "cancel", lambda: self._cancel(left, reason)

    async def _cancel(self, left: Left, reason: str) -> None:
        await self._tell(left, reason)
        await self._tools.orders.close(CloseOrder(order_id=left.order_id, step=Step.CANCELLED, reason=reason))

    async def _charging(self, left: Left, reason: str) -> None:
        """Without a charge at the provider the payment stays INIT: an attempt that was taken for dead might yet come
        through. `_doubt` looks again when that can no longer be."""
        receipt = await self._tools.gateway.find_charge(left.payment_id)
        if receipt is None:
            await self._cancel(left, reason)
            return
        await self._tell(left, reason)
        if receipt.money != left.money:
            raise InvalidRequest(
                f"asked for {left.money}, the provider charged {receipt.money}: for a person to settle"
            )
        charge = ChargeRequest(order_id=left.order_id, payment_id=left.payment_id, money=left.money)
        await self._tools.payments.complete_charge(charge, receipt)
        await self._paid(left, reason)

    async def _paid(self, left: Left, reason: str) -> None:
        """Only the carrier knows where the parcel is, and once it is recalled a late `dispatch` is refused."""
        await self._tell(left, reason)
        if left.step is Step.PREPARED and await self._tools.shipping.recall(Shipment(order_id=left.order_id)):
            return
        await self._refund(left, Step.SHIPPING_FAILED if left.dispatch_began else Step.CANCELLED, reason)

    async def _refund(self, left: Left, close_as: Step, reason: str) -> None:
        await self._tools.paying.refund(
            RefundRequest(
                order_id=left.order_id,
                payment_id=left.payment_id,
                money=left.money,
                close_as=close_as,
                reason=reason,
            )
        )

    async def _tell(self, left: Left, reason: str) -> None:
        await self._tools.left.tell(left.order_id, {"found": left.step, "reason": reason}, key="reconciled")

    # --- payments of closed orders

    def _doubt(self, left: Left) -> Callable[[], Awaitable[None]]:
        async def settle() -> None:
            receipt = await self._tools.gateway.find_charge(left.payment_id)
            if receipt is None:
                await self._tools.left.never_charged(left)
                return
            await self._tools.left.charged_late(left, receipt)
            await self._refund(left, left.step, "charged after the order was closed")

        return settle

    # --- orders that were accepted and never written down

    async def _write_down_if_missing(self, order: ClosedOrder) -> None:
        if self._fresh(order.closed_at) or not await self._tools.books.unknown([order.order_id]):
            return
        self._beat()
        self._report.looked_at += 1
        found, action = f"no row, workflow {order.status}", "write down and cancel"
        await self._repair(order.order_id, found, action, lambda: self._write_down(order))

    async def _write_down(self, order: ClosedOrder) -> None:
        start = await self._tools.executions.start_input(order)
        if start is None:
            raise InvalidRequest("what it was started with cannot be read: for a person to settle")
        payment_id = start.request.payment_id
        owner = await self._tools.left.payment_owner(payment_id)
        if owner is None and await self._tools.gateway.find_charge(payment_id):
            # The row was there and is lost. This is not for a machine to tidy up.
            raise InvalidRequest("it was charged, and has no row: were the tables restored from a backup?")
        await self._tools.orders.receive(start, order.run_id)
        reason = f"its workflow is gone ({order.status})"
        await self._tools.left.tell(order.order_id, {"found": "missing", "reason": reason}, key="reconciled")
        await self._tools.orders.close(CloseOrder(order_id=order.order_id, step=Step.CANCELLED, reason=reason))

    # --- shared

    async def _repair(self, order_id: str, found: str, action: str, settle: Callable[[], Awaitable[None]]) -> None:
        self._beat()
        repair = Repair(order_id=order_id, found=found, action=action, done=False)
        if self._request.apply:
            try:
                await settle()
                repair.done = True
            except (TrellisError, RPCError, RuntimeError) as error:
                repair.detail = str(error)
        self._report.add(repair)

    def _fresh(self, closed_at: datetime | None) -> bool:
        """Whether an attempt of the workflow could still be running somewhere, taken for dead or not."""
        grace = timedelta(seconds=self._request.grace_seconds)
        return closed_at is not None and datetime.now(UTC) - closed_at < grace


async def _pages(read: Callable[[str, float, int], Awaitable[list[Left]]], seconds: float) -> AsyncIterator[Left]:
    after = ""
    while page := await read(after, seconds, _PAGE):
        after = page[-1].order_id
        for left in page:
            yield left
