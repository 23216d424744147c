"""What a workflow leaves behind when it is ended by force is brought to a correct end."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
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
from app.audit.executions import Executions, Fate
from app.audit.models import Kind
from app.audit.repository import BooksRepository
from app.cli.client import ExitCode
from app.cli.reconcile import _exit_code
from app.db import timeline
from app.domain.money import Money
from app.domain.steps import Step
from app.errors import IllegalTransition, InvalidRequest, PaymentUnavailable, ShipmentRefused
from app.order.models import CloseOrder, OrderInput, StartOrder
from app.order.workflows import OrderWorkflow
from app.payment.activities import PaymentActivities
from app.payment.gateway import Receipt, refund_key
from app.payment.http_gateway import HttpPaymentGateway
from app.payment.models import ChargeRequest, RefundRequest
from app.payment.repository import PaymentRepository, mark_charged
from app.reconcile.models import RECONCILE_ID, ReconcileReport, ReconcileRequest
from app.reconcile.reconciler import Reconciler
from app.reconcile.repository import Left, LeftBehind
from app.reconcile.schedule import drop_schedule, keep_schedule
from app.reconcile.workflows import ReconcileWorkflow
from app.services import Services
from app.settings import Settings
from app.shipping.models import Address, Shipment, ShippingOutcome
from app.shipping.repository import ShipmentRepository
from app.telemetry import metrics
from app.workers import reconciler
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
    assert (await broken.told())[2:] == ["charging", "reconciled", "charged", "recalled", "refunded", "cancelled"]


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


# --- what happens while a pass is at work


class Meanwhile(Executions):
    """Something happens to one order between the pass's reading of its page and its look at the workflows."""

    def __init__(self, temporal: Client, order_id: str, happening: Callable[[], Awaitable[None]]) -> None:
        super().__init__(temporal)
        self._order_id = order_id
        self._happening: Callable[[], Awaitable[None]] | None = happening

    async def fates(self, order_id: str) -> tuple[Fate, Fate]:
        if order_id == self._order_id and self._happening:
            happening, self._happening = self._happening, None
            await happening()
        return await super().fates(order_id)


def passing(broken: Broken, request: ReconcileRequest = NOW, **tools: Any) -> Reconciler:
    """A pass with some of its tools replaced."""
    one = reconciler(broken.services, request)
    one._tools = replace(one._tools, **tools)
    return one


def meanwhile(broken: Broken, happening: Callable[[], Awaitable[None]]) -> Reconciler:
    """A pass during which something happens to the order."""
    return passing(broken, executions=Meanwhile(broken.services.temporal, broken.id, happening))


async def test_an_order_that_was_charged_after_it_was_read_is_not_just_cancelled(shop: Shop, broken: Broken) -> None:
    """Read in review; approved, charged and prepared, then terminated, before the pass comes to it."""
    order = shop.input(broken.id)
    await shop.orders.receive(order, "run")
    await shop.orders.open_review(order)

    async def approved_charged_prepared_and_terminated() -> None:
        await shop.payments.charge(broken.charge)
        await shop.shipping.prepare(Shipment(order_id=broken.id))
        await broken.end()

    await meanwhile(broken, approved_charged_prepared_and_terminated).run()
    await broken.reconcile()
    assert (await broken.step(), await broken.payment()) == ("cancelled", "REFUNDED")


async def test_a_parcel_that_left_after_its_order_was_read_is_shipped(shop: Shop, broken: Broken) -> None:
    """Read as charged; prepared and handed over, and the reply lost, before the pass comes to it."""
    await at(shop, broken, "charged")

    async def handed_over() -> None:
        await shop.shipping.prepare(Shipment(order_id=broken.id))
        await ShipmentRepository(shop.pool).begin_dispatch(broken.id)
        await broken.services.carrier.dispatch(broken.id, None)
        await broken.end()

    await meanwhile(broken, handed_over).run()
    assert (await broken.step(), await broken.payment()) == ("shipped", "CHARGED")


