"""What a workflow leaves behind when it is ended by force is brought to a correct end."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import timedelta
from typing import Any

import asyncpg
import pytest
from temporalio.api.enums.v1 import EventType
from temporalio.client import (
    Client,
    ScheduleActionExecutionStartWorkflow,
    WorkflowExecutionStatus,
    WorkflowFailureError,
    WorkflowHandle,
)

from app import failpoints
from app.audit.auditor import Auditor, Options, Sources
from app.audit.executions import Executions
from app.audit.models import Kind
from app.audit.repository import BooksRepository
from app.errors import PaymentUnavailable
from app.order.models import OrderInput, StartOrder
from app.order.workflows import OrderWorkflow
from app.payment.gateway import refund_key
from app.payment.models import ChargeRequest
from app.reconcile.models import RECONCILE_ID, ReconcileReport, ReconcileRequest
from app.reconcile.schedule import drop_schedule, keep_schedule
from app.reconcile.worker import reconciler
from app.reconcile.workflows import ReconcileWorkflow
from app.settings import Settings
from app.shipping.models import Address
from app.shipping.repository import ShipmentRepository
from app.steps import Step
from app.wiring import Services
from tests.bookkeeping import USD, Shop, opened_shop
from tests.shop import REFUSED, UNANSWERED, Order, open_shop
from tests.support import until

NOW = ReconcileRequest(apply=True, grace_seconds=0, settle_seconds=0)


class Broken:
    """An order whose workflow is ended by force."""

    def __init__(self, services: Services) -> None:
        self.services = services
        self.pool: asyncpg.Pool = services.pool
        self.id = f"o-{uuid.uuid4().hex[:8]}"
        self.charge = ChargeRequest(order_id=self.id, payment_id=f"pay-{self.id}", money=USD)
        self.handle: WorkflowHandle[Any, Any] | None = None

    async def start(self, *, task_queue: str = "nobody") -> None:
        """Start its workflow, on a queue that nobody serves unless told otherwise."""
        request = StartOrder(payment_id=self.charge.payment_id)
        self.handle = await self.services.temporal.start_workflow(
            OrderWorkflow.run,
            OrderInput(order_id=self.id, request=request, order_task_queue=task_queue),
            id=f"order/{self.id}",
            task_queue=f"{task_queue}-{self.id}",
        )

    async def end(self) -> None:
        """Terminate it, and wait until the list of workflows shows it."""
        assert self.handle
        await self.handle.terminate("test")
        async with asyncio.timeout(20):
            while self.id not in await self._closed():  # noqa: ASYNC110 - Temporal's own
                await asyncio.sleep(0.05)

    async def _closed(self) -> set[str]:
        return {order.order_id async for order in Executions(self.services.temporal).closed_orders()}

    async def reconcile(self, request: ReconcileRequest = NOW) -> ReconcileReport:
        """One pass."""
        return await reconciler(self.services, request).run()

    async def step(self) -> str | None:
        step: str | None = await self.pool.fetchval("SELECT state FROM orders WHERE id = $1", self.id)
        return step

    async def payment(self) -> str | None:
        status: str | None = await self.pool.fetchval("SELECT status FROM payments WHERE order_id = $1", self.id)
        return status

    async def told(self) -> list[str]:
        rows = await self.pool.fetch("SELECT type FROM events WHERE order_id = $1 ORDER BY id", self.id)
        return [row["type"] for row in rows]


@pytest.fixture
async def broken(services: Services, shop: Shop) -> AsyncIterator[Broken]:
    """An order with a workflow that nobody works on; at the end of the test the books are clean."""
    order = Broken(services)
    await order.start()
    yield order
    sources = Sources(provider=shop.partners, carrier=shop.partners)
    report = await Auditor(BooksRepository(services.pool), sources, Options(rechecks=())).run()
    assert report.violations == []


@pytest.fixture
async def shop(services: Services) -> AsyncIterator[Shop]:
    """A shop over the test's database."""
    async with opened_shop(services) as opened:
        yield opened


async def at(shop: Shop, order: Broken, step: str) -> None:
    """Take the order's row to a step, as its workflow would have."""
    await shop.order(order.id, Step(step))


@pytest.mark.parametrize("step", ["received", "awaiting_review"])
async def test_before_the_charge_it_is_cancelled(shop: Shop, broken: Broken, step: str) -> None:
    await at(shop, broken, "received")
    if step == "awaiting_review":
        await shop.orders.open_review(shop.input(broken.id))
    await broken.end()
    await broken.reconcile()
    assert (await broken.step(), await broken.payment()) == ("cancelled", None)
    assert (await broken.told())[-2:] == ["reconciled", "cancelled"]


async def test_in_the_charge_and_charged_it_is_refunded(shop: Shop, broken: Broken) -> None:
    await at(shop, broken, "charging")
    await broken.services.gateway.charge(broken.charge.payment_id, USD)
    await broken.end()
    await broken.reconcile()
    assert (await broken.step(), await broken.payment()) == ("cancelled", "REFUNDED")
    assert (await broken.told())[2:] == ["charging", "reconciled", "charged", "refunded", "cancelled"]


