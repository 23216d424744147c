"""The contract of `ShippingWorkflow`: owned here, imported by whoever ships."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Final

from pydantic import BaseModel, ConfigDict, Field

from app.money import Money
from app.text import Line

SHIPPING_TASK_QUEUE: Final = "shipping-tq"


def shipping_workflow_id(order_id: str) -> str:
    """One shipment per order."""
    return f"shipping/{order_id}"


class Address(BaseModel):
    """Where the parcel goes. Personal data: never in a log, a metric, a span or a workflow id."""

    model_config = ConfigDict(
        frozen=True,
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
