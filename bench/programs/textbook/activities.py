"""An activity for each step, one transaction in each."""

from __future__ import annotations

from dataclasses import dataclass

from temporalio import activity

from bench.programs.books import Books


@dataclass
class OrderInput:
    """What the workflow starts with."""

    order_id: str
    payment_id: str


class Activities:
    """The steps."""

    def __init__(self, books: Books) -> None:
        self._books = books

    @activity.defn
    async def receive(self, order: OrderInput) -> None:
        """Write the order down."""
        await self._books.receive(order.order_id)

    @activity.defn
    async def validate(self, order: OrderInput) -> None:
        """Open the review."""
        await self._books.validate(order.order_id)

    @activity.defn
    async def charge(self, order: OrderInput) -> str:
        """Take the money."""
        return await self._books.charge(order.order_id, order.payment_id)

    @activity.defn
    async def prepare(self, order_id: str) -> None:
        """Make the parcel ready."""
        await self._books.prepare(order_id)

    @activity.defn
    async def dispatch(self, order_id: str) -> str:
        """Hand the parcel over."""
        return await self._books.dispatch(order_id)