async def test_the_parcel_of_a_charged_order_cannot_leave_once_the_refund_begins(shop: Shop, broken: Broken) -> None:
    """A run that was started again by hand comes to the handover while the money is on its way back."""

    class Late(PaymentActivities):
        async def refund(self, request: RefundRequest) -> None:
            with pytest.raises(ShipmentRefused):
                await broken.services.carrier.dispatch(broken.id, None)
            await super().refund(request)

    await at(shop, broken, "charged")
    await broken.end()
    late = Late(PaymentRepository(shop.pool), broken.services.gateway)
    await passing(broken, paying=late).run()
    assert (await broken.step(), await broken.payment()) == ("cancelled", "REFUNDED")


async def test_an_order_whose_workflow_came_back_while_the_provider_was_asked_is_left_alone(
    shop: Shop, broken: Broken
) -> None:
    class Slow:
        async def find_charge(self, payment_id: str) -> None:
            if payment_id == broken.charge.payment_id:
                await broken.start()

    await at(shop, broken, "charging")
    await broken.end()
    report = await passing(broken, gateway=Slow()).run()
    assert broken.id not in {repair.order_id for repair in report.repairs}
    assert await broken.step() == "charging"


async def test_a_charged_order_is_not_closed_without_a_refund(shop: Shop, broken: Broken) -> None:
    for step in ("charged", "prepared"):
        if step == "prepared":
            await shop.shipping.prepare(Shipment(order_id=broken.id))
        else:
            await at(shop, broken, step)
        with pytest.raises(IllegalTransition):
            await shop.orders.close(CloseOrder(order_id=broken.id, step=Step.CANCELLED, reason="test"))
        assert (await broken.step(), await broken.payment()) == (step, "CHARGED")


async def test_a_charge_that_is_written_down_at_the_same_moment_wins_over_the_close(shop: Shop, broken: Broken) -> None:
    """The close waits for the row, and must not go by what it saw before it waited."""
    await at(shop, broken, "charging")
    async with shop.pool.acquire() as connection, connection.transaction():
        await timeline.lock(connection, broken.id)
        close = asyncio.create_task(
            shop.orders.close(CloseOrder(order_id=broken.id, step=Step.CANCELLED, reason="test"))
        )
        await until(lambda: shop.pool.fetchval(_WAITS), "the close to wait")
        receipt = await broken.services.gateway.charge(broken.charge.payment_id, USD)
        await mark_charged(connection, broken.charge.payment_id, receipt)
        await timeline.enter(connection, broken.id, Step.CHARGED)
    with pytest.raises(IllegalTransition):
        await close
    assert (await broken.step(), await broken.payment()) == ("charged", "CHARGED")
    await broken.end()


_WAITS = "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database())"


async def test_an_order_that_was_started_again_by_hand_is_left_alone(broken: Broken) -> None:
    """An older run of the same id is in the list of those that ended, and there is no row yet."""
    await broken.end()
    await broken.start()
    report = await broken.reconcile()
    assert broken.id not in {repair.order_id for repair in report.repairs}
    assert await broken.step() is None


async def test_a_charge_that_came_through_late_is_refunded_by_a_later_pass_when_the_provider_is_silent(
    shop: Shop, broken: Broken
) -> None:
    class NoRefunds(HttpPaymentGateway):
        async def refund(self, payment_id: str, money: Money) -> Receipt:
            raise PaymentUnavailable("outage")

    await at(shop, broken, "charging")
    await broken.end()
    await broken.reconcile(NOW.model_copy(update={"settle_seconds": 600}))
    await broken.services.gateway.charge(broken.charge.payment_id, USD)
    gateway = NoRefunds(broken.services.gateway._client)  # type: ignore[attr-defined]
    down = replace(broken.services, gateway=gateway)
    report = await reconciler(down, NOW).run()
    assert [repair.done for repair in report.repairs if repair.order_id == broken.id] == [False]
    await broken.reconcile()
    assert (await broken.step(), await broken.payment()) == ("cancelled", "REFUNDED")
    assert len(await shop.ledger.refunds_of(broken.charge.payment_id)) == 1


