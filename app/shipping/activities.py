"""Handing a parcel over, or getting it back."""

from __future__ import annotations

from typing import TYPE_CHECKING

from temporalio import activity

from app.errors import TooLate
from app.failpoints import reach
from app.shipping.carrier import Handover
from app.shipping.models import Shipment

if TYPE_CHECKING:
    from app.shipping.carrier import Carrier
    from app.shipping.repository import ShipmentRepository


class ShippingActivities:
    """`prepare`, `dispatch` and `recall`, each safe to repeat."""

    def __init__(self, shipments: ShipmentRepository, carrier: Carrier) -> None:
        self._shipments = shipments
        self._carrier = carrier

    @activity.defn
    async def prepare(self, shipment: Shipment) -> None:
        """Make the parcel ready."""
        reach("prepare.before_write")
        await self._shipments.prepare(shipment.order_id)
        reach("prepare.before_reply")

    @activity.defn
    async def dispatch(self, shipment: Shipment) -> Handover:
        """Hand the parcel over once, to the address as it stands now: the row decides, not the workflow's copy.

        Raises:
            ShipmentRefused: the carrier will never take it.
            CarrierUnavailable: no answer.
            TooLate: the order is closed, and its money may have gone back.
        """
        reach("dispatch.before_freeze")
        parcel = await self._shipments.begin_dispatch(shipment.order_id)
        if parcel.closed:
            raise TooLate(f"{shipment.order_id} is closed; nothing is handed over")
        if parcel.handover:
            reach("dispatch.before_reply")
            return parcel.handover
        reach("dispatch.before_carrier")
        handover = await self._carrier.dispatch(shipment.order_id, parcel.address)
        reach("dispatch.after_carrier")
        await self._shipments.complete_dispatch(shipment.order_id, handover, pickup=parcel.address is None)
        reach("dispatch.before_reply")
        return handover

    @activity.defn
    async def recall(self, shipment: Shipment) -> Handover | None:
        """Withdraw the parcel. A handover means it was too late, and the order is `shipped`.

        The carrier decides between a dispatch in flight and this call, so both may run at once.

        Raises:
            CarrierUnavailable: no answer.
        """
        parcel = await self._shipments.begin_dispatch(shipment.order_id)
        reach("recall.before_carrier")
        handover = parcel.handover or await self._carrier.recall(shipment.order_id)
        reach("recall.after_carrier")
        if handover:
            await self._shipments.complete_dispatch(shipment.order_id, handover, pickup=parcel.address is None)
        else:
            await self._shipments.complete_recall(shipment.order_id)
        reach("recall.before_reply")
        return handover
