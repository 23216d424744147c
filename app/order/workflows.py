"""`OrderWorkflow`: the life of an order, from its receipt to its end.

Signals and updates only set facts (`_review`, `_cancel`, …) or take what changes no step (addresses, notes); the one
line of steps in `run` reads those facts where they count. So there is one decision per order, in history order.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final, NoReturn

from pydantic import BaseModel, ValidationError
from temporalio import workflow
from temporalio.common import WorkflowIDReusePolicy
from temporalio.exceptions import (
    ApplicationError,
    ChildWorkflowError,
    FailureError,
    WorkflowAlreadyStartedError,
)

with workflow.unsafe.imports_passed_through():
    from app.domain.steps import Step
    from app.errors import (
        AlreadyDecided,
        IllegalTransition,
        InvalidRequest,
        OrderRejected,
        PaymentConflict,
        PaymentDeclined,
        ReviewOutdated,
        TooLate,
        TooManyChanges,
    )
    from app.order.activities import OrderActivities
    from app.order.bodies import ReviewBody
    from app.order.models import (
        AddressChange,
        CloseOrder,
        Decided,
        LocateOrder,
        NoteRequest,
        OrderInput,
        OrderResult,
        OrderStatus,
        ReopenReview,
        Review,
        ReviewDecision,
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
        SignalledAddress,
        shipping_workflow_id,
    )
    from app.shipping.workflows import ShippingWorkflow
    from app.workflow import execution, policies, signals
    from app.workflow.failures import failed_with, message

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

#: Where a decision on a new address leads to.
_AFTER_SECOND_REVIEW: Final = {Verdict.APPROVE: Step.PREPARED, Verdict.REJECT: Step.CANCELLED}

#: A cancellation at these steps is the end: nothing is charged any more.
_NOT_CHARGED: Final = frozenset({Step.RECEIVED, Step.AWAITING_REVIEW})


@dataclass
class _NewAddress:
    """An address that waits for its turn to be written."""

    address: Address


#: Orders that began before shipped although the cancellation was there before the shipment was.
_CANCELLED_BEFORE_SHIPPING: Final = "cancelled-before-shipping"

#: Orders that began before believed a `dispatch_failed` also of a shipment that then ended otherwise.
_GAVE_UP_ITSELF: Final = "gave-up-itself"

#: Runs that began before failed where an earlier run, before a reset, had been further already.
_CAUGHT_UP: Final = "caught-up"

#: Runs that began before failed where an earlier one had started the shipment.
_NEXT_SHIPMENT: Final = "next-shipment"

#: Runs that were reset before refunded at once, whatever the shipment of an earlier run was about to do.
_MAY_BE_UNDER_WAY: Final = "may-be-under-way"

#: Runs that were reset before ended as they saw it themselves.
_AS_WRITTEN_DOWN: Final = "as-written-down"

#: Runs that were reset before told the shipment of an earlier run nothing.
_TOLD_BY_ID: Final = "told-by-id"

#: Where an order is from the moment its charge may have begun until its end.
_PAID_FOR: Final = frozenset({Step.CHARGING, Step.CHARGED, Step.PREPARED})

#: Seconds between two looks whether the shipment of an earlier run has ended.
_FIRST_PAUSE: Final = 1.0
_LONGEST_PAUSE: Final = 600.0


@workflow.defn
class OrderWorkflow:
    """Receive, validate, wait for a review, charge, ship; refund what was charged and cannot be shipped."""

    @workflow.init
    def __init__(self, order: OrderInput) -> None:
        self._order = order
        self._step = Step.RECEIVED
        self._last_error: str | None = None
        self._written_down = False
        self._caught_up = False
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
        #: The address as it is written down, and how many changes of it are on their way there.
        self._address = order.request.address
        self._changing = 0
        #: Digest of what was approved, or rejected.
        self._reviewed = ""
        self._reopened = False
        self._address_final = False

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
        for step in (
            self._receive,
            self._validate,
            self._await_review,
            self._charge,
            self._confirm_address,
            self._ship,
        ):
            try:
                await step()
            except FailureError as error:
                await self._catch_up(error)
            if self._step.final:
                break
        if _is_reset(_AS_WRITTEN_DOWN):
            self._step = await self._locate()
        await workflow.wait_condition(workflow.all_handlers_finished)
        return OrderResult(order_id=self._order.order_id, step=self._step)

    # --- the steps, in their order

    async def _receive(self) -> None:
        await execution.write(OrderActivities.receive, self._order, local=self._order.local_steps)
        self._written_down = True

    async def _validate(self) -> None:
        if self._cancel:
            await self._close(Step.CANCELLED, "cancelled before the review")
            return
        try:
            await execution.write(OrderActivities.validate, self._order, local=self._order.local_steps)
        except FailureError as error:
            self._enter_failed(Step.REJECTED, error, OrderRejected)
        else:
            self._step = Step.AWAITING_REVIEW

    async def _await_review(self) -> None:
        if self._step is Step.CHARGING:
            return  # An earlier run was reviewed: see `_catch_up`.
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
                    money=self._order.total,
                    approved=self._reviewed,
                    approval_note=self._review.note if self._review else "",
                ),
                **policies.PAYMENT,
            )
        except FailureError as error:
            self._enter_failed(Step.PAYMENT_FAILED, error, PaymentDeclined, PaymentConflict)
            return
        self._step = Step.CHARGED
        if self._cancel and not self._may_be_under_way():
            await self._refund(Step.CANCELLED, "cancelled during the charge")

    async def _confirm_address(self) -> None:
        """With `review`: while the address is another than was approved, ask for a review of it. Afterwards it stays
        as it is."""
        if self._order.address_after_review != "review":
            return
        while not self._step.final:
            await workflow.wait_condition(lambda: self._changing == 0 or self._cancel)
            if self._cancel and self._may_be_under_way():
                return  # `_ship` calls it off
            if self._cancel:
                await self._refund(Step.CANCELLED, "cancelled before the parcel was made ready")
            elif self._changing:
                continue  # one more has arrived since the condition held
            elif self._digest() != self._reviewed:
                await self._review_again()
            else:
                # Without an `await` since it was compared.
                self._address_final = True
                return

    async def _ship(self) -> None:
        # In turn behind every address that was sent before, so that none of them comes too late for the handover.
        async with self._address_turn:
            called_off = self._called_off()
            shipment = None if called_off else await self._start_shipment(WorkflowIDReusePolicy.REJECT_DUPLICATE)
        if called_off:
            await self._refund(Step.CANCELLED, "cancelled before the shipment")
            return
        self._shipment = shipment = shipment or await self._start_next_shipment()
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

    async def _review_again(self) -> None:
        """The order keeps its step; without an approval it is refunded. A cancellation is the caller's to see."""
        order, self._review, self._reopened = self._order, None, True
        await workflow.execute_activity_method(
            OrderActivities.reopen_review,
            ReopenReview(
                order_id=order.order_id, review_timeout_seconds=order.review_timeout_seconds, digest=self._digest()
            ),
            **policies.DATABASE,
        )
        try:
            await workflow.wait_condition(
                lambda: self._cancel or self._review is not None,
                timeout=timedelta(seconds=order.review_timeout_seconds),
                timeout_summary="review of the new address",
            )
        except TimeoutError:
            pass  # as in `_await_review`
        self._reopened = False
        if not self._cancel:
            await self._settle_review(self._review)

    async def _settle_review(self, review: Review | None) -> None:
        if review is None:
            await self._call_off("nobody reviewed the new address in time")
            return
        await workflow.execute_activity_method(
            OrderActivities.settle_review,
            ReviewDecision(
                order_id=self._order.order_id, decision=review.decision, note=review.note, digest=self._reviewed
            ),
            **policies.DATABASE,
        )
        if review.decision is Verdict.REJECT:
            await self._call_off("the review rejected the new address")

    async def _call_off(self, reason: str) -> None:
        if self._may_be_under_way():
            self._cancel = True  # only the shipment of the earlier run knows where the parcel is
        else:
            await self._refund(Step.CANCELLED, reason)

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

    async def _catch_up(self, error: FailureError) -> None:
        """An earlier run of this order, before a reset, has been further than this one is. What is written down stands:
        a closed order is closed, and one whose charge has begun goes on from there, whatever was decided here."""
        if not failed_with(error, IllegalTransition) or not workflow.patched(_CAUGHT_UP):
            raise error
        step = await self._locate()
        if step.final:
            self._step = step
        elif step in _PAID_FOR and self._step not in _PAID_FOR:
            self._step, self._caught_up = Step.CHARGING, True
        else:
            raise error

    async def _locate(self) -> Step:
        status = await workflow.execute_activity_method(
            OrderActivities.locate, LocateOrder(order_id=self._order.order_id), **policies.DATABASE
        )
        self._last_error = status.last_error
        return status.step

    def _may_be_under_way(self) -> bool:
        """Whether a shipment of an earlier run may have the parcel; then only that shipment may be called off."""
        return self._caught_up or _is_reset(_MAY_BE_UNDER_WAY)

    def _called_off(self) -> bool:
        """Whether the order was cancelled while nobody has been told to ship."""
        return self._cancel and not self._may_be_under_way() and workflow.patched(_CANCELLED_BEFORE_SHIPPING)

    async def _start_next_shipment(self) -> workflow.ChildWorkflowHandle[ShippingWorkflow, ShippingResult]:
        """Another one under the same id, as soon as that of the earlier run has ended. It asks the tables and the
        carrier what became of the parcel and ships nothing twice; and this run hears of it."""
        pause, told = _FIRST_PAUSE, False
        while (shipment := await self._start_shipment(WorkflowIDReusePolicy.ALLOW_DUPLICATE)) is None:
            if self._cancel and not told:
                await self._tell_shipment_by_id("cancel")
                pause, told = _FIRST_PAUSE, True
            with contextlib.suppress(TimeoutError):
                await (workflow.sleep(pause) if told else workflow.wait_condition(lambda: self._cancel, timeout=pause))
            pause = min(pause * 2, _LONGEST_PAUSE)
        return shipment

    async def _start_shipment(
        self, reuse: WorkflowIDReusePolicy
    ) -> workflow.ChildWorkflowHandle[ShippingWorkflow, ShippingResult] | None:
        """Returns when the child has really started; only then may its parent close without losing it. None if there
        is one of an earlier run, before a reset."""
        order = self._order
        try:
            return await workflow.start_child_workflow(
                ShippingWorkflow.run,
                ShippingInput(
                    order_id=order.order_id,
                    payment_id=order.request.payment_id,
                    money=order.total,
                    address=order.request.address,
                    dispatch_attempts=order.dispatch_attempts,
                    order_task_queue=order.order_task_queue,
                    local_steps=order.local_steps,
                    cancelled=self._cancel,
                ),
                id=shipping_workflow_id(order.order_id),
                task_queue=order.shipping_task_queue,
                parent_close_policy=workflow.ParentClosePolicy.ABANDON,
                id_reuse_policy=reuse,
            )
        except WorkflowAlreadyStartedError:
            if not workflow.patched(_NEXT_SHIPMENT):
                raise
            return None

    async def _tell_shipment(self, signal: str, *args: Address) -> None:
        if self._shipment is None:
            return
        try:
            await self._shipment.signal(signal, args=list(args))
        except FailureError:
            if _is_reset(_TOLD_BY_ID):
                # It may run: Temporal does not take it for a child of this run, which did not start it.
                await self._tell_shipment_by_id(signal, *args)
                return
            # It has ended in the meantime; its result, which `_ship` awaits, says how.
            workflow.logger.info("the shipment ended before the signal reached it", extra={"signal": signal})

    async def _tell_shipment_by_id(self, signal: str, *args: Address) -> None:
        shipment = workflow.get_external_workflow_handle(shipping_workflow_id(self._order.order_id))
        try:
            await shipment.signal(signal, args=list(args))
        except FailureError:
            workflow.logger.info("the shipment ended before the signal reached it", extra={"signal": signal})

    async def _settle_failed_shipment(self, error: ChildWorkflowError) -> None:
        reason = self._dispatch_failed
        if reason is None or (not _gave_up(error) and workflow.patched(_GAVE_UP_ITSELF)):
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
            money=self._order.total,
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
            self._decide(Review(decision=Verdict.APPROVE))

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
            address = SignalledAddress.model_validate(payload[0] if len(payload) == 1 else None).address
        except ValidationError as error:
            await self._ignore_address(f"not valid: {_fields_at_fault(error)}")
            return
        if forbidden := self._why_no_address() or _refused_before(address):
            await self._ignore_address(forbidden)
        elif self._replaces_last_in_line(address):
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
        leads_to = _AFTER_SECOND_REVIEW[review.decision] if self._reopened else review.decision.leads_to
        self._decide(review)
        return self._decided(leads_to)

    @review.validator
    def _validate_review(self, review: Review) -> None:
        _refuse_unless_valid(ReviewBody, review)
        if self._stands(review):
            _refuse(AlreadyDecided, review.decision.leads_to)
        self._refuse_if(self._why_no_review())
        self._refuse_if_outdated(review.digest)

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
    def _validate_address(self, address: Address) -> None:
        _refuse_unless_valid(SignalledAddress, address)
        if self._step.final:
            self._refuse_if(f"the order is {self._step}")
        self._refuse_if(self._why_no_address())
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
        if self._step not in {Step.RECEIVED, Step.AWAITING_REVIEW} and not self._reopened:
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

    def _why_no_address(self) -> str | None:
        """Why the review forbids another address; None when it does not."""
        if self._review is None or self._review.decision is not Verdict.APPROVE:
            return None
        match self._order.address_after_review:
            case "allow":
                return None
            case "review":
                return "the parcel is being made ready" if self._address_final else None
            case _:
                return "it was approved for the address that it has"

    def _decide(self, review: Review) -> None:
        self._review, self._reviewed = review, self._digest()

    def _digest(self) -> str:
        """Of what there is to approve."""
        return self._order.digest(self._address)

    def _refuse_if_outdated(self, digest: str | None) -> None:
        if digest is not None and (self._changing or digest != self._digest()):
            reason = "the address is being changed" if self._changing else "it is not what was looked at any more"
            raise ApplicationError(reason, type=ReviewOutdated.__name__, non_retryable=True)

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
        self._changing += 1
        try:
            async with self._address_turn:
                await workflow.wait_condition(lambda: self._written_down)
                if self._last_in_line is change:
                    self._last_in_line = None
                return await self._write_address(change.address)
        finally:
            self._changing -= 1

    async def _write_address(self, address: Address) -> bool:
        order_id, digest = self._order.order_id, self._order.digest(address)
        decision = await workflow.execute_activity_method(
            OrderActivities.change_address,
            AddressChange(order_id=order_id, address=address, digest=digest),
            **policies.DATABASE,
        )
        if decision.accepted:
            self._address = address
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


