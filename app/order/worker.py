"""The worker of the orders' task queue: orders and their payments."""

from __future__ import annotations

from typing import TYPE_CHECKING

from app.order.activities import OrderActivities
from app.order.repository import OrderRepository
from app.order.workflows import OrderWorkflow
from app.payment.activities import PaymentActivities
from app.payment.repository import PaymentRepository
from app.reconcile.worker import reconcile_activities
from app.reconcile.workflows import ReconcileWorkflow
from app.temporal.worker import WorkerPart

if TYPE_CHECKING:
    from app.services import Services


def order_worker(services: Services) -> WorkerPart:
    """What runs on `settings.order_task_queue`."""
    orders = OrderActivities(OrderRepository(services.pool))
    payments = PaymentActivities(PaymentRepository(services.pool), services.gateway)
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
            reconcile_activities(services).reconcile,
        ],
    )
