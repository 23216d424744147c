"""`OrderWorkflow`: the life of an order, from its receipt to its end.

Signals and updates only set facts (`_review`, `_cancel`, …) or take what changes no step (addresses, notes); the one
line of steps in `run` reads those facts where they count. So there is one decision per order, in history order.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final, NoReturn

from pydantic import ValidationError
from temporalio import workflow
from temporalio.common import WorkflowIDReusePolicy
from temporalio.exceptions import ApplicationError, ChildWorkflowError, FailureError

with workflow.unsafe.imports_passed_through():
    from app import local_first, policies, signals
    from app.errors import AlreadyDecided, OrderRejected, PaymentConflict, PaymentDeclined, TooLate, TooManyChanges
    from app.failures import failed_with, message
    from app.order.activities import OrderActivities
    from app.order.models import (
        AddressChange,
        CloseOrder,
        Decided,
        NoteRequest,
        OrderInput,
        OrderResult,
        OrderStatus,
        Review,
        SignalPayload,
        Verdict,
    )
    from app.payment.activities import PaymentActivities
    from app.payment.models import ChargeRequest, RefundRequest
    from app.shipping.activities import ShippingActivities
    from app.shipping.models import (
        Address,
        DispatchFailed,
        Shipment,
        ShippingInput,
        ShippingOutcome,
        ShippingResult,
        shipping_workflow_id,
    )
    from app.shipping.workflows import ShippingWorkflow
    from app.steps import Step

# What strangers can make a history grow by, kind by kind: Temporal terminates a workflow whose history is full, and a
# charge would stay. docs/decisions/0052-a-history-is-a-budget.md adds it all up.

#: Events of each type that report signals which changed nothing.
MAX_NOTES: Final = 20
#: Addresses written because of signals. Those that arrive while another waits for its turn replace it and count once.
MAX_ADDRESS_SIGNALS: Final = 50
#: Addresses written because of updates.
MAX_ADDRESS_UPDATES: Final = 50
#: Cancellations as updates that are answered. The API repeats one under the same id, which costs nothing.
MAX_CANCEL_UPDATES: Final = 20

# Orders that began before these keep to what was the rule then.
_NOTES_PER_TYPE: Final = "notes-per-type"
_LATEST_ADDRESS: Final = "latest-address"

#: A cancellation at these steps is the end: nothing is charged any more.
_NOT_CHARGED: Final = frozenset({Step.RECEIVED, Step.AWAITING_REVIEW})


@dataclass
class _NewAddress:
    """An address that waits for its turn to be written."""

    address: Address


@workflow.defn
class OrderWorkflow:
    """Receive, validate, wait for a review, charge, ship; refund what was charged and cannot be shipped."""

    @workflow.init
    def __init__(self, order: OrderInput) -> None:
        self._order = order
        self._step = Step.RECEIVED
        self._last_error: str | None = None
        self._written_down = False
        self._review: Review | None = None
        self._cancel = False
        self._dispatch_failed: str | None = None
        self._shipment: workflow.ChildWorkflowHandle[ShippingWorkflow, ShippingResult] | None = None
        self._address_turn = asyncio.Lock()
        self._address_signals = 0
        self._address_batches = 0
        self._address_updates = 0
        self._last_in_line: _NewAddress | None = None
        self._cancel_updates = 0
        self._notes: Counter[str] = Counter()

    @workflow.run
    async def run(self, order: OrderInput) -> OrderResult:  # noqa: ARG002 - `__init__` has it
        story = asyncio.create_task(self._live())
        while not story.done():
            try:
                await asyncio.shield(story)
            except asyncio.CancelledError:
                # Somebody cancelled the workflow itself, in Temporal's UI say. To stop here could leave a charge
                # without goods: it is taken as the order's cancellation, and the story goes on to a proper end.
                self._cancel = True
        return story.result()

    async def _live(self) -> OrderResult:
        for step in (self._receive, self._validate, self._await_review, self._charge, self._ship):
            await step()
            if self._step.final:
                break
        await workflow.wait_condition(workflow.all_handlers_finished)
        return OrderResult(order_id=self._order.order_id, step=self._step)

    # --- the steps, in their order

    async def _receive(self) -> None:
        await local_first.write(OrderActivities.receive, self._order, local=self._order.local_steps)
        self._written_down = True

    async def _validate(self) -> None:
        if self._cancel:
            await self._close(Step.CANCELLED, "cancelled before the review")
            return
        try:
            await local_first.write(OrderActivities.validate, self._order, local=self._order.local_steps)
        except FailureError as error:
            self._enter_failed(Step.REJECTED, error, OrderRejected)
        else:
            self._step = Step.AWAITING_REVIEW

    async def _await_review(self) -> None:
        try:
            await workflow.wait_condition(
                lambda: self._cancel or self._review is not None,
                timeout=timedelta(seconds=self._order.review_timeout_seconds),
                timeout_summary="review window",
            )
        except TimeoutError:
            # An approval in the same workflow task as the timer was applied before it, and counts.
            pass
        if self._cancel:
            await self._close(Step.CANCELLED, "cancelled before the charge")
        elif self._review is None:
            await self._close(Step.EXPIRED, "nobody decided in time")
        elif self._review.decision is Verdict.REJECT:
            await self._close(Step.REJECTED, "rejected by the review", self._review.note)
        else:
            self._step = Step.CHARGING

    async def _charge(self) -> None:
        request = self._order.request
        try:
            await workflow.execute_activity_method(
                PaymentActivities.charge,
                ChargeRequest(
                    order_id=self._order.order_id,
                    payment_id=request.payment_id,
                    money=request.total,
                    approval_note=self._review.note if self._review else "",
                ),
                **policies.PAYMENT,
            )
        except FailureError as error:
            self._enter_failed(Step.PAYMENT_FAILED, error, PaymentDeclined, PaymentConflict)
            return
        self._step = Step.CHARGED
        if self._cancel:
            await self._refund(Step.CANCELLED, "cancelled during the charge")

    async def _ship(self) -> None:
        # In turn behind every address that was sent before, so that none of them comes too late for the handover.
        async with self._address_turn:
            self._shipment = shipment = await self._start_shipment()
        await workflow.wait_condition(lambda: shipment.done() or self._cancel)
        if not shipment.done():
            await self._tell_shipment("cancel")
        try:
            result = await shipment
        except ChildWorkflowError as error:
            await self._settle_failed_shipment(error)
            return
        if result.outcome is ShippingOutcome.RECALLED:
            await self._refund(Step.CANCELLED, "cancelled before the carrier took the parcel")
        else:
            await self._enter_shipped()

    # --- parts of the steps

    async def _close(self, step: Step, reason: str, note: str = "") -> None:
        # First the fact, so that a decision arriving while the row is written is told that it is too late.
        self._step = step
        # Not locally: a signal or an update that arrives meanwhile would undo the workflow task that ends the order.
        await workflow.execute_activity_method(
            OrderActivities.close,
            CloseOrder(order_id=self._order.order_id, step=step, reason=reason, note=note),
            **policies.DATABASE,
        )

    def _enter_failed(self, step: Step, error: FailureError, *expected: type[Exception]) -> None:
        """Enter a step that the activity has written down before it failed. Anything else is a defect: it fails
        the workflow visibly, and the order stays open for an operator."""
        if not failed_with(error, *expected):
            raise error
        self._step, self._last_error = step, message(error)

    async def _start_shipment(self) -> workflow.ChildWorkflowHandle[ShippingWorkflow, ShippingResult]:
        """Returns when the child has really started; only then may its parent close without losing it."""
        order = self._order
        return await workflow.start_child_workflow(
            ShippingWorkflow.run,
            ShippingInput(
                order_id=order.order_id,
                payment_id=order.request.payment_id,
                money=order.request.total,
                address=order.request.address,
                dispatch_attempts=order.dispatch_attempts,
                order_task_queue=order.order_task_queue,
                local_steps=order.local_steps,
            ),
            id=shipping_workflow_id(order.order_id),
            task_queue=order.shipping_task_queue,
            parent_close_policy=workflow.ParentClosePolicy.ABANDON,
            id_reuse_policy=WorkflowIDReusePolicy.REJECT_DUPLICATE,
        )

    async def _tell_shipment(self, signal: str, *args: Address) -> None:
        if self._shipment is None:
            return
        try:
            await self._shipment.signal(signal, args=list(args))
        except FailureError:
            # It has ended in the meantime; its result, which `_ship` awaits, says how.
            workflow.logger.info("the shipment ended before the signal reached it", extra={"signal": signal})

    async def _settle_failed_shipment(self, error: ChildWorkflowError) -> None:
        reason = self._dispatch_failed
        if reason is None:
            # It did not end by its own decision (terminated, say), so where the parcel is, only the carrier knows.
            taken = await workflow.execute_activity_method(
                ShippingActivities.recall,
                Shipment(order_id=self._order.order_id),
                task_queue=self._order.shipping_task_queue,
                **policies.RECALL,
            )
            if taken:
                await self._enter_shipped()
                return
            reason = f"the shipment ended without a result: {error.cause or error}"
        await self._refund(Step.SHIPPING_FAILED, reason)
        self._last_error = reason if self._step is Step.SHIPPING_FAILED else None

    async def _refund(self, close_as: Step, reason: str) -> None:
        request = RefundRequest(
            order_id=self._order.order_id,
            payment_id=self._order.request.payment_id,
            money=self._order.request.total,
            close_as=close_as,
            reason=reason,
        )
        try:
            await workflow.execute_activity_method(PaymentActivities.refund, request, **policies.PAYMENT)
        except FailureError as error:
            if not failed_with(error, TooLate):
                raise
            await self._enter_shipped()
        else:
            self._step = close_as

    async def _enter_shipped(self) -> None:
        self._step = Step.SHIPPED
        if self._cancel:
            await self._note("cancel_refused", "the carrier has the parcel")

    # --- signals: always taken; told in the timeline when they no longer count
    #
    # They may come from anybody's client. Arguments that cannot be decoded as annotated make the SDK drop the signal,
    # and their number, if it is not the handler's, makes it fail every workflow task from then on: a person's decision
    # would be lost, or the order stuck. So these take any number of anything.

    @workflow.signal
    async def approve(self, *_: Any) -> None:
        """Approve the order, also before its review opens."""
        too_late = self._why_no_review()
        signals.count("approve", "ignored" if too_late else "accepted")
        if too_late:
            await self._note("approve_ignored", too_late)
        else:
            self._review = Review(decision=Verdict.APPROVE)

    @workflow.signal
    async def cancel(self, *_: Any) -> None:
        """Cancel the order; after the charge, get the parcel back and refund."""
        too_late = self._why_no_cancel()
        signals.count("cancel", "refused" if too_late else "accepted")
        if too_late:
            await self._note("cancel_refused", too_late)
        else:
            self._cancel = True

    @workflow.signal
    async def address(self, *payload: Any) -> None:
        """Change the address until `dispatch` starts."""
        self._address_signals += 1
        try:
            address = Address.model_validate(payload[0] if len(payload) == 1 else None)
        except ValidationError as error:
            await self._ignore_address(f"not valid: {_fields_at_fault(error)}")
            return
        if self._replaces_last_in_line(address):
            signals.count("address", "accepted")
        elif self._too_many_addresses():
            await self._ignore_address("too many changes")
        else:
            self._address_batches += 1
            self._last_in_line = change = _NewAddress(address)
            accepted = await self._change_address(change)
            signals.count("address", "accepted" if accepted else "refused")

    @workflow.signal
    def dispatch_failed(self, *payload: Any) -> None:
        """The child gave up: nothing was shipped and nothing will be."""
        try:
            self._dispatch_failed = DispatchFailed.model_validate(payload[0] if len(payload) == 1 else None).reason
        except ValidationError:
            # Not the child's. Without its word the carrier is asked where the parcel is.
            workflow.logger.warning("dispatch_failed without a reason that can be read; ignored")

    @workflow.signal
    def recalled(self, *_: Any) -> None:
        """The child got the parcel back. Its result says so, too; that this arrives tells it who will refund."""

    # --- updates: answered, or refused with the reason

    @workflow.update
    async def review(self, review: Review) -> Decided:
        """Decide the review."""
        self._review = review
        return self._decided(review.decision.leads_to)

    @review.validator
    def _validate_review(self, review: Review) -> None:
        if self._stands(review):
            _refuse(AlreadyDecided, review.decision.leads_to)
        self._refuse_if(self._why_no_review())

    @workflow.update
    async def cancel_order(self, _: SignalPayload) -> Decided:
        """Cancel the order. Answers as soon as it is certain that nothing will stay charged; while the parcel is
        being handed over, that is for the carrier to say."""
        self._cancel = True
        self._cancel_updates += 1
        if self._step in {Step.CHARGED, Step.PREPARED}:
            await workflow.wait_condition(lambda: self._step.final)
        if self._step is Step.SHIPPED:
            self._refuse_if("the carrier has the parcel")
        return self._decided(Step.CANCELLED if self._step in _NOT_CHARGED else self._step)

    @cancel_order.validator
    def _validate_cancel(self, _: SignalPayload) -> None:
        if self._step is Step.CANCELLED:
            _refuse(AlreadyDecided, Step.CANCELLED)
        self._refuse_if(self._why_no_cancel())
        if self._cancel_updates >= MAX_CANCEL_UPDATES:
            _refuse(TooManyChanges, "the order is being cancelled already")

    @workflow.update
    async def change_address(self, address: Address) -> Decided:
        """Change the address until `dispatch` starts."""
        self._address_updates += 1
        self._last_in_line = None  # what is signalled from now on comes after this one
        if not await self._change_address(_NewAddress(address)):
            self._refuse_if("the parcel is being handed over")
        return self._decided(self._step)

    @change_address.validator
    def _validate_address(self, address: Address) -> None:  # noqa: ARG002 - a validator has the update's signature
        if self._step.final:
            self._refuse_if(f"the order is {self._step}")
        if self._address_updates >= MAX_ADDRESS_UPDATES:
            _refuse(TooManyChanges, "its address was changed too often")

    @workflow.query
    def status(self) -> OrderStatus:
        """Where the workflow is. PostgreSQL also knows of attempts that are being repeated and of the shipment's
        own steps; `GET /orders/{id}/status` answers from there."""
        return OrderStatus(order_id=self._order.order_id, step=self._step, last_error=self._last_error)

    # --- what signals and updates share

    def _why_no_review(self) -> str | None:
        """Why a decision no longer counts; None when it does."""
        if self._step not in {Step.RECEIVED, Step.AWAITING_REVIEW}:
            return f"the order is {self._step}"
        if self._cancel:
            return "the order is being cancelled"
        if self._review is not None:
            return f"the review said {self._review.decision}"
        return None

    def _stands(self, review: Review) -> bool:
        """Whether the review was decided in this way, and nothing has overtaken it."""
        if self._review is None or self._cancel or self._review.decision is not review.decision:
            return False
        return self._step is not Step.REJECTED or review.decision is Verdict.REJECT

    def _why_no_cancel(self) -> str | None:
        return f"the order is {self._step}" if self._step.final else None

    def _refuse_if(self, reason: str | None) -> None:
        if reason:
            _refuse(TooLate, reason)

    def _decided(self, step: Step) -> Decided:
        return Decided(order_id=self._order.order_id, step=step)

    def _replaces_last_in_line(self, address: Address) -> bool:
        """A thousand addresses that were signalled while nobody worked are one change: to the latest of them."""
        waiting = self._last_in_line
        if waiting is None or not workflow.patched(_LATEST_ADDRESS):
            return False
        waiting.address = address
        return True

    def _too_many_addresses(self) -> bool:
        if self._address_signals <= MAX_ADDRESS_SIGNALS:
            return False
        return self._address_batches >= MAX_ADDRESS_SIGNALS or not workflow.patched(_LATEST_ADDRESS)

    async def _ignore_address(self, reason: str) -> None:
        signals.count("address", "ignored")
        await self._note("address_ignored", reason)

    async def _change_address(self, change: _NewAddress) -> bool:
        """Whether it was taken. One at a time, so that the last one in history is the one that stays."""
        async with self._address_turn:
            await workflow.wait_condition(lambda: self._written_down)
            if self._last_in_line is change:
                self._last_in_line = None
            address = change.address
            decision = await workflow.execute_activity_method(
                OrderActivities.change_address,
                AddressChange(order_id=self._order.order_id, address=address),
                **policies.DATABASE,
            )
            if decision.accepted:
                await self._tell_shipment("address", address)
            return decision.accepted

    async def _note(self, event: str, reason: str) -> None:
        if not self._may_note(event):
            return
        await workflow.wait_condition(lambda: self._written_down)
        await workflow.execute_activity_method(
            OrderActivities.note,
            NoteRequest(order_id=self._order.order_id, type=event, payload={"reason": reason}),
            **policies.DATABASE,
        )

    def _may_note(self, event: str) -> bool:
        # Silently: a flood of thousands in one workflow task leaves no time for a log line each.
        self._notes[event] += 1
        if self._notes.total() <= MAX_NOTES:
            return True
        return self._notes[event] <= MAX_NOTES and workflow.patched(_NOTES_PER_TYPE)


def _refuse(error: type[Exception], reason: str) -> NoReturn:
    raise ApplicationError(reason, type=error.__name__, non_retryable=True)


def _fields_at_fault(error: ValidationError) -> str:
    """Their names if they are an address's; nothing else of what was sent, which may be personal, or very long."""
    names = {str(problem["loc"][0]) for problem in error.errors(include_input=False) if problem["loc"]}
    return ", ".join(sorted(names & Address.model_fields.keys())) or "not an address"
