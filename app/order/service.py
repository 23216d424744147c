"""What the API does with orders: writes go to Temporal, which is durable; reads come from PostgreSQL."""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable
from datetime import timedelta
from decimal import Decimal
from typing import TYPE_CHECKING, Any, TypeVar

from temporalio.client import (
    WorkflowHandle,
    WorkflowUpdateFailedError,
    WorkflowUpdateRPCTimeoutOrCancelledError,
)
from temporalio.common import WorkflowIDReusePolicy
from temporalio.exceptions import ApplicationError, WorkflowAlreadyStartedError
from temporalio.service import RPCError, RPCStatusCode

from app.db.pool import UNAVAILABLE
from app.domain.money import quantize
from app.domain.steps import Step
from app.errors import (
    AlreadyDecided,
    InvalidRequest,
    OrderConflict,
    OrderLost,
    OrderNotFound,
    PaymentConflict,
    ReviewOutdated,
    ServiceUnavailable,
    TooLate,
    TooManyChanges,
)
from app.order.budget import ROOM, Change, ChangeBudget
from app.order.models import (
    Decided,
    OrderInput,
    OrderStatus,
    Review,
    SignalPayload,
    StartAccepted,
    StartOrder,
    Verdict,
    order_workflow_id,
)
from app.order.workflows import OrderWorkflow
from app.telemetry import metrics
from app.temporal.client import is_not_found

if TYPE_CHECKING:
    from pydantic import BaseModel
    from temporalio.client import Client

    from app.order.repository import OrderRepository
    from app.settings import Settings
    from app.shipping.models import Address
    from app.temporal.identity import Identity

Answer = TypeVar("Answer")

#: Memo of the workflow: tells a repeated start from a conflicting one before `receive` has written the order down.
_REQUEST_MEMO = "request"

#: Signals of one kind to one order that pass without a look at its history, whose length they can hardly change.
_FEW = 10

#: Ends of orders that were approved.
_APPROVED = frozenset({Step.SHIPPED, Step.PAYMENT_FAILED, Step.SHIPPING_FAILED})


class _Ended(Exception):
    """Temporal takes nothing more for the order: it has ended, as its row says."""

    def __init__(self, status: OrderStatus) -> None:
        super().__init__(status.order_id)
        self.status = status

    def too_late(self) -> TooLate:
        return TooLate(f"{self.status.order_id} is {self.status.step}")


