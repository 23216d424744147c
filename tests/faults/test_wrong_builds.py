"""Deliberately wrong builds, each caught: if the suite let one of these through, its green would mean nothing.

Each is the product with one line done wrong, broken at the point that matters; the same fault leaves the right build
clean.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

import asyncpg
import httpx
import pytest

from app import failpoints
from app.audit.models import Kind
from app.db import timeline
from app.domain.money import Money
from app.domain.steps import Step
from app.errors import ServiceUnavailable
from app.order.repository import OrderRepository
from app.payment.activities import PaymentActivities
from app.payment.http_gateway import HttpPaymentGateway
from app.payment.models import ChargeRequest
from app.payment.repository import PaymentRepository
from app.sandbox.app import create_sandbox
from app.services import Services
from app.shipping.activities import ShippingActivities
from app.shipping.models import Shipment
from app.shipping.repository import ShipmentRepository
from tests.bookkeeping import USD, Shop, opened_shop

CHARGE = ChargeRequest(order_id="o", payment_id="pay-o", money=USD)


@pytest.fixture
async def shop(services: Services) -> AsyncIterator[Shop]:
    """A shop over the test's database, with one order that was approved."""
    async with opened_shop(services) as opened:
        order = opened.input("o")
        orders = OrderRepository(opened.pool)
        await orders.receive(order, "run")
        await orders.open_review(order)
        yield opened


@pytest.fixture(autouse=True)
def disarmed() -> Iterator[None]:
    """Leave no failpoint armed behind."""
    yield
    failpoints.arm(None)


async def repeated(attempt: Any, times: int = 5) -> None:
    """An activity as Temporal runs it: again, until it comes through."""
    for _ in range(times):
        try:
            await attempt()
        except (ServiceUnavailable, asyncpg.PostgresError, ConnectionError):
            continue
        return
    pytest.fail("it never came through")


# --- a charge without its idempotency key


class Keyless(HttpPaymentGateway):
    """Sends no `Idempotency-Key`."""

    async def _post(self, path: str, key: str, payment_id: str, money: Money) -> httpx.Response:
        body = {"payment": payment_id, "amount": str(money.amount), "currency": money.currency}
        return await self._client.post(path, json=body)


@pytest.mark.parametrize(
    ("gateway", "found"), [(HttpPaymentGateway, {}), (Keyless, {"o": {Kind.CHARGED_TWICE}})], ids=["right", "wrong"]
)
async def test_charge_without_its_key(shop: Shop, gateway: type[HttpPaymentGateway], found: dict[str, Any]) -> None:
    failpoints.arm("charge.after_gateway=fail:1:1")
    transport = httpx.ASGITransport(app=create_sandbox(shop.ledger))
    async with httpx.AsyncClient(base_url="http://sandbox/payments", transport=transport) as client:
        paying = PaymentActivities(PaymentRepository(shop.pool), gateway(client))
        await repeated(lambda: paying.charge(CHARGE))
    assert await shop.kinds() == found


# --- an event outside the transaction of its change


class EventAfterwards(ShipmentRepository):
    """Writes the step and its event in two transactions, and takes the step for both when it repeats."""

    async def prepare(self, order_id: str) -> None:
        async with self._pool.acquire() as connection:
            moved = await connection.execute(
                "UPDATE orders SET state = 'prepared' WHERE id = $1 AND state = 'charged'", order_id
            )
            if moved == "UPDATE 1":
                failpoints.reach("prepare.before_reply")
                await timeline.record(connection, order_id, "prepared", {}, key="prepared")


@pytest.mark.parametrize(
    ("shipments", "found"),
    [(ShipmentRepository, {}), (EventAfterwards, {"o": {Kind.EVENT_MISSING}})],
    ids=["right", "wrong"],
)
async def test_event_outside_the_transaction(
    shop: Shop, services: Services, shipments: type[ShipmentRepository], found: dict[str, Any]
) -> None:
    await PaymentActivities(PaymentRepository(shop.pool), services.gateway).charge(CHARGE)
    failpoints.arm("prepare.before_reply=fail:1:1")
    shipping = ShippingActivities(shipments(shop.pool), services.carrier)
    await repeated(lambda: shipping.prepare(Shipment(order_id="o")))
    assert await shop.kinds() == found


# --- no row lock


class Unlocked(PaymentRepository):
    """Looks before it leaps, without holding on to what it saw: the check and the write are two moments."""

    def __init__(self, pool: asyncpg.Pool) -> None:
        super().__init__(pool)
        self.both_have_looked = asyncio.Barrier(2)

    async def complete_charge(self, request: ChargeRequest, receipt: Any) -> None:
        async with self._pool.acquire() as connection:
            state = await connection.fetchval("SELECT state FROM orders WHERE id = $1", request.order_id)
            await self.both_have_looked.wait()
            if state == Step.CHARGING:
                async with connection.transaction():
                    await connection.execute(
                        "UPDATE payments SET status = 'CHARGED', amount = $2, provider_reference = $3"
                        " WHERE payment_id = $1",
                        request.payment_id,
                        receipt.money.amount,
                        receipt.reference,
                    )
                    await connection.execute("UPDATE orders SET state = 'charged' WHERE id = $1", request.order_id)
                    await connection.execute(
                        "INSERT INTO events (order_id, type, key) VALUES ($1, 'charged', $2)",
                        request.order_id,
                        "charged",
                    )


async def _both_attempts(shop: Shop, services: Services, payments: PaymentRepository) -> list[Any]:
    """An attempt that was taken for dead and its successor write down the charge at the same moment."""
    await payments.begin_charge(CHARGE)
    receipt = await services.gateway.charge(CHARGE.payment_id, CHARGE.money)
    both = (payments.complete_charge(CHARGE, receipt) for _ in range(2))
    return await asyncio.gather(*both, return_exceptions=True)


async def test_row_lock_lets_both_attempts_through(shop: Shop, services: Services) -> None:
    outcomes = await _both_attempts(shop, services, PaymentRepository(shop.pool))
    assert not [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
    assert await shop.kinds() == {}


async def test_without_row_lock_the_unique_key_refuses_the_second(shop: Shop, services: Services) -> None:
    outcomes = await _both_attempts(shop, services, Unlocked(shop.pool))
    assert [type(outcome).__name__ for outcome in outcomes if isinstance(outcome, BaseException)] == [
        "UniqueViolationError"
    ]


async def test_without_row_lock_and_key_the_audit_sees_it(shop: Shop, services: Services) -> None:
    await shop.sql("ALTER TABLE events DROP CONSTRAINT events_order_id_key_key")
    await _both_attempts(shop, services, Unlocked(shop.pool))
    assert await shop.kinds() == {"o": {Kind.EVENT_DOUBLED}}
