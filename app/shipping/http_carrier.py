"""A carrier over HTTP, as `Carrier`. The contract on the wire is in docs/sandbox.md."""

from __future__ import annotations

from http import HTTPStatus
from typing import TYPE_CHECKING, Annotated, Final, Literal, TypeVar
from urllib.parse import quote

import httpx
from pydantic import BaseModel, Field, StringConstraints, TypeAdapter, ValidationError

from app.domain.types import Reference
from app.errors import CarrierUnavailable, ShipmentRefused
from app.shipping.carrier import Carrier, Handover

if TYPE_CHECKING:
    from app.shipping.models import Address

_TAKEN: Final = frozenset({HTTPStatus.OK, HTTPStatus.CREATED})
_REFUSED: Final = frozenset({HTTPStatus.UNPROCESSABLE_ENTITY, HTTPStatus.GONE})


class HttpCarrier(Carrier):
    """`Carrier` over HTTP. Base URL, time limit and credentials are the client's.

    Whatever is not understood is `CarrierUnavailable`: the parcel may have been taken, and asking again for the
    same order is safe.
    """

    def __init__(self, client: httpx.AsyncClient, *, shows_ledger: bool = False) -> None:
        """`shows_ledger`: the other side has `/v1/ledger`, as the sandbox has, which the audit may ask."""
        self.client = self._client = client
        self.shows_ledger = shows_ledger

    async def dispatch(self, order_id: str, address: Address | None) -> Handover:
        """See `Carrier.dispatch`."""
        body: dict[str, object] = {"address": None if address is None else address.model_dump(mode="json")}
        response = await self._post("/v1/parcels", body, {"Idempotency-Key": order_id})
        if response.status_code in _TAKEN:
            return Handover(tracking=_read(response, _parcel).tracking)
        if response.status_code in _REFUSED:
            raise ShipmentRefused(_code(response) or str(response.status_code))
        raise _unavailable(response)

    async def recall(self, order_id: str) -> Handover | None:
        """See `Carrier.recall`."""
        # Dots too: an id may be "..", which would be resolved as a step up.
        response = await self._post(f"/v1/parcels/{quote(order_id, safe='').replace('.', '%2E')}/recall")
        if response.status_code != HTTPStatus.OK:
            raise _unavailable(response)
        answer = _read(response, _recall)
        return None if answer.outcome == "recalled" else Handover(tracking=answer.tracking)

    async def _post(
        self, path: str, body: dict[str, object] | None = None, headers: dict[str, str] | None = None
    ) -> httpx.Response:
        try:
            return await self._client.post(path, json=body, headers=headers)
        except httpx.RequestError as error:
            raise CarrierUnavailable(type(error).__name__) from error


class _Parcel(BaseModel):
    """A parcel that the carrier has."""

    tracking: Reference


class _Taken(BaseModel):
    outcome: Literal["taken"]
    tracking: Reference


class _Recalled(BaseModel):
    outcome: Literal["recalled"]


class _ErrorBody(BaseModel):
    class _Error(BaseModel):
        #: Short and plain, because it ends in `last_error`, events and logs.
        code: Annotated[str, StringConstraints(pattern=r"^[a-z0-9_]{1,64}$")]

    error: _Error


_Answer = TypeVar("_Answer")

_parcel: Final = TypeAdapter(_Parcel)
_recall: Final[TypeAdapter[_Taken | _Recalled]] = TypeAdapter(
    Annotated[_Taken | _Recalled, Field(discriminator="outcome")]
)


def _read(response: httpx.Response, shape: TypeAdapter[_Answer]) -> _Answer:
    try:
        return shape.validate_json(response.content)
    except ValidationError:
        # Not chained: a validation error quotes what it read.
        raise CarrierUnavailable(f"{response.status_code} with an unreadable body") from None


def _unavailable(response: httpx.Response) -> CarrierUnavailable:
    code = _code(response)
    return CarrierUnavailable(f"{response.status_code} {code}" if code else str(response.status_code))


def _code(response: httpx.Response) -> str | None:
    """The carrier's short code for an error; None if there is none that can be shown."""
    try:
        return _ErrorBody.model_validate_json(response.content).error.code
    except ValidationError:
        return None
