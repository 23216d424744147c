"""The auditor can fail: each kind of violation is planted, and seen."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import pytest
from temporalio.common import WorkflowIDReusePolicy

from app.audit.auditor import Auditor, Options, Sources
from app.audit.models import MEANING, Kind, Movements, Page, Parcel, ParcelState, Report
from app.audit.models import Movement as Moved
from app.audit.partners import CarrierLedger, GatewayBooks, LedgerBooks, ProviderLedger
from app.audit.repository import TIMELINE_ROWS, BooksRepository
from app.cli.audit import Partners, _exit_code, asked_of
from app.cli.client import ExitCode
from app.cli.edge import end_of
from app.db.pool import _prepare_connection, create_pool
from app.domain.steps import Step
from app.errors import CarrierUnavailable, DatabaseUnavailable, InvalidRequest, PaymentUnavailable
from app.order.models import CloseOrder
from app.order.repository import OrderRepository
from app.order.workflows import OrderWorkflow
from app.payment.gateway import Receipt
from app.payment.http_gateway import HttpPaymentGateway
from app.services import Services
from app.settings import Settings
from app.shipping.http_carrier import HttpCarrier
from tests import databases
from tests.bookkeeping import USD, OnlyMine, Shop, opened_shop
from tests.many_orders import fill


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


async def _currency_that_nobody_knows(shop: Shop) -> None:
    await shop.order("o", Step.SHIPPED)
    await shop.sql("UPDATE orders SET currency = 'XXX' WHERE id = 'o'")


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
    (Kind.AMOUNT_DIFFERS, _currency_that_nobody_knows),
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
    elsewhere = {Kind.OPEN_WITHOUT_WORKFLOW, Kind.UNREADABLE}
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
        async def again(self, order_ids: list[str]) -> Page:
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


# --- a source that falls silent between two looks


class Falling:
    """A partner that answers so many times, and then no more."""

    def __init__(self, partners: Any, answers: int, error: Exception) -> None:
        self._partners = partners
        self._answers = answers
        self._error = error

    async def movements(self, payment_id: str) -> Any:
        self._answer()
        return await self._partners.movements(payment_id)

    async def parcel(self, order_id: str) -> Any:
        self._answer()
        return await self._partners.parcel(order_id)

    async def running(self, order_id: str) -> Any:
        self._answer()
        return await self._partners.running(order_id)

    def _answer(self) -> None:
        if self._answers == 0:
            raise self._error
        self._answers -= 1


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is asked again after a pause."""
    monkeypatch.setattr("app.audit.auditor.ASKED_AGAIN_AFTER", (0.0, 0.0))


async def _found(shop: Shop, sources: Sources) -> tuple[list[tuple[Kind, bool]], Report]:
    report = await Auditor(BooksRepository(shop.pool), sources, Options(rechecks=(0.0, 0.0))).run()
    return [(violation.kind, violation.unconfirmed) for violation in report.violations], report


@pytest.mark.usefixtures("impatient")
async def test_what_the_provider_was_heard_to_say_once_stays(shop: Shop) -> None:
    await _charged_twice(shop)
    provider = Falling(shop.partners, 1, PaymentUnavailable("outage"))
    found, report = await _found(shop, Sources(provider=provider))  # type: ignore[arg-type]
    assert found == [(Kind.CHARGED_TWICE, True)]
    assert len(report.incomplete) == 1
    assert _exit_code(report) is ExitCode.ENDED_OTHERWISE


@pytest.mark.usefixtures("impatient")
async def test_what_the_carrier_was_heard_to_say_once_stays(shop: Shop) -> None:
    await _parcel_unsettled(shop)
    carrier = Falling(shop.partners, 1, CarrierUnavailable("outage"))
    found, _ = await _found(shop, Sources(carrier=carrier))  # type: ignore[arg-type]
    assert found == [(Kind.PARCEL_UNSETTLED, True)]


@pytest.mark.usefixtures("impatient")
async def test_what_temporal_was_heard_to_say_once_stays(shop: Shop) -> None:
    await shop.order("lonely", Step.CHARGED)

    class Fading(OnlyMine):
        asked = 0

        async def running(self, order_id: str) -> bool:
            self.asked += 1
            if self.asked > 1:
                raise RuntimeError("Failed client connect")
            return await super().running(order_id)

    found, _ = await _found(shop, Sources(Fading(shop.temporal, {"lonely"})))
    assert found == [(Kind.OPEN_WITHOUT_WORKFLOW, True)]


