"""The contract of `ShippingWorkflow`: owned here, imported by whoever ships."""

from __future__ import annotations

import re
from enum import StrEnum
from typing import Annotated, Final, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from app.domain.money import Money
from app.domain.types import Line, OldLine

SHIPPING_TASK_QUEUE: Final = "shipping-tq"

#: Fields of an address in a signal that this release does not know.
MAX_UNKNOWN_FIELDS: Final = 10


def shipping_workflow_id(order_id: str) -> str:
    """One shipment per order."""
    return f"shipping/{order_id}"


class Address(BaseModel):
    """Where the parcel goes, as it is kept. Personal data: never in a log, a metric, a span or a workflow id.

    Without rules, and with what a newer release has added to it: histories and rows are read again for as long as they
    last (docs/decisions/0054-strict-at-the-edge.md).
    """

    model_config = ConfigDict(frozen=True, extra="allow")

    line1: str
    city: str
    state: str
    zip: str


class SignalledAddress(Address):
    """An address as a workflow takes it from a signal, which any client of Temporal may send.

    Its rules decide what the workflow does next, so they are part of the recorded histories: they stay as they are,
    also where those of `AddressBody` become stricter. `tests/test_payloads.py` holds them. Unknown fields are a newer
    release's, as long as PostgreSQL can store them.
    """

    __pydantic_extra__: dict[str, Annotated[OldLine, Field(max_length=200)] | None] = Field(init=False)

    line1: Annotated[OldLine, Field(max_length=200)]
    city: Annotated[OldLine, Field(max_length=100)]
    state: Annotated[OldLine, Field(max_length=64)]
    zip: Annotated[OldLine, Field(max_length=16)]

    @model_validator(mode="after")
    def _few_fields_more(self) -> Self:
        more = self.model_extra or {}
        if len(more) > MAX_UNKNOWN_FIELDS or not all(re.fullmatch(r"[a-z0-9_]{1,64}", name) for name in more):
            raise ValueError("not an address")
        return self

    @property
    def address(self) -> Address:
        """The same as it travels from here on."""
        return Address.model_validate(self.model_dump())


class AddressBody(SignalledAddress):
    """An address as a caller of the API sends it. Rules may become stricter here."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={"examples": [{"line1": "1 Main St", "city": "Springfield", "state": "IL", "zip": "62701"}]},
    )

    line1: Annotated[Line, Field(max_length=200)]
    city: Annotated[Line, Field(max_length=100)]
    state: Annotated[Line, Field(max_length=64)]
    zip: Annotated[Line, Field(max_length=16)]


class ShippingInput(BaseModel):
    """What the shipment needs to finish by itself, also when its parent is gone."""

    order_id: str
    payment_id: str
    money: Money
    address: Address | None = None
    dispatch_attempts: int = Field(
        10, description="How often the carrier may leave `dispatch` unanswered before the shipment gives up."
    )
    order_task_queue: str = Field("default", description="Where refunds run, for a shipment without parent.")
    local_steps: bool = Field(False, description="Whether steps of the database are tried where the workflow runs.")
    cancelled: bool = Field(False, description="The order was cancelled already: only ask for the parcel back.")


class Shipment(BaseModel):
    """Argument of the activities `prepare`, `dispatch` and `recall`."""

    order_id: str
    give_up_after: int = Field(
        0, description="How many questions the carrier may leave unanswered before it is given up; 0: any number."
    )


class ShippingOutcome(StrEnum):
    """How a shipment that did not fail ended."""

    SHIPPED = "shipped"
    RECALLED = "recalled"


class ShippingResult(BaseModel):
    """What the parent learns. A shipment that gives up fails instead, after telling the parent by signal."""

    outcome: ShippingOutcome
    tracking: str | None = None


class DispatchFailed(BaseModel):
    """Payload of the signal `dispatch_failed` to the parent: nothing was shipped and nothing will be."""

    reason: str = ""
