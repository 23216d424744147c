"""Settles what a workflow left behind when it ended by force: terminated, failed, or lost with Temporal's data.

Every repair goes the way the workflow would have gone, through the same activities and repositories, so that it can
be broken off anywhere, repeated, and done by two at once. Nothing is touched that a running workflow may touch: one
order at a time, first the look at its workflows, then the row, and both again after every wait for a partner. What
must not happen is refused by the statements themselves, as no look is younger than what it is followed by.
"""

from __future__ import annotations

import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING, Final

import structlog
from pydantic import ValidationError
from temporalio.service import RPCError

from app.db.pool import UNAVAILABLE
from app.domain.steps import PaymentStatus, Step
from app.errors import InvalidRequest, TrellisError
from app.order.models import CloseOrder
from app.payment.models import ChargeRequest, RefundRequest
from app.reconcile.models import ReconcileReport, ReconcileRequest, Repair
from app.shipping.models import Shipment
from app.telemetry import metrics
from app.temporal.client import is_namespace_missing, is_unavailable

if TYPE_CHECKING:
    from app.audit.executions import ClosedOrder, Executions, Fate
    from app.audit.repository import BooksRepository
    from app.domain.money import Money
    from app.order.models import OrderInput
    from app.order.repository import OrderRepository
    from app.payment.activities import PaymentActivities
    from app.payment.gateway import PaymentGateway, Receipt
    from app.payment.repository import PaymentRepository
    from app.reconcile.repository import Left, LeftBehind
    from app.shipping.activities import ShippingActivities

_PAGE: Final = 100

#: Ends of a workflow after which its order may be left behind. One that completed has closed its order itself.
_BROKEN_ENDS: Final = ("terminated", "failed", "timed_out", "canceled")

#: Orders in a row for which PostgreSQL or Temporal did not answer, after which it is not the orders: the pass ends.
_SILENCES: Final = 3

#: Share of the open orders that Temporal may not know without a question. Those whose workflow it has forgotten are
#: few; another environment's namespace knows none.
_UNKNOWN_SHARE: Final = 0.05

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Tools:
    """What a reconciler works with: the features' own parts."""

    #: Raises `WrongNamespace` if Temporal is another system's.
    require_own: Callable[[], Awaitable[None]]
    left: LeftBehind
    books: BooksRepository
    executions: Executions
    orders: OrderRepository
    payments: PaymentRepository
    gateway: PaymentGateway
    paying: PaymentActivities
    shipping: ShippingActivities


@dataclass(frozen=True)
class _Plan:
    """What was found of one order, and what to do about it."""

    found: str
    action: str
    settle: Callable[[], Awaitable[None]]


class _UnderWay(Exception):
    """Somebody works on the order again: it is not ours to settle."""


