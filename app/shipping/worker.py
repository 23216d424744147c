"""The worker of the shipments' task queue."""

from __future__ import annotations

from typing import TYPE_CHECKING

from app.shipping.activities import ShippingActivities
from app.shipping.repository import ShipmentRepository
from app.shipping.workflows import ShippingWorkflow
from app.temporal.worker import WorkerPart

if TYPE_CHECKING:
    from app.services import Services


def shipping_worker(services: Services) -> WorkerPart:
    """What runs on `settings.shipping_task_queue`."""
    shipping = ShippingActivities(ShipmentRepository(services.pool), services.carrier)
    return WorkerPart(
        task_queue=services.settings.shipping_task_queue,
        workflows=[ShippingWorkflow],
        activities=[shipping.prepare, shipping.dispatch, shipping.recall],
    )
