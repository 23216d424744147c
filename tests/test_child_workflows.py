"""The shipment as a child of the order: where it runs, what it is told, and that it outlives its parent."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator
from typing import Any

import pytest
from temporalio.api.enums.v1 import EventType, ParentClosePolicy, WorkflowIdReusePolicy
from temporalio.api.history.v1 import HistoryEvent
from temporalio.client import WorkflowExecutionStatus, WorkflowFailureError, WorkflowHandle
from temporalio.common import RetryPolicy, WorkflowIDReusePolicy
from temporalio.exceptions import ApplicationError, WorkflowAlreadyStartedError
from temporalio.worker import UnsandboxedWorkflowRunner

from app.domain.steps import Step
from app.errors import TooLate
from app.order.models import ORDER_TASK_QUEUE, OrderInput, StartOrder, order_workflow_id
from app.settings import Settings
from app.shipping.activities import ShippingActivities
from app.shipping.models import (
    SHIPPING_TASK_QUEUE,
    Shipment,
    ShippingInput,
    ShippingOutcome,
    ShippingResult,
    shipping_workflow_id,
)
from app.shipping.repository import Parcel, ShipmentRepository
from app.shipping.workflows import ShippingWorkflow
from app.workers import order_worker, shipping_worker
from app.workflow import policies
from tests.bookkeeping import USD
from tests.record_histories import recall_ended_by_hand, recorded, shipment_cancelled, unheard
from tests.shop import HOME, OFFICE, REFUSED, UNANSWERED, UNHEARD, Order, Shop, fresh_settings, open_shop, seconds
from tests.support import activities_of

RUNNING, FAILED, COMPLETED = (
    WorkflowExecutionStatus.RUNNING,
    WorkflowExecutionStatus.FAILED,
    WorkflowExecutionStatus.COMPLETED,
)
PREPARED = ["received", "awaiting_review", "charging", "charged", "prepared"]


@pytest.fixture(scope="module")
async def shop(servers: Any, template: str) -> AsyncIterator[Shop]:
    """One shop for the module; at its end the tables and the partners must agree about every order."""
    async with fresh_settings(servers, template) as settings, open_shop(settings) as opened:
        yield opened
        await opened.audit()


# --- names that others rely on


def test_queues_and_workflow_ids_are_the_published_ones() -> None:
    assert (ORDER_TASK_QUEUE, SHIPPING_TASK_QUEUE) == ("default", "shipping-tq")
    assert order_workflow_id("o-1") == "order/o-1"
    assert shipping_workflow_id("o-1") == "shipping/o-1"
    by_default = Settings.model_construct()
    assert (by_default.order_task_queue, by_default.shipping_task_queue) == ("default", "shipping-tq")
    order = OrderInput(order_id="o-1", request=StartOrder(payment_id="pay-1"))
    assert (order.order_task_queue, order.shipping_task_queue) == ("default", "shipping-tq")


def test_each_queue_serves_its_own(shop: Shop) -> None:
    orders, shipments = order_worker(shop.services), shipping_worker(shop.services)
    assert _names(orders.activities) >= {"receive", "validate", "charge"}
    assert _names(shipments.activities) == {"prepare", "dispatch", "recall"}
    assert "OrderWorkflow" in _names(orders.workflows)
    assert _names(shipments.workflows) == {"ShippingWorkflow"}


def _names(parts: Any) -> set[str]:
    return {part.__name__ for part in parts}


# --- a child that is abandoned, not stopped


async def test_the_shipment_is_an_abandoned_child_on_its_own_queue(shop: Shop) -> None:
    order = await shop.approved()
    assert await order.ends() is Step.SHIPPED
    (initiated,) = await order.recorded(EventType.EVENT_TYPE_START_CHILD_WORKFLOW_EXECUTION_INITIATED)
    asked = initiated.start_child_workflow_execution_initiated_event_attributes
    assert asked.workflow_id == f"shipping/{order.id}"
    assert asked.workflow_type.name == "ShippingWorkflow"
    assert asked.parent_close_policy == ParentClosePolicy.PARENT_CLOSE_POLICY_ABANDON
    assert asked.workflow_id_reuse_policy == WorkflowIdReusePolicy.WORKFLOW_ID_REUSE_POLICY_REJECT_DUPLICATE
    assert asked.task_queue.name == shop.settings.shipping_task_queue
    shipment = await order.shipment.describe()
    assert shipment.parent_id == order.workflow.id
    assert shipment.task_queue == shop.settings.shipping_task_queue
    assert shipment.status is COMPLETED
    assert await _activities(order.shipment) == ["prepare", "dispatch"]


async def test_the_shipment_has_really_started_before_its_parent_could_close(shop: Shop) -> None:
    order = await shop.order()
    async with shop.withholding(order.id):
        await order.approve()
        await order.recorded(EventType.EVENT_TYPE_CHILD_WORKFLOW_EXECUTION_STARTED)
        await order.workflow.terminate("as an operator would")
        assert (await order.shipment.describe()).status is RUNNING
    assert (await order.shipment.result())["outcome"] == ShippingOutcome.SHIPPED


async def test_a_shipment_whose_parent_was_terminated_ships(shop: Shop) -> None:
    order = await _without_parent(shop)
    result = await order.shipment.result()
    assert result["outcome"] == ShippingOutcome.SHIPPED
    assert await order.status() == (Step.SHIPPED, None)
    assert await order.path() == [*PREPARED, "shipped"]


async def test_a_refused_shipment_whose_parent_was_terminated_refunds_by_itself(shop: Shop) -> None:
    order = await _without_parent(shop, address=REFUSED)
    failure = await _end_of(order.shipment)
    assert "undeliverable" in failure.message
    step, error = await order.status()
    assert step is Step.SHIPPING_FAILED
    assert "undeliverable" in (error or "")
    assert await _payment_status(order) == "REFUNDED"
    assert len(await shop.ledger.refunds_of(order.payment_id)) == 1


async def test_a_recalled_shipment_whose_parent_was_terminated_refunds_by_itself(shop: Shop) -> None:
    order = await _without_parent(shop, address=UNANSWERED, cancel=True)
    result = await order.shipment.result()
    assert result["outcome"] == ShippingOutcome.RECALLED
    assert (await order.status())[0] is Step.CANCELLED
    assert await _payment_status(order) == "REFUNDED"


async def _without_parent(shop: Shop, *, address: Any = HOME, cancel: bool = False) -> Order:
    """An order whose workflow is terminated before its shipment has done anything."""
    async with shop.without_shipping():
        order = await shop.approved(address=address)
        await order.recorded(EventType.EVENT_TYPE_CHILD_WORKFLOW_EXECUTION_STARTED)
        if cancel:
            await order.cancel()
            await order.recorded(EventType.EVENT_TYPE_EXTERNAL_WORKFLOW_EXECUTION_SIGNALED)
        await order.workflow.terminate("as an operator would")
        assert (await order.status())[0] is Step.CHARGED
    return order


# --- a child that is lost


async def test_an_order_whose_shipment_was_terminated_asks_for_the_parcel_and_refunds(shop: Shop) -> None:
    order = await shop.approved(address=UNANSWERED, attempts=10)
    await order.tells("attempt_failed")
    await order.shipment.terminate("as an operator would")
    assert await order.ends() is Step.SHIPPING_FAILED
    assert (await order.activities())[-2:] == ["recall", "refund"]
    assert [event.type for event in await order.events("recalled", "refunded")] == ["recalled", "refunded"]
    assert "ended without a result" in ((await order.status())[1] or "")


async def test_an_order_whose_shipment_was_terminated_before_it_began_is_refunded(shop: Shop) -> None:
    async with shop.without_shipping():
        order = await shop.approved()
        await order.recorded(EventType.EVENT_TYPE_CHILD_WORKFLOW_EXECUTION_STARTED)
        await order.shipment.terminate("as an operator would")
    assert await order.ends() is Step.SHIPPING_FAILED
    assert await order.path() == [*PREPARED[:4], "shipping_failed"]


async def test_an_order_whose_shipment_was_terminated_too_late_is_shipped(shop: Shop) -> None:
    order = await shop.order()
    async with shop.withholding(order.id):
        await order.approve()
        await shop.taken(order)
        await order.shipment.terminate("as an operator would")
        assert await order.ends() is Step.SHIPPED
    assert not await shop.ledger.refunds_of(order.payment_id)


async def test_an_order_whose_shipment_did_not_say_itself_that_it_gave_up_asks_for_the_parcel(shop: Shop) -> None:
    """Whoever says so: the parcel may be on its way, here it is."""
    order = await shop.order()
    async with shop.withholding(order.id):
        await order.approve()
        await shop.taken(order)
        await order.workflow.signal("dispatch_failed", {"reason": "says who?"})
        await order.shipment.terminate("as an operator would")
        assert await order.ends() is Step.SHIPPED
    assert not await shop.ledger.refunds_of(order.payment_id)


async def test_an_order_whose_recall_was_ended_by_hand_asks_again(shop: Shop) -> None:
    order = await recall_ended_by_hand(shop, address=UNHEARD)
    assert await order.ends() is Step.SHIPPED
    assert not await shop.ledger.refunds_of(order.payment_id)


# --- a child that is cancelled in Temporal: taken as the order's cancellation, wherever it is


async def test_a_shipment_cancelled_in_temporal_before_it_began_is_a_cancelled_order(shop: Shop) -> None:
    async with shop.without_shipping():
        order = await shop.approved()
        await order.recorded(EventType.EVENT_TYPE_CHILD_WORKFLOW_EXECUTION_STARTED)
        await order.shipment.cancel()
    assert await order.ends() is Step.CANCELLED
    assert await _activities(order.shipment) == ["prepare", "recall"]
    assert await _payment_status(order) == "REFUNDED"


async def test_a_shipment_cancelled_in_temporal_while_nobody_answers_is_a_cancelled_order(shop: Shop) -> None:
    order = await shipment_cancelled(shop)
    assert await order.ends() is Step.CANCELLED
    assert (await order.shipment.result())["outcome"] == ShippingOutcome.RECALLED
    assert await _payment_status(order) == "REFUNDED"


async def test_a_shipment_cancelled_in_temporal_too_late_is_shipped(shop: Shop) -> None:
    order = await shop.order()
    async with shop.withholding(order.id):
        await order.approve()
        await shop.taken(order)
        await order.shipment.cancel()
        assert await order.ends() is Step.SHIPPED
    assert not await shop.ledger.refunds_of(order.payment_id)


@pytest.mark.parametrize("parent", ["alive", "gone"])
async def test_a_shipment_cancelled_in_temporal_still_waits_for_the_carrier(shop: Shop, parent: str) -> None:
    """The carrier took the parcel unheard, and does not say so for a while: no answer is not "not taken"."""
    async with unheard(shop) as order:
        if parent == "gone":
            await order.workflow.terminate("as an operator would")
        await order.shipment.cancel()
        await recorded(order.shipment, EventType.EVENT_TYPE_WORKFLOW_EXECUTION_CANCEL_REQUESTED)
    assert (await order.shipment.result())["outcome"] == ShippingOutcome.SHIPPED
    assert (await order.status())[0] is Step.SHIPPED
    assert not await shop.ledger.refunds_of(order.payment_id)


async def test_a_shipment_cancelled_in_temporal_without_a_parent_refunds_by_itself(shop: Shop) -> None:
    async with shop.without_shipping():
        order = await shop.approved()
        await order.recorded(EventType.EVENT_TYPE_CHILD_WORKFLOW_EXECUTION_STARTED)
        await order.workflow.terminate("as an operator would")
        await order.shipment.cancel()
    assert (await order.shipment.result())["outcome"] == ShippingOutcome.RECALLED
    assert (await order.status())[0] is Step.CANCELLED
    assert await _payment_status(order) == "REFUNDED"


# --- a carrier that is given up, and a database that is not


@pytest.fixture
async def hasty(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Shop]:
    """The shop with short pauses between attempts, and asking twice for the parcel of a carrier that was given up.
    Outside the sandbox, whose modules are copies."""
    retry = RetryPolicy(initial_interval=seconds(0.01), maximum_interval=seconds(0.01))
    for name in ("DISPATCH", "RECALL"):
        monkeypatch.setattr(policies, name, getattr(policies, name) | {"retry_policy": retry})
    monkeypatch.setattr(policies, "RECALL_SILENCES", 2)
    async with shop.closed():
        monkeypatch.setattr("app.temporal.runner.runner", lambda **_: UnsandboxedWorkflowRunner())
    yield shop
    async with shop.closed():
        monkeypatch.undo()


def _unreachable(monkeypatch: pytest.MonkeyPatch, *calls: int) -> None:
    """PostgreSQL is not there at these of the moments at which a shipment goes to its carrier, counted from 1."""
    reach, count = ShipmentRepository.begin_dispatch, itertools.count(1)

    async def unreliable(shipments: ShipmentRepository, order_id: str) -> Parcel:
        if next(count) in calls:
            raise ConnectionRefusedError
        return await reach(shipments, order_id)

    monkeypatch.setattr(ShipmentRepository, "begin_dispatch", unreliable)


async def _failures(order: Order) -> list[tuple[str, str, bool]]:
    told = [event.payload for event in await order.events("attempt_failed")]
    return [(each["activity"], each["error_type"], each["retryable"]) for each in told]


async def test_our_own_outage_does_not_use_up_the_carriers_attempts(
    hasty: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    _unreachable(monkeypatch, 1, 2, 3)
    order = await hasty.approved(attempts=2)
    assert await order.ends() is Step.SHIPPED
    assert await _failures(order) == [("dispatch", "DatabaseUnavailable", True)] * 3
    assert await _activities(order.shipment) == ["prepare", "dispatch"]


async def test_a_carrier_is_given_up_after_so_many_silences_of_its_own(
    hasty: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The second attempt at the handover, and the second at the recall.
    _unreachable(monkeypatch, 2, 5)
    async with hasty.outage("carrier"):
        order = await hasty.approved(attempts=2)
        assert await order.ends() is Step.SHIPPING_FAILED
    assert await _failures(order) == [
        (activity, error, retryable)
        for activity in ("dispatch", "recall")
        for error, retryable in (
            ("CarrierUnavailable", True),
            ("DatabaseUnavailable", True),
            ("CarrierUnavailable", False),
        )
    ]


async def test_a_parcel_is_asked_for_however_long_our_own_outage_lasts(
    hasty: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    _unreachable(monkeypatch, 2, 3, 4)
    order = await hasty.approved(address=UNHEARD, attempts=1)
    assert await order.ends() is Step.SHIPPED
    assert not await hasty.ledger.refunds_of(order.payment_id)


async def test_nothing_is_handed_over_for_an_order_that_is_closed(shop: Shop) -> None:
    """Its money may have gone back."""
    order = await shop.order()
    await order.cancel()
    assert await order.ends() is Step.CANCELLED
    shipping = ShippingActivities(ShipmentRepository(shop.pool), shop.services.carrier)
    with pytest.raises(TooLate, match="is closed"):
        await shipping.dispatch(Shipment(order_id=order.id))
    assert await shop.ledger.find_parcel(order.id) is None


# --- what they tell each other


async def test_a_shipment_that_gives_up_tells_its_parent_and_fails(shop: Shop) -> None:
    order = await shop.approved(address=REFUSED)
    assert await order.ends() is Step.SHIPPING_FAILED
    failure = await _end_of(order.shipment)
    assert failure.type == "DispatchFailed"
    assert (await order.shipment.describe()).status is FAILED
    assert await _signals(order.workflow) == ["approve", "dispatch_failed"]
    # The child has asked the carrier; its parent believes it, and only refunds.
    assert await order.activities() == ["receive", "validate", "charge", "refund"]


async def test_a_cancelled_order_tells_its_shipment(shop: Shop) -> None:
    order = await shop.approved(address=UNANSWERED, attempts=10)
    await order.tells("attempt_failed")
    await order.cancel()
    assert await order.ends() is Step.CANCELLED
    assert await _signals(order.shipment) == ["cancel"]
    assert await _activities(order.shipment) == ["prepare", "dispatch", "recall"]
    assert (await order.shipment.describe()).status is COMPLETED


async def test_a_new_address_is_passed_on_to_the_running_shipment(shop: Shop) -> None:
    async with shop.without_shipping():
        order = await shop.approved()
        await order.recorded(EventType.EVENT_TYPE_CHILD_WORKFLOW_EXECUTION_STARTED)
        await order.send_to(OFFICE)
        await order.recorded(EventType.EVENT_TYPE_EXTERNAL_WORKFLOW_EXECUTION_SIGNALED)
    assert await order.ends() is Step.SHIPPED
    assert await _signals(order.shipment) == ["address"]
    found = await shop.ledger.find_parcel(order.id)
    assert found is not None
    assert OFFICE.line1 in (found[1] or "")


async def test_a_foreign_client_cannot_break_a_shipment(shop: Shop) -> None:
    order = await shop.approved(address=UNANSWERED, attempts=10)
    await order.tells("attempt_failed")
    await order.shipment.signal("address")
    await order.shipment.signal("address", "nowhere")
    await order.shipment.signal("address", args=[HOME, "by Monday"])
    await order.shipment.signal("cancel", args=["please", "now"])
    result = await order.shipment.result()
    assert result["outcome"] == ShippingOutcome.RECALLED
    assert await order.ends() is Step.CANCELLED


async def test_the_shipment_answers_where_the_parcel_is(shop: Shop) -> None:
    order = await shop.order()
    async with shop.withholding(order.id):
        await order.approve()
        await shop.taken(order)
        assert await order.shipment.query(ShippingWorkflow.status) == Step.PREPARED
    await order.ends()
    assert await order.shipment.query(ShippingWorkflow.status) == Step.SHIPPED


async def test_a_shipment_started_again_by_hand_ships_nothing_twice(shop: Shop) -> None:
    order = await shop.approved()
    await order.ends()
    parcel = await shop.ledger.find_parcel(order.id)
    assert parcel is not None
    again = ShippingInput(order_id=order.id, payment_id=order.payment_id, money=USD)
    queue = shop.settings.shipping_task_queue
    with pytest.raises(WorkflowAlreadyStartedError):
        await shop.client.start_workflow(
            ShippingWorkflow.run,
            again,
            id=order.shipment.id,
            task_queue=queue,
            id_reuse_policy=WorkflowIDReusePolicy.REJECT_DUPLICATE,
        )
    # Under another id Temporal lets it; the tables know the parcel.
    result = await shop.client.execute_workflow(
        ShippingWorkflow.run, again, id=f"{order.shipment.id}-again", task_queue=queue
    )
    assert result == ShippingResult(outcome=ShippingOutcome.SHIPPED, tracking=parcel[0].tracking)
    assert await order.path() == [*PREPARED, "shipped"]


# --- reading Temporal


async def _end_of(shipment: WorkflowHandle[Any, Any]) -> ApplicationError:
    with pytest.raises(WorkflowFailureError) as caught:
        await shipment.result()
    assert isinstance(caught.value.cause, ApplicationError)
    return caught.value.cause


async def _history(workflow: WorkflowHandle[Any, Any]) -> list[HistoryEvent]:
    return [event async for event in workflow.fetch_history_events()]


async def _activities(workflow: WorkflowHandle[Any, Any]) -> list[str]:
    return activities_of(await _history(workflow))


async def _signals(workflow: WorkflowHandle[Any, Any]) -> list[str]:
    return [
        event.workflow_execution_signaled_event_attributes.signal_name
        for event in await _history(workflow)
        if event.event_type == EventType.EVENT_TYPE_WORKFLOW_EXECUTION_SIGNALED
    ]


async def _payment_status(order: Order) -> str:
    status: str = await order.shop.pool.fetchval("SELECT status FROM payments WHERE order_id = $1", order.id)
    return status
