"""Writing down what the workflow decides."""

from __future__ import annotations

from typing import TYPE_CHECKING

from temporalio import activity

from app.order.models import AddressChange, AddressDecision, CloseOrder, NoteRequest, OrderInput

if TYPE_CHECKING:
    from app.order.repository import OrderRepository


class OrderActivities:
    """The steps of an order that move neither money nor parcels, each one transaction and safe to repeat."""

    def __init__(self, orders: OrderRepository) -> None:
        self._orders = orders

    @activity.defn
    async def receive(self, order: OrderInput) -> None:
        """Write the order down."""
        await self._orders.receive(order, activity.info().workflow_run_id or "")

    @activity.defn
    async def validate(self, order: OrderInput) -> None:
        """Check what only the tables know, and open the review.

        Raises:
            OrderRejected: the order can never be charged; it is `rejected`.
        """
        await self._orders.open_review(order)

    @activity.defn
    async def close(self, request: CloseOrder) -> None:
        """End an order that was not charged."""
        await self._orders.close(request)

    @activity.defn
    async def change_address(self, change: AddressChange) -> AddressDecision:
        """Take a new address unless the parcel is on its way."""
        return AddressDecision(accepted=await self._orders.change_address(change, _key("address")))

    @activity.defn
    async def note(self, note: NoteRequest) -> None:
        """Tell in the timeline of something that changed nothing, such as an approval that came too late."""
        await self._orders.note(note, _key(note.type))


def _key(happening: str) -> str:
    """The same for every attempt of this activity, so that a repeat adds no second event."""
    info = activity.info()
    return f"{happening}:{info.workflow_run_id}:{info.activity_id}"