class OrderService:
    """Orders, as their API sees them.

    Every method raises `RPCError` or an error of `db.UNAVAILABLE` when Temporal or PostgreSQL is down; then nothing
    was changed, or what was changed is repeated harmlessly by the same call.
    """

    def __init__(
        self, settings: Settings, orders: OrderRepository, temporal: Client, identity: Identity | None = None
    ) -> None:
        """With an `identity`, no order is started or changed in another system's Temporal."""
        self._identity = identity
        self._settings = settings
        self._orders = orders
        self._temporal = temporal
        self._timeout = timedelta(seconds=settings.temporal_rpc_timeout)
        self._budget = ChangeBudget(settings.changes_per_order)

    # --- start

    async def start(self, order_id: str, request: StartOrder) -> StartAccepted:
        """Start the order, once: the same request again gets the same run, however late.

        Raises:
            OrderConflict: the order exists with another request.
            PaymentConflict: the payment id is that of another order.
            InvalidRequest: it has no items, and there is no price for that.
        """
        await self._require_own_temporal()
        known = await self._orders.find_start(order_id, request.payment_id)
        if known and known["id"] != order_id:
            raise PaymentConflict(f"{request.payment_id} belongs to another order")
        if known:
            return self._started(order_id, known["run_id"], request, known["request_hash"])
        try:
            handle = await self._start_workflow(order_id, request)
        except WorkflowAlreadyStartedError as error:
            return await self._started_before(order_id, request, error)
        return self._accepted(order_id, handle.result_run_id)

    async def _start_workflow(self, order_id: str, request: StartOrder) -> WorkflowHandle[OrderWorkflow, Any]:
        settings = self._settings
        return await self._temporal.start_workflow(
            OrderWorkflow.run,
            OrderInput(
                order_id=order_id,
                request=request,
                review_timeout_seconds=request.review_timeout_seconds or settings.review_timeout_seconds,
                dispatch_attempts=settings.dispatch_attempts,
                order_task_queue=settings.order_task_queue,
                shipping_task_queue=settings.shipping_task_queue,
                local_steps=settings.local_steps,
                demo_price=self._demo_price(request),
                address_after_review=settings.address_after_review,
            ),
            id=order_workflow_id(order_id),
            task_queue=settings.order_task_queue,
            # The default would start a second run once the first has closed.
            id_reuse_policy=WorkflowIDReusePolicy.REJECT_DUPLICATE,
            memo={_REQUEST_MEMO: request.fingerprint},
            rpc_timeout=self._timeout,
        )

    def _demo_price(self, request: StartOrder) -> Decimal | None:
        """The price in force, which travels with the order; None for an order that needs none."""
        price = self._settings.demo_price_in_force
        if request.items:
            return None
        if price is None:
            raise InvalidRequest(
                "required: an order without items has no price here (TRELLIS_DEMO_PRICE)", field="body.items"
            )
        try:
            return quantize(price, request.currency)
        except ValueError as error:
            raise InvalidRequest(
                f"required: the price of an order without items is {price}, and {error}", field="body.items"
            ) from error

    async def _started_before(
        self, order_id: str, request: StartOrder, error: WorkflowAlreadyStartedError
    ) -> StartAccepted:
        description = await self._handle(order_id).describe(rpc_timeout=self._timeout)
        fingerprint = await description.memo_value(_REQUEST_MEMO, None)
        return self._started(order_id, error.run_id or description.run_id, request, fingerprint)

    def _started(
        self, order_id: str, run_id: str | None, request: StartOrder, fingerprint: str | None
    ) -> StartAccepted:
        if fingerprint != request.fingerprint:
            raise OrderConflict(f"{order_id} was started with another request")
        return self._accepted(order_id, run_id)

    def _accepted(self, order_id: str, run_id: str | None) -> StartAccepted:
        return StartAccepted(order_id=order_id, workflow_id=order_workflow_id(order_id), run_id=run_id or "")

    # --- signals: durable at once, also while the workers are down

    async def approve(self, order_id: str) -> None:
        """Signal an approval.

        Raises:
            OrderNotFound: nobody knows the order.
            TooLate: the order is closed.
            TooManyChanges: it was signalled so often that its history might fill up.
            OrderLost: the order is open, and its workflow is gone.
        """
        await self._signal(order_id, "approve", OrderWorkflow.approve, SignalPayload())

    async def cancel(self, order_id: str) -> None:
        """Signal a cancellation. Raises as `approve`."""
        await self._signal(order_id, "cancel", OrderWorkflow.cancel, SignalPayload())

    async def signal_address(self, order_id: str, address: Address) -> None:
        """Signal a new address. Raises as `approve`."""
        await self._signal(order_id, "address", OrderWorkflow.address, address)

    async def _require_own_temporal(self) -> None:
        if self._identity is not None:
            await self._identity.require()

    async def _signal(self, order_id: str, change: Change, signal: Any, argument: BaseModel) -> None:
        await self._require_own_temporal()
        try:
            await self._make_sure_it_fits(order_id, change)
            await self._if_open(order_id, self._handle(order_id).signal(signal, argument, rpc_timeout=self._timeout))
        except _Ended as ended:
            # The workflow counts what reaches it; this one did not.
            metrics.signalled(change, "refused")
            raise ended.too_late() from ended
        except TooManyChanges:
            metrics.signalled(change, "refused")
            raise
        except Exception:
            self._budget.give_back(order_id, change)
            raise

    async def _make_sure_it_fits(self, order_id: str, change: Change) -> None:
        """The first signal of its kind passes at once; a repeat only while it can matter; many, only while there is
        room. Workers that are down see none of them, but the history has them all."""
        spent = self._budget.spend(order_id, change)
        if spent.count <= 1:
            return
        await self._refuse_if_ended(order_id)
        if spent.wait:
            raise TooManyChanges(f"{order_id}: {change}", retry_after=spent.wait)
        if spent.count > _FEW:
            description = await self._if_open(order_id, self._handle(order_id).describe(rpc_timeout=self._timeout))
            if description.history_length >= ROOM[change]:
                raise TooManyChanges(f"{order_id}: {change}")

    async def _refuse_if_ended(self, order_id: str) -> None:
        try:
            status = await self._orders.status(order_id)
        except UNAVAILABLE:
            return  # Temporal knows, too, and a decision needs no table to be kept
        if status is not None and status.step.final:
            raise _Ended(status)

    # --- updates: answered by the workflow
    #
    # The same call has the same update id, so that its repeat is attached to it: while it waits for a worker, and for
    # as long as Temporal remembers the order. The id also says how often the address was changed so far, because
    # after another change the same call is a new one.

    async def review(self, order_id: str, review: Review) -> Decided:
        """Decide the review. The same decision again gets the same answer.

        Raises:
            TooLate: it can no longer be decided; with the reason.
            ReviewOutdated: the order is no longer what its digest says.
            OrderNotFound: nobody knows the order.
            OrderLost: the order is open, and its workflow is gone.
            ServiceUnavailable: no worker answered in time.
        """
        update_id = f"review-{_digest(review)}-{await self._orders.address_changes(order_id)}"
        decided = Decided(order_id=order_id, step=review.decision.leads_to)
        try:
            return await self._update(order_id, OrderWorkflow.review, review, update_id)
        except AlreadyDecided:
            return decided
        except _Ended as ended:
            if _was_decided(review.decision, ended.status):
                return decided
            raise ended.too_late() from ended

    async def cancel_now(self, order_id: str) -> Decided:
        """Cancel, and learn whether it still counted. The same again gets the same answer. Raises as `review`."""
        cancelled = Decided(order_id=order_id, step=Step.CANCELLED)
        try:
            return await self._update(order_id, OrderWorkflow.cancel_order, SignalPayload(), "cancel")
        except AlreadyDecided:
            return cancelled
        except _Ended as ended:
            if ended.status.step is Step.CANCELLED:
                return cancelled
            raise ended.too_late() from ended

    async def change_address(self, order_id: str, address: Address, key: str | None = None) -> Decided:
        """Change the address, and learn whether it still counted. Raises as `review`, and TooManyChanges when that was
        done so often that the order's history might fill up.

        Args:
            key: chosen by the caller, the same for a repeat of the same call. Without one, a repeat is what asks for
                the same address before any address was written.
        """
        times = "" if key else await self._orders.address_changes(order_id)
        update_id = f"address-{_digest(address, key or '')}-{times}"
        try:
            return await self._update(order_id, OrderWorkflow.change_address, address, update_id)
        except _Ended as ended:
            raise ended.too_late() from ended

    async def _update(self, order_id: str, update: Any, argument: BaseModel, update_id: str) -> Decided:
        await self._require_own_temporal()
        timeout = timedelta(seconds=self._settings.update_timeout)
        asking = self._handle(order_id).execute_update(update, argument, id=update_id, rpc_timeout=timeout)
        try:
            decided: Decided = await self._if_open(order_id, asking)
        except WorkflowUpdateFailedError as error:
            raise await self._refusal(error, order_id) from error
        except WorkflowUpdateRPCTimeoutOrCancelledError as error:
            raise ServiceUnavailable(
                "the order's workflow did not answer in time; the same call again gets the answer of this one"
            ) from error
        return decided

    async def _refusal(self, error: WorkflowUpdateFailedError, order_id: str) -> Exception:
        cause = error.cause
        for kind in (TooLate, TooManyChanges, AlreadyDecided, ReviewOutdated):
            if isinstance(cause, ApplicationError) and cause.type == kind.__name__:
                return kind(f"{order_id}: {cause.message}")
        # The workflow ended while the update waited for it.
        return await self._ended(order_id)

    # --- reads

    async def status(self, order_id: str) -> OrderStatus:
        """Where the order is, from its row; `received` while 202 was given and the row is not there yet.

        Raises:
            OrderNotFound: nobody knows the order.
        """
        status = await self._orders.status(order_id)
        if status is None and await self._is_known_to_temporal(order_id):
            status = await self._orders.status(order_id) or OrderStatus(
                order_id=order_id, step=Step.RECEIVED, last_error=None
            )
        if status is None:
            raise OrderNotFound(order_id)
        return status

    # --- shared

    def _handle(self, order_id: str) -> WorkflowHandle[OrderWorkflow, Any]:
        return self._temporal.get_workflow_handle_for(OrderWorkflow.run, order_workflow_id(order_id))

    async def _if_open(self, order_id: str, call: Awaitable[Answer]) -> Answer:
        try:
            return await call
        except RPCError as error:
            if _is_full(error):
                raise TooManyChanges(f"{order_id}: Temporal takes no more signals for it") from error
            if not is_not_found(error):
                raise
            raise await self._ended(order_id) from error

    async def _ended(self, order_id: str) -> _Ended | OrderLost:
        """What has become of an order that Temporal takes nothing for: it is closed, or forgotten after Temporal's
        retention, or its workflow ended by force and left it open. OrderNotFound is raised if it was never known."""
        status = await self.status(order_id)
        if status.step.final:
            return _Ended(status)
        return OrderLost(f"{order_id} is {status.step}; repeat the same call in a few minutes")

    async def _is_known_to_temporal(self, order_id: str) -> bool:
        try:
            await self._handle(order_id).describe(rpc_timeout=self._timeout)
        except RPCError as error:
            if is_not_found(error):
                return False
            raise
        return True


def _was_decided(verdict: Verdict, ended: OrderStatus) -> bool:
    """Whether an order that ended so had been reviewed with this verdict. One that no clerk rejected says why."""
    if verdict is Verdict.APPROVE:
        return ended.step in _APPROVED
    return ended.step is Step.REJECTED and ended.last_error is None


def _is_full(error: RPCError) -> bool:
    """Whether the run has had as many signals as its server allows (10,000, unless configured otherwise)."""
    return error.status is RPCStatusCode.INVALID_ARGUMENT and "limit for signal" in error.message


def _digest(argument: BaseModel, key: str = "") -> str:
    """Equal for equal calls."""
    return hashlib.sha256(f"{key}\n{argument.model_dump_json()}".encode()).hexdigest()[:32]
