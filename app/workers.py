"""What runs on which task queue, and what a process that works on one does besides."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from app.audit.executions import Executions
from app.audit.repository import BooksRepository
from app.order import gauges
from app.order.activities import OrderActivities
from app.order.repository import OrderRepository
from app.order.workflows import OrderWorkflow
from app.payment.activities import PaymentActivities
from app.payment.repository import PaymentRepository
from app.reconcile.activities import ReconcileActivities
from app.reconcile.reconciler import Reconciler, Tools
from app.reconcile.repository import LeftBehind
from app.reconcile.workflows import ReconcileWorkflow
from app.shipping.activities import ShippingActivities
from app.shipping.repository import ShipmentRepository
from app.shipping.workflows import ShippingWorkflow
from app.telemetry import supervision
from app.temporal import worker
from app.temporal.identity import Identity
from app.temporal.worker import WorkerPart

if TYPE_CHECKING:
    from app.reconcile.models import ReconcileRequest
    from app.services import Services
    from app.settings import Settings


def order_worker(services: Services) -> WorkerPart:
    """What runs on `settings.order_task_queue`: orders, their payments, and the passes of reconcile."""
    orders = OrderActivities(OrderRepository(services.pool))
    payments = PaymentActivities(PaymentRepository(services.pool), services.gateway)
    passes = ReconcileActivities(lambda request, beat: reconciler(services, request, beat))
    return WorkerPart(
        task_queue=services.settings.order_task_queue,
        workflows=[OrderWorkflow, ReconcileWorkflow],
        activities=[
            orders.receive,
            orders.validate,
            orders.close,
            orders.change_address,
            orders.note,
            orders.locate,
            orders.reopen_review,
            orders.settle_review,
            payments.charge,
            payments.refund,
            passes.reconcile,
        ],
    )


def shipping_worker(services: Services) -> WorkerPart:
    """What runs on `settings.shipping_task_queue`: shipments."""
    shipping = ShippingActivities(ShipmentRepository(services.pool), services.carrier)
    return WorkerPart(
        task_queue=services.settings.shipping_task_queue,
        workflows=[ShippingWorkflow],
        activities=[shipping.prepare, shipping.dispatch, shipping.recall],
    )


def reconciler(services: Services, request: ReconcileRequest, beat: Callable[[], None] = lambda: None) -> Reconciler:
    """A pass of reconcile with the parts of this process."""
    payments = PaymentRepository(services.pool)
    tools = Tools(
        require_own=Identity(services.pool, services.temporal).require,
        left=LeftBehind(services.pool),
        books=BooksRepository(services.pool),
        executions=Executions(services.temporal),
        orders=OrderRepository(services.pool),
        payments=payments,
        gateway=services.gateway,
        paying=PaymentActivities(payments, services.gateway),
        shipping=ShippingActivities(ShipmentRepository(services.pool), services.carrier),
    )
    return Reconciler(tools, request, beat)


async def run(services: Services, parts: Sequence[WorkerPart], stop: asyncio.Event) -> None:
    """Serve `parts` until `stop` is set; see `app.temporal.worker.run`. Meanwhile the gauges are read."""
    await worker.run(services, parts, stop, meanwhile=partial(_read_gauges, services.settings))


async def _read_gauges(settings: Settings) -> None:
    if settings.metrics_port:
        await supervision.keep_running("gauges", partial(gauges.keep_reading, settings))