class Reconciler:
    """One pass over everything that was left behind."""

    def __init__(self, tools: Tools, request: ReconcileRequest, beat: Callable[[], None] = lambda: None) -> None:
        """`beat` is called before each look at an order's workflows."""
        self._tools = tools
        self._request = request
        self._beat = beat
        self._report = ReconcileReport()
        self._silences = 0
        self._is_own_provider = False

    async def run(self) -> ReconcileReport:
        """The pass. What is wrong with one order is in the report, and holds no other up.

        Raises:
            WrongNamespace: it is another system's Temporal.
            InvalidRequest: this Temporal knows too few of the orders: most likely it is the wrong one.
            Exception: PostgreSQL or Temporal does not answer; what was settled stays settled.
        """
        tools, request = self._tools, self._request
        await tools.require_own()
        for order_id in await self._orphans():
            await self._one(order_id, partial(self._plan_open, order_id))
        async for order_id in _pages(tools.left.in_doubt, request.settle_seconds):
            await self._one(order_id, partial(self._plan_doubt, order_id))
        # Last, as it takes Temporal's list of workflows: a store of its own, which may be down by itself.
        async for page in _in_pages(tools.executions.closed_orders(_BROKEN_ENDS)):
            missing = await tools.books.unknown([order.order_id for order in page])
            for order in {order.order_id: order for order in reversed(page) if order.order_id in missing}.values():
                await self._one(order.order_id, partial(self._plan_missing, order))
        return self._report

    # --- one order, whatever is the matter with it

    async def _one(self, order_id: str, look: Callable[[], Awaitable[_Plan | None]]) -> None:
        """Look, and settle what is to be settled. Raises only what is no fault of the order."""
        repair = Repair(order_id=order_id, found="cannot be looked at", action="none", done=False)
        try:
            plan = await look()
            if plan is None:
                return
            repair = repair.model_copy(update={"found": plan.found, "action": plan.action})
            if self._request.apply:
                await plan.settle()
                repair.done = True
        except _UnderWay:
            return
        except TrellisError as error:
            repair.detail = str(error)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is told, and the other orders get their turn
            repair.defect = not self._is_silence(error)
            repair.detail = _told(error)
            # Without the traceback, which would quote the error.
            log.warning("an order cannot be reconciled", order_id=order_id, error=repair.detail, at=_place(error))
        else:
            self._silences = 0
        self._add(repair)

    def _is_silence(self, error: Exception) -> bool:
        """Whether PostgreSQL or Temporal did not answer: then the next pass will find the order.

        Raises:
            Exception: the error, if it is not this order's: nothing answers any more, or never will.
        """
        if isinstance(error, RPCError) and is_namespace_missing(error):
            raise error
        lost = isinstance(error, (RPCError, RuntimeError)) and is_unavailable(error)
        silent = lost or isinstance(error, UNAVAILABLE)
        self._silences = self._silences + 1 if silent or isinstance(error, RPCError) else 0
        if self._silences >= _SILENCES:
            raise error
        return silent

    def _add(self, repair: Repair) -> None:
        self._report.add(repair)
        if repair.defect or self._request.apply:
            metrics.reconciled("defect" if repair.defect else "settled" if repair.done else "left")

    # --- open orders

    async def _orphans(self) -> list[str]:
        """Open orders whose workflow is gone, or cannot be looked at. Nothing is settled before all have been counted:
        if it is the wrong Temporal, all of them seem to be lost."""
        orphans, unknown = [], 0
        async for order_id in _pages(self._tools.left.open_orders, self._request.grace_seconds):
            self._report.looked_at += 1
            try:
                fates = await self._fates(order_id)
            except _UnderWay:
                self._silences = 0
                continue
            except (RPCError, RuntimeError) as error:
                self._is_silence(error)
            else:
                self._silences = 0
                unknown += fates[0].status is None
            orphans.append(order_id)
        if unknown > self._report.looked_at * _UNKNOWN_SHARE and not self._request.accept_unknown:
            raise InvalidRequest(
                f"this Temporal namespace does not know {unknown} of {self._report.looked_at} open orders: is it the "
                "right one? If their workflows are lost for certain, say so with --accept-unknown"
            )
        return orphans

    async def _plan_open(self, order_id: str) -> _Plan | None:
        order, shipment = await self._fates(order_id)
        left = await self._tools.left.look(order_id)
        if left is None or left.step.final or left.seconds < self._request.grace_seconds:
            return None
        reason = f"its workflow is gone ({order.told})"
        found = f"{left.step}, workflow {order.told}" + (f", shipment {shipment.told}" if shipment.status else "")
        match left.step:
            case Step.CHARGING:
                action = "look the charge up; refund what was charged; cancel"
                return _Plan(found, action, lambda: self._charging(left, reason))
            case Step.CHARGED | Step.PREPARED:
                action = "ask the carrier; shipped if it has the parcel, else refund"
                return _Plan(found, action, lambda: self._paid(left, left.step, reason))
            case _:
                return _Plan(found, "cancel", lambda: self._cancel(left, reason))

    async def _cancel(self, left: Left, reason: str) -> None:
        await self._tell(left, reason)
        await self._tools.orders.close(CloseOrder(order_id=left.order_id, step=Step.CANCELLED, reason=reason))

    async def _charging(self, left: Left, reason: str) -> None:
        """Without a charge at the provider the payment stays INIT: an attempt that was taken for dead might yet come
        through. `_doubt` looks again when that can no longer be."""
        receipt = await self._find_charge(left.payment_id)
        await self._require_at(left.order_id, left.step)
        if receipt is None:
            await self._cancel(left, reason)
            return
        await self._tell(left, reason)
        _require_same(left.money, receipt.money)
        charge = ChargeRequest(order_id=left.order_id, payment_id=left.payment_id, money=left.money)
        await self._tools.payments.complete_charge(charge, receipt)
        await self._paid(left, Step.CHARGED, reason)

    async def _paid(self, left: Left, step: Step, reason: str) -> None:
        """Only the carrier knows where the parcel is, and once it is recalled a late `dispatch` is refused. It is asked
        before the parcel was ready, too: whoever comes to the handover meanwhile must not find the money gone."""
        await self._tell(left, reason)
        if await self._tools.shipping.recall(Shipment(order_id=left.order_id)):
            return
        await self._require_at(left.order_id, step)
        began = step is Step.PREPARED and left.dispatch_began
        await self._tools.paying.refund(
            RefundRequest(
                order_id=left.order_id,
                payment_id=left.payment_id,
                money=left.money,
                close_as=Step.SHIPPING_FAILED if began else Step.CANCELLED,
                reason=reason,
            )
        )

    async def _tell(self, left: Left, reason: str) -> None:
        await self._tools.left.tell(left.order_id, {"found": left.step, "reason": reason}, key="reconciled")

    # --- payments of closed orders

    async def _plan_doubt(self, order_id: str) -> _Plan | None:
        self._beat()
        left = await self._tools.left.look(order_id)
        if left is None or not left.step.final or left.payment is not PaymentStatus.INIT:
            return None
        return _Plan(f"{left.step}, payment in doubt", "look the charge up", lambda: self._doubt(left))

    async def _doubt(self, left: Left) -> None:
        """The payment stays in doubt until the money is back, so that a pass that breaks off leaves it to the next."""
        receipt = await self._find_charge(left.payment_id)
        if receipt is None:
            await self._tools.left.never_charged(left.order_id, left.payment_id)
            return
        payload = {"found": "a charge after the order was closed", "reference": receipt.reference}
        await self._tools.left.tell(left.order_id, payload, key="reconciled:payment")
        _require_same(left.money, receipt.money)
        refund = await self._tools.gateway.refund(left.payment_id, receipt.money)
        await self._tools.payments.complete_late(left.order_id, left.payment_id, receipt, refund)

    # --- orders that were accepted and never written down

    async def _plan_missing(self, order: ClosedOrder) -> _Plan | None:
        if self._fresh(order.closed_at):
            return None
        # The one in the list may be an older run: the order may have been started again since, or reset.
        await self._fates(order.order_id)
        self._report.looked_at += 1
        start = await self._tools.executions.start_input(order)
        if start is None or start.order_id != order.order_id:
            raise InvalidRequest("what it was started with is not this order: for a person to settle")
        found, action = f"no row, workflow {order.status}", "write down and cancel"
        return _Plan(found, action, lambda: self._write_down(order, start))

    async def _write_down(self, order: ClosedOrder, start: OrderInput) -> None:
        payment_id = start.request.payment_id
        owner = await self._tools.left.payment_owner(payment_id)
        if owner is None and await self._find_charge(payment_id):
            # The row was there and is lost. This is not for a machine to tidy up.
            raise InvalidRequest("it was charged, and has no row: were the tables restored from a backup?")
        await self._fates(order.order_id)
        await self._tools.orders.receive(start, order.run_id)
        left = await self._require_at(order.order_id, Step.RECEIVED)
        if left.run_id != order.run_id:
            raise _UnderWay
        await self._cancel_missing(left, f"its workflow is gone ({order.status})")

    async def _cancel_missing(self, left: Left, reason: str) -> None:
        await self._tools.left.tell(left.order_id, {"found": "missing", "reason": reason}, key="reconciled")
        await self._tools.orders.close(CloseOrder(order_id=left.order_id, step=Step.CANCELLED, reason=reason))

    # --- shared

    async def _find_charge(self, payment_id: str) -> Receipt | None:
        """The charge at the provider. That there is none is believed of a provider alone that knows one in the books:
        another environment's knows none at all, and every charge in doubt would be written off.

        Raises:
            InvalidRequest: it is another provider, or another account there.
        """
        receipt = await self._tools.gateway.find_charge(payment_id)
        if receipt is None and not self._is_own_provider:
            known = await self._tools.left.known_charge(self._request.settle_seconds)
            if known is not None and await self._tools.gateway.find_charge(known) is None:
                raise InvalidRequest(
                    f"the payment provider does not know the charge of {known}, which is in the books: is it another "
                    "environment's? See TRELLIS_PAYMENT_URL and its token"
                )
            self._is_own_provider = True
        return receipt

    async def _fates(self, order_id: str) -> tuple[Fate, Fate]:
        """What became of the order's workflow and of its shipment's. Raises `_UnderWay` if either runs, or ended so
        lately that an attempt of it may."""
        self._beat()
        fates = await self._tools.executions.fates(order_id)
        if any(fate.running or self._fresh(fate.closed_at) for fate in fates):
            raise _UnderWay
        return fates

    async def _require_at(self, order_id: str, step: Step) -> Left:
        """The order as it is now, after a wait. Raises `_UnderWay` if somebody has taken it up, or on."""
        await self._fates(order_id)
        left = await self._tools.left.look(order_id)
        if left is None or left.step is not step:
            raise _UnderWay
        return left

    def _fresh(self, closed_at: datetime | None) -> bool:
        """Whether an attempt of the workflow could still be running somewhere, taken for dead or not."""
        grace = timedelta(seconds=self._request.grace_seconds)
        return closed_at is not None and datetime.now(UTC) - closed_at < grace


def _require_same(asked: Money, charged: Money) -> None:
    if charged != asked:
        raise InvalidRequest(f"asked for {asked}, the provider charged {charged}: for a person to settle")


def _told(error: Exception) -> str:
    """Its kind alone: what an error says may quote an address, or a whole row."""
    kind = type(error).__name__
    return f"{kind} of {error.title}" if isinstance(error, ValidationError) else kind


def _place(error: Exception) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{frame.filename.rpartition('/')[2]}:{frame.lineno}"


async def _pages(read: Callable[[str, float, int], Awaitable[list[str]]], seconds: float) -> AsyncIterator[str]:
    after = ""
    while page := await read(after, seconds, _PAGE):
        after = page[-1]
        for order_id in page:
            yield order_id


async def _in_pages(orders: AsyncIterator[ClosedOrder]) -> AsyncIterator[list[ClosedOrder]]:
    page: list[ClosedOrder] = []
    async for order in orders:
        page.append(order)
        if len(page) == _PAGE:
            yield page
            page = []
    if page:
        yield page
