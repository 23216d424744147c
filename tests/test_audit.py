"""The auditor can fail: each kind of violation is planted, and seen."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from temporalio.common import WorkflowIDReusePolicy

from app.audit.auditor import Auditor, Options, Sources
from app.audit.models import MEANING, Kind, OrderBooks
from app.audit.partners import GatewayBooks, LedgerBooks
from app.audit.repository import BooksRepository
from app.order.models import CloseOrder
from app.order.repository import OrderRepository
from app.order.workflows import OrderWorkflow
from app.steps import Step
from app.wiring import Services
from tests.bookkeeping import OnlyMine, Shop, opened_shop


@pytest.fixture
async def shop(services: Services) -> AsyncIterator[Shop]:
    """A shop over the test's database."""
    async with opened_shop(services) as opened:
        yield opened


async def test_clean_books_are_clean(shop: Shop) -> None:
    for step in (Step.EXPIRED, Step.REJECTED, Step.SHIPPED, Step.CANCELLED, Step.SHIPPING_FAILED):
        await shop.order(f"o-{step}", step)
    for step in (Step.RECEIVED, Step.CHARGING, Step.CHARGED, Step.PREPARED):
        await shop.order(f"o-{step}", step)
    report = await shop.audit(page=2)
    assert (report.violations, report.incomplete, report.orders) == ([], [], 9)
    assert report.clean


Plant = Callable[[Shop], Awaitable[None]]


async def _charged_twice(shop: Shop) -> None:
    await shop.order("o", Step.SHIPPED)
    await shop.charge("pay-o")


async def _charge_unsettled(shop: Shop) -> None:
    await shop.order("o", Step.EXPIRED)
    await shop.charge("pay-o")


async def _charge_missing(shop: Shop) -> None:
    await shop.order("o", Step.SHIPPED)
    await shop.sql("DELETE FROM sandbox.charges WHERE payment = 'pay-o'")


async def _refund_missing(shop: Shop) -> None:
    await shop.order("o", Step.CANCELLED)
    await shop.sql("DELETE FROM sandbox.refunds")


async def _refunded_twice(shop: Shop) -> None:
    await shop.order("o", Step.CANCELLED)
    await shop.charge("pay-o")
    await shop.refund("pay-o")


async def _refund_without_charge(shop: Shop) -> None:
    await shop.order("o", Step.CANCELLED)
    await shop.sql("UPDATE sandbox.charges SET payment = 'pay-other' WHERE payment = 'pay-o'")
    # The sandbox books a refund under its charge; a provider that lost the charge is played at the wire.
    shop.partners = RefundsWithoutCharges(shop.partners)  # type: ignore[assignment]


async def _refunded_not_closed(shop: Shop) -> None:
    await shop.order("o", Step.SHIPPED)
    await shop.refund("pay-o")


async def _amount_differs(shop: Shop) -> None:
    await shop.order("o", Step.SHIPPED)
    await shop.sql("UPDATE sandbox.charges SET amount = 49.99 WHERE payment = 'pay-o'")


async def _amount_differs_in_the_tables(shop: Shop) -> None:
    await shop.order("o", Step.SHIPPED)
    await shop.sql("UPDATE payments SET amount = 51, asked = 51 WHERE order_id = 'o'")


async def _amount_differs_in_the_timeline(shop: Shop) -> None:
    await shop.order("o", Step.SHIPPED)
    change = """payload_json = payload_json || '{"amount": "5.00"}'"""
    await shop.sql(f"UPDATE events SET {change} WHERE order_id = 'o' AND type = 'charged'")


async def _reference_differs(shop: Shop) -> None:
    await shop.order("o", Step.SHIPPED)
    await shop.sql("UPDATE payments SET provider_reference = 'ch_other' WHERE order_id = 'o'")


async def _payment_step_mismatch(shop: Shop) -> None:
    await shop.order("o", Step.CANCELLED)
    await shop.sql("UPDATE payments SET status = 'CHARGED' WHERE order_id = 'o'")


