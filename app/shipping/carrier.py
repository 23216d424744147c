"""What this product asks of a carrier: hand over a parcel, or get it back before the truck leaves."""

from __future__ import annotations

from typing import Protocol

from pydantic import BaseModel, ConfigDict, Field

from app.shipping.models import Address


class Handover(BaseModel):
    """The carrier's word that it took a parcel."""

    model_config = ConfigDict(frozen=True)

    tracking: str = Field(description="The carrier's own id of the parcel.")


class Carrier(Protocol):
    """A carrier. `dispatch` and `recall` are idempotent by order id, and the first of them to succeed decides:
    a recalled parcel is never taken, a taken parcel is never recalled."""

    async def dispatch(self, order_id: str, address: Address | None) -> Handover:
        """Hand the parcel over, once per order. Without an address it waits for the customer to pick it up.

        Raises:
            ShipmentRefused: the carrier will never take it, or it was recalled before.
            CarrierUnavailable: no answer; the parcel may or may not have been taken.
        """
        ...

    async def recall(self, order_id: str) -> Handover | None:
        """Withdraw the parcel. None: it was not taken and never will be. A handover: too late, it was taken.

        Raises:
            CarrierUnavailable: no answer.
        """
        ...