@pytest.mark.usefixtures("impatient")
async def test_a_source_that_is_heard_again_confirms_or_clears(shop: Shop) -> None:
    await _charged_twice(shop)

    class Hiccup(Falling):
        def _answer(self) -> None:
            self._answers -= 1
            if -3 <= self._answers < 0:
                raise self._error

    provider = Hiccup(shop.partners, 1, PaymentUnavailable("outage"))
    found, report = await _found(shop, Sources(provider=provider))  # type: ignore[arg-type]
    assert (found, report.incomplete) == ([(Kind.CHARGED_TWICE, False)], [])


# --- what cannot be read


@pytest.mark.parametrize(
    "harm",
    [
        "UPDATE orders SET total = 'NaN' WHERE id = 'o'",
        """UPDATE events SET payload_json = '{"amount": "lots"}' WHERE order_id = 'o' AND type = 'charged'""",
    ],
)
async def test_what_cannot_be_read_is_reported_and_holds_nobody_up(shop: Shop, harm: str) -> None:
    for order_id in ("a", "o", "z"):
        await shop.order(order_id, Step.SHIPPED)
    await shop.sql(harm, "DELETE FROM events WHERE order_id = 'z' AND type = 'charged'")
    assert await shop.kinds(page=2) == {"o": {Kind.UNREADABLE}, "z": {Kind.EVENT_MISSING}}


async def test_a_workflow_that_was_started_again_is_under_way(shop: Shop) -> None:
    """An older run of the same id has ended, and the newer one has not written the order down yet."""
    order_id = f"o-{uuid.uuid4().hex[:8]}"
    handle = await _started(shop, order_id)
    await handle.terminate("test")
    await _visible(shop, order_id)
    await _started(shop, order_id, WorkflowIDReusePolicy.ALLOW_DUPLICATE)
    assert await shop.kinds(temporal=True) == {}


# --- size


async def test_no_statement_reads_more_than_a_batch(settings: Settings) -> None:
    """However large the database: what a statement reads decides whether it ends within its time limit."""
    asked: list[Any] = []

    async def prepare(connection: asyncpg.Connection) -> None:
        await _prepare_connection(connection)
        connection.add_query_logger(asked.append)

    url = settings.database_url.get_secret_value()
    connection = await asyncpg.connect(databases.owner_of(url))  # who else asks for statistics is not heard
    async with asyncpg.create_pool(url, init=prepare, min_size=0) as pool:
        await fill(connection, 11_000)
        everything = await Auditor(BooksRepository(pool), Sources(), Options(page=2_000, rechecks=())).run()
        reads = _first_of_each(asked)
        asked.clear()
        since = Options(since=datetime.now(UTC) + timedelta(hours=1))
        nothing = await Auditor(BooksRepository(pool), Sources(), since).run()
    assert (everything.orders, everything.violations, nothing.orders) == (11_000, [], 0)
    for read in reads + _first_of_each(asked):
        plan = await connection.fetchval(f"EXPLAIN (ANALYZE, FORMAT JSON) {read.query}", *read.args)
        rows = max(_rows(json.loads(plan)[0]["Plan"]))
        assert rows <= TIMELINE_ROWS, read.query
    await connection.close()


def _first_of_each(asked: list[Any]) -> list[Any]:
    """The first call of every statement that reads orders or events: the last ones find nothing more."""
    first: dict[str, Any] = {}
    for each in asked:
        if "FROM orders" in each.query or "FROM events" in each.query:
            first.setdefault(each.query, each)
    return list(first.values())


def _rows(node: dict[str, Any]) -> Iterator[float]:
    yield node["Actual Rows"] * node["Actual Loops"] + node.get("Rows Removed by Filter", 0)
    for each in node.get("Plans", []):
        yield from _rows(each)


