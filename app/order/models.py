"""The words of an order: what starts it, what changes it, what it answers.

Shared by the API, the workflow and the activities, so that a request travels as one model from HTTP to PostgreSQL.
New fields get defaults: recorded histories of earlier versions must still decode.
"""

from __future__ import annotations

import hashlib
from datetime import datetime
from decimal import Decimal
from enum import StrEnum
from typing import Annotated, Any, Final, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from app.money import MAX_TOTAL, Amount, Currency, Money, quantize
from app.shipping.models import SHIPPING_TASK_QUEUE, Address
from app.steps import Step
from app.text import IDENTIFIER, Remark

ORDER_TASK_QUEUE: Final = "default"

#: What an order without items consists of, and its documented price, the same figure in every currency.
DEMO_SKU: Final = "TRELLIS-DEMO"
DEMO_PRICE: Final = Decimal("50.00")

MAX_REVIEW_SECONDS: Final = 30 * 24 * 3600
MAX_ITEMS: Final = 100


def _not_a_path_step(order_id: str) -> str:
    if order_id in {".", ".."}:
        raise ValueError("'.' and '..' would be taken for steps of a path")
    return order_id


OrderId = Annotated[
    str, StringConstraints(min_length=1, max_length=64, pattern=IDENTIFIER), AfterValidator(_not_a_path_step)
]
PaymentId = Annotated[str, StringConstraints(min_length=1, max_length=128, pattern=IDENTIFIER)]
ShortId = Annotated[str, StringConstraints(min_length=1, max_length=64, pattern=IDENTIFIER)]


def order_workflow_id(order_id: str) -> str:
    """One workflow per order, for ever: the id is never used again."""
    return f"order/{order_id}"


class Item(BaseModel):
    """One line of an order."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sku: ShortId
    quantity: Annotated[int, Field(ge=1, le=10_000, strict=True)]
    unit_price: Amount


class StartOrder(BaseModel):
    """Body of `POST /orders/{id}/start`. Only `payment_id` is required."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [
                {"payment_id": "pay-1"},
                {
                    "payment_id": "pay-2",
                    "items": [{"sku": "TEA-100", "quantity": 2, "unit_price": "12.50"}],
                    "currency": "EUR",
                    "address": {"line1": "1 Main St", "city": "Springfield", "state": "IL", "zip": "62701"},
                    "review_timeout_seconds": 3600,
                    "customer_id": "c-42",
                },
            ]
        },
    )

    payment_id: PaymentId
    items: Annotated[list[Item], Field(max_length=MAX_ITEMS)] = []
    currency: Currency = "USD"
    address: Address | None = None
    review_timeout_seconds: Annotated[int, Field(ge=1, le=MAX_REVIEW_SECONDS, strict=True)] | None = None
    customer_id: ShortId | None = None

    @model_validator(mode="after")
    def _prices_fit_the_currency(self) -> Self:
        items, faults = [], []
        for number, item in enumerate(self.items):
            try:
                items.append(item.model_copy(update={"unit_price": quantize(item.unit_price, self.currency)}))
            except ValueError as error:
                faults.append(_fault(str(error), "items", number, "unit_price"))
        if items and not faults and not 0 < _sum(items) <= MAX_TOTAL:
            faults.append(_fault(f"the total must be more than 0 and at most {MAX_TOTAL}", "items"))
        if faults:
            # With the place of each, which a ValueError would not have.
            raise ValidationError.from_exception_data(type(self).__name__, faults)
        self.items = items
        return self

    @property
    def total(self) -> Money:
        """What will be charged."""
        return Money(amount=_sum(self.items) if self.items else DEMO_PRICE, currency=self.currency)

    @property
    def fingerprint(self) -> str:
        """Equal for two requests that ask for the same; kept with the order to tell a repeat from a conflict.

        Defaults are left out, so that a field added later does not change the fingerprint of older requests.
        """
        return hashlib.sha256(self.model_dump_json(exclude_defaults=True).encode()).hexdigest()


def _fault(rule: str, *place: str | int) -> InitErrorDetails:
    return InitErrorDetails(type=PydanticCustomError("value_error", rule), loc=place, input=None)


def _sum(items: list[Item]) -> Decimal:
    return sum((item.quantity * item.unit_price for item in items), Decimal(0))


class OrderInput(BaseModel):
    """What `OrderWorkflow` starts with: the request and every setting that its decisions depend on.

    Settings travel with the order, so that a worker restarted with others replays the same decisions.
    """

    order_id: OrderId
    request: StartOrder
    review_timeout_seconds: int = 10
    dispatch_attempts: int = 10
    order_task_queue: str = ORDER_TASK_QUEUE
    shipping_task_queue: str = SHIPPING_TASK_QUEUE
    #: Off for orders that began before there was such a thing.
    local_steps: bool = False


class OrderResult(BaseModel):
    """How the order ended."""

    order_id: str
    step: Step