@pytest.mark.parametrize("settled", [False, True])
async def test_an_attempt_that_finds_its_order_closed_gives_the_money_back(
    shop: Shop, broken: Broken, settled: bool
) -> None:
    """It was stopped before it asked the provider, for longer than anybody waits."""

    class Stopped(HttpPaymentGateway):
        async def charge(self, payment_id: str, money: Money) -> Receipt:
            await broken.end()
            await broken.reconcile(NOW if settled else NOW.model_copy(update={"settle_seconds": 600}))
            return await super().charge(payment_id, money)

    await at(shop, broken, "charging")
    gateway = Stopped(broken.services.gateway._client)  # type: ignore[attr-defined]
    with pytest.raises(IllegalTransition):
        await PaymentActivities(PaymentRepository(shop.pool), gateway).charge(broken.charge)
    assert (await broken.step(), await broken.payment()) == ("cancelled", "FAILED" if settled else "REFUNDED")
    assert len(await shop.ledger.refunds_of(broken.charge.payment_id)) == 1


# --- what cannot be read


async def test_a_workflow_that_cannot_be_read_holds_nobody_up(shop: Shop, broken: Broken) -> None:
    """Started by hand with anything, and terminated. The others are settled, and the report tells of it."""
    unreadable = f"o-{uuid.uuid4().hex[:8]}"
    doubtful, paid = f"o-{uuid.uuid4().hex[:8]}", broken.services.gateway
    await shop.order(doubtful, Step.CHARGING)
    await shop.orders.close(CloseOrder(order_id=doubtful, step=Step.CANCELLED, reason="test"))
    await paid.charge(f"pay-{doubtful}", USD)
    await broken.end()  # before: the list is newest first
    handle = await broken.services.temporal.start_workflow(
        "OrderWorkflow", {}, id=f"order/{unreadable}", task_queue="nobody"
    )
    await handle.terminate("test")
    await until(lambda: _listed(broken, unreadable), "the list of workflows")
    before = _counted("defect")
    for apply in (False, True):
        report = await broken.reconcile(NOW.model_copy(update={"apply": apply}))
        defects = [repair for repair in report.repairs if repair.order_id == unreadable]
        assert [(repair.defect, repair.done) for repair in defects] == [(True, False)]
        assert report.defects >= 1
    assert _counted("defect") >= before + 2
    assert await broken.told() == ["received", "reconciled", "cancelled"]
    assert await shop.pool.fetchval("SELECT status FROM payments WHERE order_id = $1", doubtful) == "REFUNDED"


async def test_a_row_that_cannot_be_read_holds_nobody_up(shop: Shop, broken: Broken) -> None:
    """Written by hand, with a total that is no number."""
    await at(shop, broken, "charged")
    await broken.end()
    await shop.order("0-unreadable", Step.RECEIVED)
    await shop.sql("UPDATE orders SET total = 'NaN' WHERE id = '0-unreadable'")
    report = await broken.reconcile(NOW.model_copy(update={"accept_unknown": True}))
    assert [repair.order_id for repair in report.repairs if repair.defect and "0-" in repair.order_id] == [
        "0-unreadable"
    ]
    assert await broken.step() == "cancelled"
    await shop.sql("UPDATE orders SET total = 50 WHERE id = '0-unreadable'")


async def test_a_row_that_somebody_holds_is_left_and_the_pass_goes_on(shop: Shop, broken: Broken) -> None:
    """One time-out is one order's; several in a row are PostgreSQL's, and end the pass."""

    class Held(LeftBehind):
        async def look(self, order_id: str) -> Left | None:
            if order_id == "0-held":
                raise TimeoutError
            return await super().look(order_id)

    await at(shop, broken, "charged")
    await broken.end()
    await shop.order("0-held", Step.RECEIVED)
    request = NOW.model_copy(update={"accept_unknown": True})
    report = await passing(broken, request, left=Held(shop.pool)).run()
    assert [repair.detail for repair in report.repairs if repair.order_id == "0-held"] == ["TimeoutError"]
    assert await broken.step() == "cancelled"