async def test_a_read_has_the_time_limit_of_the_audit(settings: Settings) -> None:
    """And not the one of a request: the pool's."""
    pool = create_pool(settings.model_copy(update={"database_statement_timeout": 0.3}))
    async with pool, asyncpg.create_pool(settings.database_url.get_secret_value(), min_size=0) as other:
        async with other.acquire() as holder, holder.transaction():
            await holder.execute("LOCK TABLE orders IN ACCESS EXCLUSIVE MODE")
            audit = asyncio.create_task(Auditor(BooksRepository(pool), Sources()).run())
            await asyncio.sleep(0.6)
            assert not audit.done()
        assert (await audit).clean
        async with other.acquire() as holder, holder.transaction():
            await holder.execute("LOCK TABLE orders IN ACCESS EXCLUSIVE MODE")
            with pytest.raises(DatabaseUnavailable, match=r"longer than 0\.1 s") as late:
                await Auditor(BooksRepository(pool, seconds=0.1), Sources()).run()
    end = end_of(late.value)
    assert (end.code, "longer than 0.1 s" in end.message) == (ExitCode.UNAVAILABLE, True)


# --- whom it asks


class InCode:
    """A provider and carrier that somebody handed over in code: no URL, no ledger."""

    async def find_charge(self, payment_id: str) -> Receipt:
        return Receipt(reference=f"own-{payment_id}", money=USD)

    async def find_refund(self, payment_id: str) -> None:
        return None


class InCodeWithBooks(InCode):
    """The same, and it shows its books."""

    async def movements(self, payment_id: str) -> Movements:
        receipt = await self.find_charge(payment_id)
        return Movements(charges=[Moved(reference=receipt.reference, money=receipt.money)])

    async def parcel(self, order_id: str) -> Parcel:
        return Parcel(state=ParcelState.TAKEN, tracking=f"trk-{order_id}")


@pytest.mark.parametrize("partner", [InCode(), InCodeWithBooks()])
async def test_a_provider_handed_over_in_code_is_asked_itself(shop: Shop, services: Services, partner: Any) -> None:
    for number in range(3):
        await shop.order(f"o-{number}", Step.SHIPPED)
    await shop.sql(
        "UPDATE payments SET provider_reference = 'own-' || payment_id", "UPDATE orders SET tracking = 'trk-' || id"
    )
    sources = asked_of(replace(services, gateway=partner, carrier=partner), Partners.AUTO, temporal=False)
    assert (sources.carrier is partner) is isinstance(partner, InCodeWithBooks)
    report = await Auditor(BooksRepository(shop.pool), sources, Options(rechecks=())).run()
    assert report.clean


async def test_the_built_in_sandbox_shows_its_ledger(shop: Shop, services: Services) -> None:
    await _charged_twice(shop)
    await shop.sql("DELETE FROM sandbox.parcels")
    sources = asked_of(services, Partners.AUTO, temporal=False)
    found, _ = await _found(shop, sources)
    assert {kind for kind, _ in found} == {Kind.CHARGED_TWICE, Kind.PARCEL_MISSING}


def test_a_partner_behind_a_url_is_looked_up_unless_it_is_said_to_have_a_ledger(services: Services) -> None:
    client = services.gateway.client  # type: ignore[attr-defined]
    real = replace(services, gateway=HttpPaymentGateway(client), carrier=HttpCarrier(client))
    by_default = asked_of(real, Partners.AUTO, temporal=False)
    assert (type(by_default.provider), by_default.carrier) == (GatewayBooks, None)
    said = asked_of(real, Partners.LEDGER, temporal=False)
    assert (type(said.provider), type(said.carrier)) == (ProviderLedger, CarrierLedger)
    with pytest.raises(InvalidRequest, match="no ledger"):
        asked_of(replace(services, gateway=InCode()), Partners.LEDGER, temporal=False)  # type: ignore[arg-type]


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


async def _started(
    shop: Shop, order_id: str, policy: WorkflowIDReusePolicy = WorkflowIDReusePolicy.REJECT_DUPLICATE
) -> Any:
    return await shop.temporal.start_workflow(
        OrderWorkflow.run,
        shop.input(order_id),
        id=f"order/{order_id}",
        task_queue=shop.queue,
        id_reuse_policy=policy,
    )


async def _visible(shop: Shop, order_id: str) -> None:
    """Visibility follows the history by a moment."""
    for _ in range(100):
        async for order in OnlyMine(shop.temporal, {order_id}).closed_orders():
            assert order.order_id == order_id
            return
    pytest.fail("Temporal does not list the closed workflow")
