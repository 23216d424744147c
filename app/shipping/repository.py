"""Shipments in PostgreSQL: the part of an order's row that belongs to its parcel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from app.db import timeline
from app.domain.steps import Step
from app.errors import OrderNotFound
from app.shipping.carrier import Handover
from app.shipping.models import Address
from app.telemetry import metrics

if TYPE_CHECKING:
    import asyncpg

_FREEZE = """
UPDATE orders SET dispatch_started_at = coalesce(dispatch_started_at, clock_timestamp())
WHERE id = $1 RETURNING address_json, tracking, state
"""

_TAKEN = timeline.moving(sets=", tracking = $6")


@dataclass(frozen=True)
class Parcel:
    """What is handed over: an order with its address, frozen. `handover` once the carrier took it; `closed` when it
    never will, as the order has ended without."""

    address: Address | None
    handover: Handover | None
    closed: bool = False


class ShipmentRepository:
    """An order's shipment."""

    def __init__(self, pool: asyncpg.Pool) -> None:
        self._pool = pool

    async def prepare(self, order_id: str) -> None:
        """Enter `prepared`."""
        move = await timeline.enter(self._pool, order_id, Step.PREPARED)
        metrics.entered(Step.PREPARED, move)

    async def begin_dispatch(self, order_id: str) -> Parcel:
        """Freeze the address: from here on a change is refused.

        Raises:
            OrderNotFound: there is no such order.
        """
        row = await self._pool.fetchrow(_FREEZE, order_id)
        if row is None:
            raise OrderNotFound(order_id)
        return Parcel(
            address=Address.model_validate(row["address_json"]) if row["address_json"] else None,
            handover=Handover(tracking=row["tracking"]) if row["tracking"] else None,
            closed=Step(row["state"]).final and row["tracking"] is None,
        )

    async def complete_dispatch(self, order_id: str, handover: Handover, *, pickup: bool) -> None:
        """Write down that the carrier has the parcel, and enter `shipped`."""
        payload: dict[str, Any] = {"tracking": handover.tracking, "pickup": pickup}
        move = await timeline.enter(
            self._pool, order_id, Step.SHIPPED, payload, by=_TAKEN, arguments=(handover.tracking,)
        )
        metrics.entered(Step.SHIPPED, move)

    async def complete_recall(self, order_id: str) -> None:
        """Tell that the parcel was withdrawn: nothing was shipped and nothing will be."""
        await timeline.record(self._pool, order_id, "recalled", {}, key="recalled")
