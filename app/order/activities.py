"""Writing down what the workflow decides."""

from __future__ import annotations

from typing import TYPE_CHECKING

from temporalio import activity

from app.errors import OrderNotFound
from app.failpoints import reach
from app.order.models import (
    AddressChange,
    AddressDecision,
    CloseOrder,
    LocateOrder,
    NoteRequest,
    OrderInput,
    OrderStatus,
    ReopenReview,
    ReviewDecision,
)

if TYPE_CHECKING:
    from app.order.repository import OrderRepository


class OrderActivities:
    """The steps of an order that move neither money nor parcels, each one transaction and safe to repeat."""

    def __init__(self, orders: OrderRepository) -> None:
        self._orders = orders

    @activity.defn
    async def receive(self, order: OrderInput) -> None:
        """Write the order down."""
        reach("receive.before_write")
        await self._orders.receive(order, activity.info().workflow_run_id or "")
        reach("receive.before_reply")

    @activity.defn
    async def validate(self, order: OrderInput) -> None:
        """Check what only the tables know, and open the review.

        Raises:
            OrderRejected: the order can never be charged; it is `rejected`.
        """
        reach("validate.before_write")
        if fault := order.total.fault:
            await self._orders.reject(order.order_id, fault)
        await self._orders.open_review(order)
        reach("validate.before_reply")

    @activity.defn
    async def close(self, request: CloseOrder) -> None:
        """End an order that was not charged.

        Raises:
            IllegalTransition: its charge has begun, in a run of its workflow before this one.
        """
        reach("close.before_write")
        await self._orders.close(request, charging=False)
        reach("close.before_reply")

    @activity.defn
    async def change_address(self, change: AddressChange) -> AddressDecision:
        """Take a new address unless the parcel is on its way."""
        accepted = await self._orders.change_address(change, _key("address"))
        reach("change_address.before_reply")
        return AddressDecision(accepted=accepted)

    @activity.defn
    async def reopen_review(self, request: ReopenReview) -> None:
        """Ask for another review of an order that has changed since the first; it keeps its step."""
        reach("reopen_review.before_write")
        await self._orders.reopen_review(request, _key("reopened"))
        reach("reopen_review.before_reply")

    @activity.defn
    async def settle_review(self, decision: ReviewDecision) -> None:
        """Write down what that review has decided."""
        reach("settle_review.before_write")
        await self._orders.settle_review(decision, _key("decided"))
        reach("settle_review.before_reply")

    @activity.defn
    async def note(self, note: NoteRequest) -> None:
        """Tell in the timeline of something that changed nothing, such as an approval that came too late."""
        await self._orders.note(note, _key(note.type))
        reach("note.before_reply")

    @activity.defn
    async def locate(self, order: LocateOrder) -> OrderStatus:
        """Where the tables say the order is, for a run that was reset and cannot know.

        Raises:
            OrderNotFound: there is no such order.
        """
        status = await self._orders.status(order.order_id)
        if status is None:
            raise OrderNotFound(order.order_id)
        return status


def _key(happening: str) -> str:
    """The same for every attempt of this activity, so that a repeat adds no second event."""
    info = activity.info()
    return f"{happening}:{info.workflow_run_id}:{info.activity_id}"