async def test_a_database_that_is_gone_ends_the_pass(shop: Shop, broken: Broken) -> None:
    class Gone(LeftBehind):
        async def look(self, order_id: str) -> Left | None:
            raise ConnectionError

    for number in range(5):
        await shop.order(f"o-{number}", Step.RECEIVED)
    with pytest.raises(ConnectionError):
        await passing(broken, NOW.model_copy(update={"accept_unknown": True}), left=Gone(shop.pool)).run()


def test_the_exit_code_tells_of_defects() -> None:
    assert _exit_code(ReconcileReport()) is ExitCode.OK
    assert _exit_code(ReconcileReport(left=1)) is ExitCode.ENDED_OTHERWISE
    assert _exit_code(ReconcileReport(left=1, defects=1)) is ExitCode.REFUSED


def _counted(outcome: str) -> float:
    return metrics.REGISTRY.get_sample_value("trellis_reconciled_orders_total", {"outcome": outcome}) or 0.0


async def _listed(broken: Broken, order_id: str) -> bool:
    return order_id in await broken._closed()


# --- a Temporal that does not know our orders


async def test_orders_that_temporal_does_not_know_are_asked_about_first(shop: Shop, broken: Broken) -> None:
    """Another environment's namespace knows orders, only not ours."""
    await at(shop, broken, "charged")
    await broken.end()
    for number in range(3):
        await shop.order(f"unknown-{number}", Step.CHARGED)
    with pytest.raises(InvalidRequest, match="3 of 4 open orders"):
        await broken.reconcile()
    assert await broken.step() == "charged"
    await broken.reconcile(NOW.model_copy(update={"accept_unknown": True}))
    assert await broken.step() == "cancelled"
    steps = await shop.pool.fetch("SELECT DISTINCT state FROM orders WHERE id LIKE 'unknown%'")
    assert [row["state"] for row in steps] == ["cancelled"]


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
    await ended_as(order, "reconciled", "refunded", Step.SHIPPING_FAILED)


async def ended_as(order: Order, *told: str) -> None:
    """The timeline's last words, the money back once, and no parcel on its way."""
    assert (await order.status())[0] == told[-1]
    ends = [step for step in Step if step.final]
    assert [event.type for event in await order.events("reconciled", "refunded", *ends)] == [*told]
    assert len(await order.shop.ledger.refunds_of(order.payment_id)) == 1
    parcel = await order.shop.ledger.find_parcel(order.id)
    assert parcel is None or parcel[0].state != "taken"


async def _prepared_and_alone(shop: Shop) -> Order:
    """An order that was ended by force while its shipment asks a carrier that does not answer."""
    order = await shop.approved(address=UNANSWERED, attempts=100)
    await order.tells("attempt_failed")
    await order.workflow.terminate("test")
    await until_closed(order)
    assert (await order.shipment.describe()).status is WorkflowExecutionStatus.RUNNING
    return order


async def test_a_shipment_that_is_terminated_when_its_order_is_gone(settings: Settings) -> None:
    async with open_shop(settings) as shop:
        order = await _prepared_and_alone(shop)
        await order.shipment.terminate("test")
        with pytest.raises(WorkflowFailureError):
            await order.shipment.result()
        assert (await order.status())[0] is Step.PREPARED
        await settled(order)


async def test_a_shipment_that_is_cancelled_when_its_order_is_gone(settings: Settings) -> None:
    """It takes that for the order's cancellation, and leaves nothing to reconcile."""
    async with open_shop(settings) as shop:
        order = await _prepared_and_alone(shop)
        await order.shipment.cancel()
        assert (await order.shipment.result())["outcome"] == ShippingOutcome.RECALLED
        async with opened_shop(shop.services) as books:
            books.mine.add(order.id)
            assert await books.kinds(temporal=True) == {}
            await reconciler(shop.services, NOW).run()
            assert await books.kinds(temporal=True) == {}
        await ended_as(order, "refunded", Step.CANCELLED)


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