class OrderStatus(BaseModel):
    """Answer of `GET /orders/{id}/status` and of the query `status`."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"order_id": "o-1", "step": "awaiting_review", "last_error": None}]}
    )

    order_id: str
    step: Step
    last_error: str | None = Field(
        None, description="The latest failed attempt, until the next success; for a failed order, why."
    )


class Verdict(StrEnum):
    """What a clerk can decide."""

    APPROVE = "approve"
    REJECT = "reject"

    @property
    def leads_to(self) -> Step:
        """The step that the order enters because of it."""
        return Step.CHARGING if self is Verdict.APPROVE else Step.REJECTED


class Review(BaseModel):
    """Body of `POST /orders/{id}/review`, argument of the update `review`."""

    model_config = ConfigDict(
        extra="forbid", json_schema_extra={"examples": [{"decision": "approve", "note": "known customer"}]}
    )

    decision: Verdict
    note: Remark = ""


class SignalBody(BaseModel):
    """Body of the signal calls that need none: nothing, or `{}`."""

    model_config = ConfigDict(extra="forbid")


class SignalPayload(BaseModel):
    """Argument of the update `cancel_order`, and what the API sends with the signals `approve` and `cancel`: nothing
    is needed, and nothing makes it undecodable."""

    model_config = ConfigDict(extra="allow")


class CloseOrder(BaseModel):
    """Argument of the activity `close`: end an order that has no charge."""

    order_id: str
    step: Step
    reason: str
    note: str = ""


class NoteRequest(BaseModel):
    """Argument of the activity `note`: tell in the timeline what did not change the order."""

    order_id: str
    type: str
    payload: dict[str, Any] = {}


class AddressChange(BaseModel):
    """Argument of the activity `change_address`."""

    order_id: str
    address: Address


class AddressDecision(BaseModel):
    """Answer of the activity `change_address`."""

    accepted: bool


# --- what the API answers -----------------------------------------------------------------------------------


class StartAccepted(BaseModel):
    """Answer of `POST /orders/{id}/start`: the order is durable."""

    order_id: str = Field(examples=["o-1"])
    workflow_id: str = Field(examples=["order/o-1"])
    run_id: str = Field(examples=["019aa3f0-6a4c-7d3e-9d3b-0b9f6f2a7c11"])


class Accepted(BaseModel):
    """Answer to a signal: it is durable; whether it counts, the timeline tells."""

    order_id: str = Field(examples=["o-1"])
    signal: str = Field(examples=["approve"])


class Decided(BaseModel):
    """Answer to an update: it counted, and this is what it led to. The same call again gets the same answer."""

    order_id: str = Field(examples=["o-1"])
    step: Step = Field(
        description="What it led to: `charging` for an approval, `rejected`, `cancelled`. A cancellation during the "
        "charge answers `charging`: what was charged is refunded as soon as that is known. For an address, the step "
        "the order was at."
    )


class Event(BaseModel):
    """One line of the timeline."""

    id: int = Field(examples=[42])
    type: str = Field(examples=["charged"])
    ts: datetime
    payload: dict[str, Any] = Field(examples=[{"amount": "50.00", "currency": "USD"}])


class Events(BaseModel):
    """Answer of `GET /orders/{id}/events`, oldest first."""

    events: list[Event]


class PaymentView(BaseModel):
    """The order's payment, once a charge has begun."""

    payment_id: str
    status: str = Field(examples=["CHARGED"])
    amount: Amount
    provider_reference: str | None
    created_at: datetime


class OrderSummary(BaseModel):
    """One line of `GET /orders`."""

    order_id: str = Field(examples=["o-1"])
    step: Step
    last_error: str | None
    payment_id: str | None
    total: Amount
    currency: str
    customer_id: str | None
    created_at: datetime
    step_since: datetime = Field(description="When the order entered its step.")


class OrderView(OrderSummary):
    """Answer of `GET /orders/{id}`: all of it."""

    workflow_id: str
    run_id: str | None
    items: list[Item]
    address: Address | None
    review_deadline: datetime | None
    tracking: str | None
    payment: PaymentView | None
    trace_id: str | None = Field(None, description="The trace that shows all of the order; null if it was not traced.")


class OrderPage(BaseModel):
    """Answer of `GET /orders`."""

    orders: list[OrderSummary]
    next: str | None = Field(description="Pass as `after` to get the next page; null on the last.")


class ReviewTask(BaseModel):
    """One line of the clerk's queue."""

    order_id: str
    review_deadline: datetime
    seconds_left: float = Field(description="Until the order expires; negative when it is about to.")
    total: Amount
    currency: str
    items: list[Item]
    customer_id: str | None
    created_at: datetime


class ReviewPage(BaseModel):
    """Answer of `GET /reviews`, most urgent first."""

    reviews: list[ReviewTask]
    next: str | None = Field(description="Pass as `after` to get the next page; null on the last.")
