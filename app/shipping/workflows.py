"""`ShippingWorkflow`: a parcel's life, started by an order and able to finish without it."""

from __future__ import annotations

import asyncio
from typing import Any, Final

from temporalio import workflow
from temporalio.exceptions import ActivityError, ApplicationError, FailureError

with workflow.unsafe.imports_passed_through():
    from app.domain.steps import Step
    from app.errors import CarrierUnavailable
    from app.payment.activities import PaymentActivities
    from app.payment.models import RefundRequest
    from app.shipping.activities import ShippingActivities
    from app.shipping.carrier import Handover
    from app.shipping.models import (
        DispatchFailed,
        Shipment,
        ShippingInput,
        ShippingOutcome,
        ShippingResult,
    )
    from app.workflow import execution, policies
    from app.workflow.failures import failed_with, message


#: Shipments that began before ended where they stood when somebody cancelled them in Temporal.
_CANCELLED_IN_TEMPORAL: Final = "cancelled-in-temporal"

#: Shipments that began before took whatever ended a recall for a carrier that does not answer.
_ONLY_SILENCE_GIVES_UP: Final = "only-silence-gives-up"


@workflow.defn
class ShippingWorkflow:
    """Prepare, dispatch; recall when told to or when nobody takes the parcel.

    Whether a parcel that is being handed over can still be stopped is for the carrier to say: `recall` asks it,
    and its answer is the answer.
    """

    @workflow.init
    def __init__(self, shipping: ShippingInput) -> None:
        self._shipping = shipping
        self._shipment = Shipment(order_id=shipping.order_id)
        self._step = Step.CHARGED
        self._told_to_cancel = shipping.cancelled
        self._recalled = False
        self._failure = ""

    @workflow.run
    async def run(self, shipping: ShippingInput) -> ShippingResult:  # noqa: ARG002 - `__init__` has it
        story = asyncio.create_task(self._live())
        while not story.done():
            try:
                await asyncio.shield(story)
            except asyncio.CancelledError:
                # Somebody cancelled the workflow itself, in Temporal's UI say. Where the parcel is, the carrier must be
                # asked all the same: it is taken as the order's cancellation, as the order's own workflow takes it.
                if workflow.patched(_CANCELLED_IN_TEMPORAL):
                    self._told_to_cancel = True
                elif not story.done():
                    story.cancel()
        return story.result()

    async def _live(self) -> ShippingResult:
        await self._prepare()
        handover = await self._dispatch() or await self._recall()
        if handover:
            self._step = Step.SHIPPED
            return ShippingResult(outcome=ShippingOutcome.SHIPPED, tracking=handover.tracking)
        # Not by being told to cancel alone: a carrier that was given up may have the parcel.
        if self._told_to_cancel and self._recalled:
            if not await self._tell_parent("recalled"):
                await self._refund(Step.CANCELLED, "cancelled before the carrier took the parcel")
            return ShippingResult(outcome=ShippingOutcome.RECALLED)
        if not await self._tell_parent("dispatch_failed", DispatchFailed(reason=self._failure)):
            await self._refund(Step.SHIPPING_FAILED, self._failure)
        raise ApplicationError(self._failure, type=DispatchFailed.__name__, non_retryable=True)

    # --- the story

    async def _prepare(self) -> None:
        await execution.write(ShippingActivities.prepare, self._shipment, local=self._shipping.local_steps)
        self._step = Step.PREPARED

    async def _dispatch(self) -> Handover | None:
        """The handover; None when it was given up or called off, with the parcel's whereabouts unknown."""
        if self._told_to_cancel:
            return None
        dispatch = workflow.start_activity_method(
            ShippingActivities.dispatch,
            Shipment(order_id=self._shipment.order_id, give_up_after=self._shipping.dispatch_attempts),
            **policies.DISPATCH,
        )
        await workflow.wait_condition(lambda: dispatch.done() or self._told_to_cancel)
        if not dispatch.done():
            dispatch.cancel()
        try:
            return await dispatch
        except ActivityError as error:
            self._failure = message(error)
            return None

    async def _recall(self) -> Handover | None:
        # The customer's cancellation waits for an answer as long as it takes: the money goes back only when it is
        # certain that the parcel stays. A parcel that nobody takes is given up one day.
        patience = 0 if self._told_to_cancel else policies.RECALL_SILENCES
        asked = Shipment(order_id=self._shipment.order_id, give_up_after=patience)
        try:
            handover = await workflow.execute_activity_method(ShippingActivities.recall, asked, **policies.RECALL)
        except ActivityError as error:
            if not failed_with(error, CarrierUnavailable) and workflow.patched(_ONLY_SILENCE_GIVES_UP):
                # It says nothing about the parcel, so there is nothing to tell: this fails visibly, and the parent,
                # or `trellis reconcile`, asks again.
                raise
            self._failure = f"{self._failure}; asked for it back: {message(error)}"
            return None
        self._recalled = handover is None
        return handover

    async def _tell_parent(self, signal: str, *args: DispatchFailed) -> bool:
        """Whether there is a parent that will refund. It may be gone: children are abandoned, not stopped."""
        parent = workflow.info().parent
        if parent is None:
            return False
        # Without the run id: an order whose run was reset is still the same order.
        handle = workflow.get_external_workflow_handle(parent.workflow_id)
        try:
            await handle.signal(signal, args=list(args))
        except FailureError:
            workflow.logger.info("the parent is closed: the shipment settles the order by itself")
            return False
        return True

    async def _refund(self, close_as: Step, reason: str) -> None:
        await workflow.execute_activity_method(
            PaymentActivities.refund,
            RefundRequest(
                order_id=self._shipping.order_id,
                payment_id=self._shipping.payment_id,
                money=self._shipping.money,
                close_as=close_as,
                reason=reason,
            ),
            task_queue=self._shipping.order_task_queue,
            **policies.PAYMENT,
        )
        self._step = close_as

    # --- what reaches it from outside; with any arguments, as in `OrderWorkflow`

    @workflow.signal
    def cancel(self, *_: Any) -> None:
        """The order was cancelled: do not hand the parcel over, or get it back."""
        self._told_to_cancel = True

    @workflow.signal
    def address(self, *_: Any) -> None:
        """The order has a new address, already written down: `dispatch` reads it there."""

    @workflow.query
    def status(self) -> Step:
        """Where the parcel is."""
        return self._step
