"""Orders taken to any step through the product's own parts, with the partners' real books beside them."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from decimal import Decimal
from typing import Any

import asyncpg
import httpx
import pytest

from app.audit.auditor import Auditor, Options, Sources
from app.audit.executions import ClosedOrder, Executions
from app.audit.models import Kind, Report
from app.audit.partners import LedgerBooks
from app.audit.repository import BooksRepository
from app.domain.money import Money
from app.domain.steps import Step
from app.order.models import CloseOrder, OrderInput, StartOrder
from app.order.repository import OrderRepository
from app.payment.activities import PaymentActivities
from app.payment.models import ChargeRequest, RefundRequest
from app.payment.repository import PaymentRepository
from app.sandbox.app import create_sandbox
from app.sandbox.ledger import Answer, Ledger, Movement
from app.services import Services
from app.shipping.activities import ShippingActivities
from app.shipping.models import Shipment
from app.shipping.repository import ShipmentRepository
from tests import databases

USD = Money(amount=Decimal("50.00"), currency="USD")


class Shop:
    """Orders taken to a step through the product's own repositories, and the partners' real books beside them."""

    def __init__(self, services: Services, ledger: Ledger, partners: LedgerBooks) -> None:
        self.pool = services.pool
        self.url = services.settings.database_url.get_secret_value()
        self.ledger = ledger
        self.partners = partners
        self.temporal = services.temporal
        self.queue = f"nobody-{uuid.uuid4().hex[:8]}"
        self.mine: set[str] = set()
        self.orders = OrderRepository(services.pool)
        self.payments = PaymentActivities(PaymentRepository(services.pool), services.gateway)
        self.shipping = ShippingActivities(ShipmentRepository(services.pool), services.carrier)

    def input(self, order_id: str, **request: Any) -> OrderInput:
        self.mine.add(order_id)
        start = StartOrder(**{"payment_id": f"pay-{order_id}"} | request)
        return OrderInput(order_id=order_id, request=start, order_task_queue=self.queue)

    async def order(self, order_id: str, step: Step) -> None:
        """An order as it is when all went well."""
        order = self.input(order_id)
        payment = {"order_id": order_id, "payment_id": f"pay-{order_id}", "money": USD}
        await self.orders.receive(order, "run")
        if step is Step.RECEIVED:
            return
        await self.orders.open_review(order)
        if step is Step.CHARGING:
            await PaymentRepository(self.pool).begin_charge(ChargeRequest.model_validate(payment))
            return
        if step in {Step.EXPIRED, Step.REJECTED}:
            await self.orders.close(CloseOrder(order_id=order_id, step=step, reason="test"))
            return
        await self.payments.charge(ChargeRequest.model_validate(payment))
        if step is Step.CHARGED:
            return
        await self.shipping.prepare(Shipment(order_id=order_id))
        if step is Step.PREPARED:
            return
        if step is Step.SHIPPED:
            await self.shipping.dispatch(Shipment(order_id=order_id))
        else:
            await self.shipping.recall(Shipment(order_id=order_id))
            await self.payments.refund(RefundRequest.model_validate(payment | {"close_as": step, "reason": "test"}))

    @asynccontextmanager
    async def owner(self) -> AsyncIterator[asyncpg.Connection]:
        """A connection of whoever owns the tables."""
        connection = await asyncpg.connect(databases.owner_of(self.url))
        try:
            yield connection
        finally:
            await connection.close()

    async def sql(self, *statements: str) -> None:
        """Do what the tables forbid."""
        async with self.owner() as connection, connection.transaction():
            for table in ("orders", "payments", "events"):
                await connection.execute(f"ALTER TABLE {table} DISABLE TRIGGER USER")
            for statement in statements:
                await connection.execute(statement)
            for table in ("orders", "payments", "events"):
                await connection.execute(f"ALTER TABLE {table} ENABLE TRIGGER USER")

    async def charge(self, payment_id: str, amount: str = "50.00") -> None:
        """Money that the provider takes without being asked by the product."""
        movement = Movement(f"ch_{uuid.uuid4().hex}", None, payment_id, Decimal(amount), "USD")
        await self.ledger.record_charge(movement, None, Answer(200, "{}"))

    async def refund(self, payment_id: str) -> None:
        """Money that the provider gives back by itself."""
        charge, _ = await self.ledger.refundable(payment_id) or pytest.fail("nothing was charged")
        movement = Movement(f"re_{uuid.uuid4().hex}", None, payment_id, charge.amount, charge.currency)
        await self.ledger.record_refund(movement, charge.id, None, Answer(200, "{}"))

    async def audit(self, *, temporal: bool = False, **options: Any) -> Report:
        """What the auditor says. Without Temporal unless asked, because these orders never had a workflow."""
        executions = OnlyMine(self.temporal, self.mine) if temporal else None
        sources = Sources(executions, provider=self.partners, carrier=self.partners)
        auditor = Auditor(BooksRepository(self.pool), sources, Options(rechecks=(0.0, 0.0), **options))
        return await auditor.run()

    async def kinds(self, **options: Any) -> dict[str, set[Kind]]:
        """The kinds found, by order."""
        found: dict[str, set[Kind]] = {}
        for violation in (await self.audit(**options)).violations:
            found.setdefault(violation.order_id, set()).add(violation.kind)
        return found


class OnlyMine(Executions):
    """Of a Temporal that is shared with other tests, the orders of this one."""

    def __init__(self, temporal: Any, mine: set[str]) -> None:
        super().__init__(temporal)
        self._mine = mine

    async def closed_orders(self, ends: Any = ()) -> AsyncIterator[ClosedOrder]:
        async for order in super().closed_orders(ends):
            if order.order_id in self._mine:
                yield order


@asynccontextmanager
async def opened_shop(services: Services) -> AsyncIterator[Shop]:
    """A shop over the test's database, with the sandbox's ledger in it."""
    async with Ledger(services.settings.database_url.get_secret_value()) as ledger:
        await ledger.open()
        transport = httpx.ASGITransport(app=create_sandbox(ledger))
        async with (
            httpx.AsyncClient(base_url="http://sandbox/payments", transport=transport) as payments,
            httpx.AsyncClient(base_url="http://sandbox/carrier", transport=transport) as carrier,
        ):
            yield Shop(services, ledger, LedgerBooks(payments, carrier))