async def _payment_in_doubt(shop: Shop) -> None:
    await shop.order("o", Step.CHARGING)
    await OrderRepository(shop.pool).close(CloseOrder(order_id="o", step=Step.CANCELLED, reason="test"))
    await shop.sql("UPDATE orders SET state_since = now() - interval '1 hour'")


async def _event_doubled(shop: Shop) -> None:
    await shop.order("o", Step.SHIPPED)
    await shop.sql("INSERT INTO events (order_id, type) VALUES ('o', 'shipped')")


async def _event_missing(shop: Shop) -> None:
    await shop.order("o", Step.SHIPPED)
    await shop.sql("DELETE FROM events WHERE order_id = 'o' AND type = 'charged'")


async def _last_event_missing(shop: Shop) -> None:
    await shop.order("o", Step.SHIPPED)
    await shop.sql("DELETE FROM events WHERE order_id = 'o' AND type = 'shipped'")


async def _refund_untold(shop: Shop) -> None:
    await shop.order("o", Step.CANCELLED)
    await shop.sql("DELETE FROM events WHERE type = 'refunded'")


async def _order_missing(shop: Shop) -> None:
    await shop.order("o", Step.EXPIRED)
    await shop.sql("DELETE FROM orders WHERE id = 'o'")


async def _parcel_unsettled(shop: Shop) -> None:
    await shop.order("o", Step.CANCELLED)
    await shop.sql("UPDATE sandbox.parcels SET state = 'taken', tracking = 'trk' WHERE order_id = 'o'")


async def _parcel_missing(shop: Shop) -> None:
    await shop.order("o", Step.SHIPPED)
    await shop.sql("DELETE FROM sandbox.parcels WHERE order_id = 'o'")


class RefundsWithoutCharges:
    """A provider that knows of refunds only."""

    def __init__(self, partners: LedgerBooks) -> None:
        self._partners = partners
        self.parcel = partners.parcel

    async def movements(self, payment_id: str) -> Any:
        moved = await self._partners.movements("pay-other" if payment_id == "pay-o" else payment_id)
        return moved if payment_id != "pay-o" else moved.model_copy(update={"charges": []})


PLANTED: list[tuple[Kind, Plant]] = [
    (Kind.CHARGED_TWICE, _charged_twice),
    (Kind.CHARGE_UNSETTLED, _charge_unsettled),
    (Kind.CHARGE_MISSING, _charge_missing),
    (Kind.REFUND_MISSING, _refund_missing),
    (Kind.REFUNDED_TWICE, _refunded_twice),
    (Kind.REFUND_WITHOUT_CHARGE, _refund_without_charge),
    (Kind.REFUNDED_NOT_CLOSED, _refunded_not_closed),
    (Kind.AMOUNT_DIFFERS, _amount_differs),
    (Kind.AMOUNT_DIFFERS, _amount_differs_in_the_tables),
    (Kind.AMOUNT_DIFFERS, _amount_differs_in_the_timeline),
    (Kind.REFERENCE_DIFFERS, _reference_differs),
    (Kind.PAYMENT_STEP_MISMATCH, _payment_step_mismatch),
    (Kind.PAYMENT_IN_DOUBT, _payment_in_doubt),
    (Kind.EVENT_DOUBLED, _event_doubled),
    (Kind.EVENT_MISSING, _event_missing),
    (Kind.EVENT_MISSING, _last_event_missing),
    (Kind.EVENT_MISSING, _refund_untold),
    (Kind.ORDER_MISSING, _order_missing),
    (Kind.PARCEL_UNSETTLED, _parcel_unsettled),
    (Kind.PARCEL_MISSING, _parcel_missing),
]


