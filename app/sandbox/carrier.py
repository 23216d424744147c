"""The sandbox carrier: takes a parcel or gives it back, whichever is asked first; idempotent by order id.

Magic zip codes work like test cards; the table is in docs/sandbox.md.
"""

from __future__ import annotations

import asyncio
import json
import uuid
from http import HTTPStatus
from typing import TYPE_CHECKING, Annotated, Final

from pydantic import BaseModel, ConfigDict, StringConstraints
from starlette.routing import Route

from app.sandbox.protocol import (
    Effect,
    Faults,
    LostReply,
    RefusalError,
    check_outage,
    enter,
    idempotency_key,
    read,
    respond_json,
    switch_outage,
)

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

    from app.sandbox.ledger import Ledger, Parcel

_EFFECTS: Final = {
    "00001": Effect.FLAKY,
    "00002": Effect.REFUSED,
    "00003": Effect.SLOW,
    "00004": Effect.LOST,
    "00005": Effect.DEAD,
    "00006": Effect.MUTE,
}


class ParcelAddress(BaseModel):
    """An address; of its fields the carrier itself looks at the zip code only."""

    model_config = ConfigDict(extra="allow")

    zip: Annotated[str, StringConstraints(min_length=1, max_length=16)]


class ParcelRequest(BaseModel):
    """Body of a dispatch. Without an address the customer picks the parcel up."""

    address: ParcelAddress | None


class SandboxCarrier:
    """The handlers of the carrier."""

    def __init__(self, ledger: Ledger, faults: Faults) -> None:
        self._ledger = ledger
        self._faults = faults

    def routes(self) -> list[Route]:
        """Everything it serves. `:path` because an order id may contain slashes."""
        return [
            Route("/v1/parcels", self.dispatch, methods=["POST"]),
            Route("/v1/parcels/{order_id:path}/recall", self.recall, methods=["POST"]),
            Route("/v1/ledger", self.books),
            Route("/sandbox/outage", self.outage, methods=["POST"]),
        ]

    # --- the merchant's side -------------------------------------------------------------------------------

    async def dispatch(self, request: Request) -> Response:
        """Take the parcel of the order in `Idempotency-Key`: 200, 410 recalled, 422 undeliverable, 503.

        A repeat answers the same tracking id, even with another address: the parcel is on its way already.
        """
        asked = await read(request, ParcelRequest)
        order_id = idempotency_key(request)
        if order_id is None:
            raise RefusalError(HTTPStatus.BAD_REQUEST, "idempotency_key_missing")
        effect = _EFFECTS.get(asked.address.zip) if asked.address else None
        await enter(self._ledger, "carrier", "dispatch", order_id, effect, self._faults)
        if effect is Effect.REFUSED:
            raise RefusalError(HTTPStatus.UNPROCESSABLE_ENTITY, "undeliverable")
        address = None if asked.address is None else asked.address.model_dump_json()
        parcel = await self._ledger.take_parcel(order_id, f"trk_{uuid.uuid4().hex}", address)
        return await self._answer(parcel, effect)

    async def recall(self, request: Request) -> Response:
        """Withdraw a parcel: 200 with the outcome, `recalled` or `taken`; 503."""
        await check_outage(self._ledger, "carrier")
        parcel = await self._ledger.recall_parcel(request.path_params["order_id"])
        if parcel.state == "taken":
            return respond_json({"outcome": "taken", "tracking": parcel.tracking})
        return respond_json({"outcome": "recalled"})

    # --- the tester's side, which works during outages -----------------------------------------------------

    async def books(self, request: Request) -> Response:
        """What became of the parcel of one order, and where it was sent."""
        found = await self._ledger.find_parcel(request.query_params.get("order_id", ""))
        if found is None:
            raise RefusalError(HTTPStatus.NOT_FOUND, "parcel_not_found")
        parcel, address = found
        return respond_json(
            {"state": parcel.state, "tracking": parcel.tracking, "address": json.loads(address or "null")}
        )

    async def outage(self, request: Request) -> Response:
        """The outage switch."""
        return await switch_outage(self._ledger, "carrier", request)

    # --- how it goes wrong ---------------------------------------------------------------------------------

    async def _answer(self, parcel: Parcel, effect: Effect | None) -> Response:
        if effect is Effect.MUTE or (effect is Effect.LOST and parcel.fresh):
            return LostReply()
        if effect is Effect.SLOW and parcel.fresh:
            await asyncio.sleep(self._faults.slow_seconds)
        if parcel.state == "recalled":
            raise RefusalError(HTTPStatus.GONE, "recalled")
        return respond_json({"tracking": parcel.tracking})