def _is_reset(change: str) -> bool:
    """Whether this run goes on from the history of an earlier one: `temporal workflow reset`. If so, `change` is in
    the history from now on, and it is the history that a replay goes by: what replays it may not know the run's id."""
    info = workflow.info()
    reset = info.original_execution_run_id not in {"", info.run_id}
    return (reset or workflow.unsafe.is_replaying()) and workflow.patched(change)


def _gave_up(error: ChildWorkflowError) -> bool:
    """Whether the shipment itself decided to fail; then it has asked the carrier."""
    return isinstance(error.cause, ApplicationError) and error.cause.type == DispatchFailed.__name__


def _refused_before(address: Address) -> str | None:
    """Why an address was ignored by orders that began before unknown fields were taken."""
    if address.model_extra and not workflow.patched("address-with-unknown-fields"):
        return "not valid: not an address"
    return None


def _refuse_unless_valid(rules: type[BaseModel], sent: BaseModel) -> None:
    """For validators alone, which are not replayed. The API has looked at it already; another client has not."""
    try:
        rules.model_validate(sent.model_dump())
    except ValidationError as error:
        reason = f"not valid: {_fields_at_fault(error, rules)}"
        raise ApplicationError(reason, type=InvalidRequest.__name__, non_retryable=True) from None


def _fields_at_fault(error: ValidationError, rules: type[BaseModel] = SignalledAddress) -> str:
    """Their names if they are the model's; nothing else of what was sent, which may be personal, or very long."""
    names = {str(problem["loc"][0]) for problem in error.errors(include_input=False) if problem["loc"]}
    return ", ".join(sorted(names & rules.model_fields.keys())) or "not an address"
