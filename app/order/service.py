"""What the API does with orders: writes go to Temporal, which is durable; reads come from PostgreSQL."""

from __future__ import annotations

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
from temporalio.service import RPCError

from app import metrics
from app.errors import (
    InvalidRequest,
    OrderConflict,
    OrderNotFound,
    PaymentConflict,
    ReviewOutdated,
    ServiceUnavailable,
    TooLate,
)
from app.money import quantize
from app.order.models import (
    Decided,
    OrderInput,
    OrderStatus,
    Review,
    SignalPayload,
    StartAccepted,
    StartOrder,
    order_workflow_id,
)
from app.order.workflows import OrderWorkflow
from app.steps import Step
from app.temporal import is_not_found

if TYPE_CHECKING:
    from temporalio.client import Client

    from app.order.repository import OrderRepository
    from app.settings import Settings
    from app.shipping.models import Address

Answer = TypeVar("Answer")

#: Memo of the workflow: tells a repeated start from a conflicting one before `receive` has written the order down.
_REQUEST_MEMO = "request"


class OrderService:
    """Orders, as their API sees them.

    Every method raises `RPCError` or an error of `db.UNAVAILABLE` when Temporal or PostgreSQL is down; then nothing
    was changed, or what was changed is repeated harmlessly by the same call.
    """

    def __init__(self, settings: Settings, orders: OrderRepository, temporal: Client) -> None:
        self._settings = settings
        self._orders = orders
        self._temporal = temporal
        self._timeout = timedelta(seconds=settings.temporal_rpc_timeout)

    # --- start

    async def start(self, order_id: str, request: StartOrder) -> StartAccepted:
        """Start the order, once: the same request again gets the same run, however late.

        Raises:
            OrderConflict: the order exists with another request.
            PaymentConflict: the payment id is that of another order.
            InvalidRequest: it has no items, and there is no price for that.
        """
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
        """
        await self._signal(
            order_id,
            "approve",
            self._handle(order_id).signal(OrderWorkflow.approve, SignalPayload(), rpc_timeout=self._timeout),
        )

    async def cancel(self, order_id: str) -> None:
        """Signal a cancellation. Raises as `approve`."""
        await self._signal(
            order_id,
            "cancel",
            self._handle(order_id).signal(OrderWorkflow.cancel, SignalPayload(), rpc_timeout=self._timeout),
        )

    async def signal_address(self, order_id: str, address: Address) -> None:
        """Signal a new address. Raises as `approve`."""
        await self._signal(
            order_id,
            "address",
            self._handle(order_id).signal(OrderWorkflow.address, address, rpc_timeout=self._timeout),
        )

    async def _signal(self, order_id: str, name: str, call: Awaitable[None]) -> None:
        try:
            await self._if_open(order_id, call)
        except TooLate:
            # The workflow counts what reaches it; this one did not.
            metrics.signalled(name, "refused")
            raise

    # --- updates: answered by the workflow

    async def review(self, order_id: str, review: Review) -> Decided:
        """Decide the review.

        Raises:
            TooLate: it can no longer be decided; with the reason.
            ReviewOutdated: the order is no longer what its digest says.
            OrderNotFound: nobody knows the order.
            ServiceUnavailable: no worker answered in time.
        """
        return await self._update(order_id, OrderWorkflow.review, review)

    async def cancel_now(self, order_id: str) -> Decided:
        """Cancel, and learn whether it still counted. Raises as `review`."""
        return await self._update(order_id, OrderWorkflow.cancel_order, SignalPayload())

    async def change_address(self, order_id: str, address: Address) -> Decided:
        """Change the address, and learn whether it still counted. Raises as `review`."""
        return await self._update(order_id, OrderWorkflow.change_address, address)

    async def _update(self, order_id: str, update: Any, argument: Any) -> Decided:
        timeout = timedelta(seconds=self._settings.update_timeout)
        try:
            decided: Decided = await self._if_open(
                order_id, self._handle(order_id).execute_update(update, argument, rpc_timeout=timeout)
            )
        except WorkflowUpdateFailedError as error:
            raise _refusal(error, order_id) from error
        except WorkflowUpdateRPCTimeoutOrCancelledError as error:
            raise ServiceUnavailable(
                "the order's workflow did not answer in time; ask for its status before you repeat this"
            ) from error
        return decided

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
            if not is_not_found(error):
                raise
            # It is closed, or forgotten after Temporal's retention, or was never known.
            status = await self.status(order_id)
            raise TooLate(f"{order_id} is {status.step}") from error

    async def _is_known_to_temporal(self, order_id: str) -> bool:
        try:
            await self._handle(order_id).describe(rpc_timeout=self._timeout)
        except RPCError as error:
            if is_not_found(error):
                return False
            raise
        return True


def _refusal(error: WorkflowUpdateFailedError, order_id: str) -> Exception:
    cause = error.cause
    for kind in (TooLate, ReviewOutdated):
        if isinstance(cause, ApplicationError) and cause.type == kind.__name__:
            return kind(f"{order_id}: {cause.message}")
    # The workflow ended while the update waited for it.
    return TooLate(f"{order_id}: the order ended before this was answered; ask for its status")