async def test_in_the_charge_and_not_charged_it_is_cancelled_and_settled_later(
    shop: Shop,
    broken: Broken,
) -> None:
    await at(shop, broken, "charging")
    await broken.end()
    await broken.reconcile(NOW.model_copy(update={"settle_seconds": 600}))
    assert (await broken.step(), await broken.payment()) == ("cancelled", "INIT")
    await broken.reconcile()
    assert (await broken.step(), await broken.payment()) == ("cancelled", "FAILED")


async def test_a_charge_that_comes_through_after_all_is_refunded(shop: Shop, broken: Broken) -> None:
    """The attempt was taken for dead, and was only slow."""
    await at(shop, broken, "charging")
    await broken.end()
    await broken.reconcile(NOW.model_copy(update={"settle_seconds": 600}))
    await broken.services.gateway.charge(broken.charge.payment_id, USD)
    await broken.reconcile()
    assert (await broken.step(), await broken.payment()) == ("cancelled", "REFUNDED")


async def test_charged_it_is_refunded(shop: Shop, broken: Broken) -> None:
    await at(shop, broken, "charged")
    await broken.end()
    await broken.reconcile()
    assert (await broken.step(), await broken.payment()) == ("cancelled", "REFUNDED")


async def test_a_parcel_that_the_carrier_has_is_shipped(shop: Shop, broken: Broken) -> None:
    await at(shop, broken, "prepared")
    address = Address(line1="1 Main St", city="Springfield", state="IL", zip="62701")
    await ShipmentRepository(shop.pool).begin_dispatch(broken.id)
    await broken.services.carrier.dispatch(broken.id, address)
    await broken.end()
    await broken.reconcile()
    assert (await broken.step(), await broken.payment()) == ("shipped", "CHARGED")


@pytest.mark.parametrize(("began", "step"), [(True, "shipping_failed"), (False, "cancelled")])
async def test_a_parcel_that_nobody_has_is_refunded(
    shop: Shop,
    broken: Broken,
    began: bool,
    step: str,
) -> None:
    await at(shop, broken, "prepared")
    if began:
        await ShipmentRepository(shop.pool).begin_dispatch(broken.id)
    await broken.end()
    await broken.reconcile()
    assert (await broken.step(), await broken.payment()) == (step, "REFUNDED")


async def test_an_order_that_was_never_written_down(broken: Broken) -> None:
    await broken.end()
    report = await broken.reconcile()
    assert [repair.action for repair in report.repairs if repair.order_id == broken.id] == ["write down and cancel"]
    assert await broken.told() == ["received", "reconciled", "cancelled"]


async def test_a_dry_run_changes_nothing(shop: Shop, broken: Broken) -> None:
    await at(shop, broken, "charged")
    await broken.end()
    report = await broken.reconcile(NOW.model_copy(update={"apply": False}))
    mine = [repair for repair in report.repairs if repair.order_id == broken.id]
    assert [(repair.found, repair.done) for repair in mine] == [("charged, workflow terminated", False)]
    assert (await broken.step(), "reconciled" in await broken.told()) == ("charged", False)


async def test_a_running_workflow_is_left_alone(shop: Shop, broken: Broken) -> None:
    await at(shop, broken, "charged")
    report = await broken.reconcile()
    assert broken.id not in {repair.order_id for repair in report.repairs}
    assert await broken.step() == "charged"


async def test_a_workflow_that_ended_a_moment_ago_is_left_alone(shop: Shop, broken: Broken) -> None:
    """One of its attempts may still be running."""
    await at(shop, broken, "charging")
    await broken.end()
    await shop.sql(f"UPDATE orders SET state_since = now() - interval '1 hour' WHERE id = '{broken.id}'")
    await broken.reconcile(NOW.model_copy(update={"grace_seconds": 60}))
    assert await broken.step() == "charging"


async def test_many_at_once_are_one(shop: Shop, broken: Broken) -> None:
    await at(shop, broken, "charged")
    await broken.end()
    await asyncio.gather(*(broken.reconcile() for _ in range(5)))
    await broken.reconcile()
    assert (await broken.step(), await broken.payment()) == ("cancelled", "REFUNDED")
    told = await broken.told()
    assert len(told) == len(set(told))


async def test_a_silent_provider_leaves_it_for_the_next_pass(shop: Shop, broken: Broken) -> None:
    class Silent:
        async def find_charge(self, payment_id: str) -> None:
            raise PaymentUnavailable("outage")

    await at(shop, broken, "charging")
    await broken.end()
    down = replace(broken.services, gateway=Silent())  # type: ignore[arg-type]
    report = await reconciler(down, NOW).run()
    mine = [repair for repair in report.repairs if repair.order_id == broken.id]
    assert [(repair.done, "outage" in repair.detail) for repair in mine] == [(False, True)]
    assert await broken.step() == "charging"
    await broken.reconcile()
    assert await broken.step() == "cancelled"


