"""What reconciling adds to the worker of the orders' queue."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from app.audit.executions import Executions
from app.audit.repository import BooksRepository
from app.order.repository import OrderRepository
from app.payment.activities import PaymentActivities
from app.payment.repository import PaymentRepository
from app.reconcile.activities import ReconcileActivities
from app.reconcile.reconciler import Reconciler, Tools
from app.reconcile.repository import LeftBehind
from app.shipping.activities import ShippingActivities
from app.shipping.repository import ShipmentRepository
from app.temporal.identity import Identity

if TYPE_CHECKING:
    from app.reconcile.models import ReconcileRequest
    from app.services import Services


def reconciler(services: Services, request: ReconcileRequest, beat: Callable[[], None] = lambda: None) -> Reconciler:
    """A pass with the parts of this process."""
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


def reconcile_activities(services: Services) -> ReconcileActivities:
    """The activities of `ReconcileWorkflow`."""
    return ReconcileActivities(lambda request, beat: reconciler(services, request, beat))