@pytest.mark.parametrize(("kind", "plant"), PLANTED, ids=[plant.__name__.strip("_") for _, plant in PLANTED])
async def test_planted_violation_is_seen(shop: Shop, kind: Kind, plant: Plant) -> None:
    await shop.order("beside", Step.SHIPPED)
    await plant(shop)
    found = await shop.kinds()
    assert kind in found.get("o", set())
    assert set(found) == {"o"}


def test_every_kind_is_planted_and_explained() -> None:
    elsewhere = {Kind.OPEN_WITHOUT_WORKFLOW}
    assert {kind for kind, _ in PLANTED} | elsewhere == set(Kind) == set(MEANING)


async def test_open_order_without_a_workflow(shop: Shop) -> None:
    await shop.order("lonely", Step.CHARGED)
    assert await shop.kinds(temporal=True) == {"lonely": {Kind.OPEN_WITHOUT_WORKFLOW}}


async def test_open_order_with_a_workflow_is_under_way(shop: Shop) -> None:
    order_id = f"o-{uuid.uuid4().hex[:8]}"
    await shop.order(order_id, Step.CHARGED)
    await _started(shop, order_id)
    assert await shop.kinds(temporal=True) == {}


async def test_accepted_order_that_was_never_written_down(shop: Shop) -> None:
    order_id = f"o-{uuid.uuid4().hex[:8]}"
    handle = await _started(shop, order_id)
    assert await shop.kinds(temporal=True) == {}
    await handle.terminate("test")
    await _visible(shop, order_id)
    assert await shop.kinds(temporal=True) == {order_id: {Kind.ORDER_MISSING}}


async def test_what_is_being_written_is_looked_at_again(shop: Shop) -> None:
    """An order that moves on while it is audited is not reported."""
    await shop.order("o", Step.SHIPPED)
    await shop.sql("DELETE FROM events WHERE type = 'shipped'")

    class Mended(BooksRepository):
        async def again(self, order_ids: list[str]) -> list[OrderBooks]:
            await shop.sql("INSERT INTO events (order_id, type, key) VALUES ('o', 'shipped', 'shipped')")
            return await super().again(order_ids)

    report = await Auditor(Mended(shop.pool), Sources(), Options(rechecks=(0.0,))).run()
    assert report.violations == []


async def test_silent_provider_makes_the_audit_incomplete(shop: Shop) -> None:
    await shop.order("o", Step.SHIPPED)
    await shop.sql("ALTER TABLE sandbox.charges RENAME TO lost")
    report = await shop.audit()
    assert not report.clean
    assert [line.split(" (")[0] for line in report.incomplete] == ["the provider did not answer"]


async def test_only_what_moved_since(shop: Shop) -> None:
    await shop.order("old", Step.SHIPPED)
    await shop.sql("UPDATE orders SET state_since = now() - interval '2 days'")
    await shop.order("new", Step.SHIPPED)
    report = await shop.audit(since=datetime.now(UTC) - timedelta(days=1))
    assert report.orders == 1


async def test_a_provider_without_a_ledger_is_asked_by_key(shop: Shop, services: Services) -> None:
    await shop.order("o", Step.CANCELLED)
    books = GatewayBooks(services.gateway)
    moved = await books.movements("pay-o")
    assert (len(moved.charges), len(moved.refunds)) == (1, 1)
    assert (await books.movements("pay-nobody")).charges == []


async def _started(shop: Shop, order_id: str) -> Any:
    return await shop.temporal.start_workflow(
        OrderWorkflow.run,
        shop.input(order_id),
        id=f"order/{order_id}",
        task_queue=shop.queue,
        id_reuse_policy=WorkflowIDReusePolicy.REJECT_DUPLICATE,
    )


async def _visible(shop: Shop, order_id: str) -> None:
    """Visibility follows the history by a moment."""
    for _ in range(100):
        async for order in OnlyMine(shop.temporal, {order_id}).closed_orders():
            assert order.order_id == order_id
            return
    pytest.fail("Temporal does not list the closed workflow")