# --- the shipment and its order, ended by force one after the other


async def until_closed(order: Order) -> None:
    """Wait until Temporal's list of workflows shows the end of the order's."""

    async def listed() -> bool:
        return order.id in {closed.order_id async for closed in Executions(order.shop.client).closed_orders()}

    await until(listed, f"the end of {order.id}")


async def settled(order: Order) -> None:
    """The audit finds the order before it is reconciled, and nothing afterwards; the money went back once."""
    async with opened_shop(order.shop.services) as books:
        books.mine.add(order.id)
        assert await books.kinds(temporal=True) == {order.id: {Kind.OPEN_WITHOUT_WORKFLOW}}
        for _ in range(2):  # the second pass finds nothing to do
            await reconciler(order.shop.services, NOW).run()
        assert await books.kinds(temporal=True) == {}
    assert (await order.status())[0] is Step.SHIPPING_FAILED
    assert [event.type for event in await order.events("reconciled", "refunded", "shipping_failed")] == [
        "reconciled",
        "refunded",
        "shipping_failed",
    ]
    assert len(await order.shop.ledger.refunds_of(order.payment_id)) == 1


@pytest.mark.parametrize("end", ["cancel", "terminate"])
async def test_a_shipment_that_is_ended_when_its_order_is_gone(settings: Settings, end: str) -> None:
    async with open_shop(settings) as shop:
        order = await shop.approved(address=UNANSWERED, attempts=100)
        await order.tells("attempt_failed")
        await order.workflow.terminate("test")
        await until_closed(order)
        assert (await order.shipment.describe()).status is WorkflowExecutionStatus.RUNNING
        if end == "cancel":
            await order.shipment.cancel()
        else:
            await order.shipment.terminate("test")
        with pytest.raises(WorkflowFailureError):
            await order.shipment.result()
        assert (await order.status())[0] is Step.PREPARED
        await settled(order)


@pytest.mark.parametrize("given_back", [False, True])
async def test_an_order_that_is_ended_when_its_shipment_gave_up(settings: Settings, given_back: bool) -> None:
    """The shipment has told it, and it is on its way to the refund; which may be at the provider already."""
    async with open_shop(settings) as shop:
        order = await shop.order(address=REFUSED)
        async with shop.withholding(refund_key(order.payment_id)) if given_back else _nothing_asked_of("refund"):
            await order.approve()
            await order.recorded(EventType.EVENT_TYPE_CHILD_WORKFLOW_EXECUTION_FAILED)
            if given_back:
                await until(lambda: shop.ledger.refunds_of(order.payment_id), "the refund")
            else:
                await order.tells("attempt_failed", times=3)
            told = await order.recorded(EventType.EVENT_TYPE_WORKFLOW_EXECUTION_SIGNALED, times=2)
            assert told[-1].workflow_execution_signaled_event_attributes.signal_name == "dispatch_failed"
            await order.workflow.terminate("test")
            await until_closed(order)
            # Before the reply comes, or the attempt would write it down, workflow or not.
            await shop.close()
        assert (await order.status())[0] is Step.PREPARED
        assert len(await shop.ledger.refunds_of(order.payment_id)) == given_back
        await settled(order)


@asynccontextmanager
async def _nothing_asked_of(activity: str) -> AsyncIterator[None]:
    """Every attempt of the activity fails before it asks the partner."""
    failpoints.arm(f"{activity}.before_gateway=fail")
    try:
        yield
    finally:
        failpoints.arm(None)


async def test_the_schedule_is_kept_once_and_runs(services: Services, workers: Services) -> None:
    queue = services.settings.order_task_queue
    async with _scheduled(services.temporal):
        for every in (3600, 1800):
            await keep_schedule(services.temporal, queue, timedelta(seconds=every), NOW)
        handle = services.temporal.get_schedule_handle(RECONCILE_ID)
        described = await handle.describe()
        assert [interval.every for interval in described.schedule.spec.intervals] == [timedelta(seconds=1800)]
        await handle.trigger()
        async with asyncio.timeout(30):
            while not (recent := (await handle.describe()).info.recent_actions):  # noqa: ASYNC110 - Temporal's own
                await asyncio.sleep(0.1)
        action = recent[0].action
        assert isinstance(action, ScheduleActionExecutionStartWorkflow)
        started = services.temporal.get_workflow_handle_for(
            ReconcileWorkflow.run,
            action.workflow_id,
        )
        assert isinstance(await started.result(), ReconcileReport)
    await drop_schedule(services.temporal)


@asynccontextmanager
async def _scheduled(temporal: Client) -> AsyncIterator[None]:
    try:
        yield
    finally:
        await drop_schedule(temporal)
