"""The words of an order: what starts it, what changes it, what it answers.

Shared by the API, the workflow and the activities, so that a request travels as one model from HTTP to PostgreSQL.
These models are the format of Temporal's histories: new fields get defaults, none has a rule that a recorded value
could break, and unknown fields are no fault. What callers may send is in `app.order.bodies`.
"""

from __future__ import annotations

import hashlib
import json
from datetime import datetime
from decimal import Decimal
from enum import StrEnum
from typing import Annotated, Any, Final

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints

from app.domain.money import Amount, Money
from app.domain.steps import PaymentStatus, Step
from app.domain.types import IDENTIFIER
from app.shipping.models import SHIPPING_TASK_QUEUE, Address

ORDER_TASK_QUEUE: Final = "default"

#: What an order without items consists of.
DEMO_SKU: Final = "TRELLIS-DEMO"

#: Its price in orders that were started before their price travelled with them. `Settings.demo_price` is today's.
OLD_DEMO_PRICE: Final = Decimal("50.00")

REOPENED_FOR: Final = "`address` while the order waits for a second review, as its address has changed since the first."
DIGEST: Final = "Of all that is approved: items, total, payment and address. Send it back with the decision."

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

    model_config = ConfigDict(frozen=True, extra="allow")

    sku: str
    quantity: int
    unit_price: Amount


class StartOrder(BaseModel):
    """What was ordered, as it travels with the order; `StartOrderBody` is what a caller sends.

    What a newer release has added is kept, so that an order of its passes through this one whole. New fields go to the
    end: `fingerprint` depends on their order.
    """

    model_config = ConfigDict(extra="allow")

    payment_id: str
    items: list[Item] = []
    currency: str = "USD"
    address: Address | None = None
    review_timeout_seconds: int | None = None
    customer_id: str | None = None

    @property
    def fingerprint(self) -> str:
        """Equal for two requests that ask for the same; kept with the order to tell a repeat from a conflict.

        Defaults are left out, so that a field added later does not change the fingerprint of older requests.
        """
        return hashlib.sha256(self.model_dump_json(exclude_defaults=True).encode()).hexdigest()


def _sum(items: list[Item]) -> Decimal:
    return sum((item.quantity * item.unit_price for item in items), Decimal(0))


class OrderInput(BaseModel):
    """What `OrderWorkflow` starts with: the request and every setting that its decisions depend on.

    Settings travel with the order, so that a worker restarted with others replays the same decisions.
    """

    order_id: str
    request: StartOrder
    review_timeout_seconds: int = 10
    dispatch_attempts: int = 10
    order_task_queue: str = ORDER_TASK_QUEUE
    shipping_task_queue: str = SHIPPING_TASK_QUEUE
    #: Off for orders that began before there was such a thing.
    local_steps: bool = False
    #: What an order without items costs, the same figure in every currency. None: the order has items.
    demo_price: Amount | None = OLD_DEMO_PRICE
    #: What becomes of another address after the approval: `allow`, `review` or `deny`. A value that this release does
    #: not know denies it.
    address_after_review: str = "allow"

    @property
    def total(self) -> Money:
        """What will be charged."""
        items = self.request.items
        return Money(amount=_sum(items) if items else self.demo_price or Decimal(0), currency=self.request.currency)

    def digest(self, address: Address | None) -> str:
        """`approval_digest` of the order with this address."""
        request = self.request
        return approval_digest(self.order_id, request.payment_id, request.items, self.total, address)


def approval_digest(
    order_id: str, payment_id: str | None, items: list[Item], total: Money, address: Address | None
) -> str:
    """Of all that a reviewer approves: equal as long as nothing of it has changed. In hexadecimal."""
    return _digest(
        {
            "order_id": order_id,
            "payment_id": payment_id,
            "items": [item.model_dump(mode="json") for item in items],
            "total": str(total),
            "address": address.model_dump(mode="json") if address else None,
        }
    )


def address_digest(order_id: str, address: Address) -> str:
    """Of an address of this order: tells whether two are the same, without saying what they are. In hexadecimal.

    No secret: it can be found out by trying addresses. It may go where the order's own events go, and not into logs.
    """
    return _digest({"order_id": order_id, "address": address.model_dump(mode="json")})


def _digest(facts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


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
    """Argument of the update `review`; `ReviewBody` is what a caller sends."""

    decision: Verdict
    note: str = ""
    #: Of what the reviewer has seen; None decides on the order as it is.
    digest: str | None = None


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


class LocateOrder(BaseModel):
    """Argument of the activity `locate`."""

    order_id: str


class AddressChange(BaseModel):
    """Argument of the activity `change_address`."""

    order_id: str
    address: Address
    digest: str = Field("", description="Of what would be approved with it.")


class AddressDecision(BaseModel):
    """Answer of the activity `change_address`."""

    accepted: bool


class ReopenReview(BaseModel):
    """Argument of the activity `reopen_review`: what was approved has changed since."""

    order_id: str
    review_timeout_seconds: int
    digest: str


class ReviewDecision(BaseModel):
    """Argument of the activity `settle_review`: the decision of a review that was opened again."""

    order_id: str
    decision: Verdict
    note: str
    digest: str


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


#: Types of events besides the steps, each with what its payload holds. A client leaves out types that it does not know.
OTHER_EVENTS: Final[dict[str, str]] = {
    "attempt_failed": "`activity`, `attempt`, `error_type`, `message`, `retryable`",
    "attempt_retried": "`activity`, `attempt`, `error_type` of the attempt before",
    "address_changed": "`address`, a digest of it; `digest`, of what there is to approve with it",
    "address_refused": "",
    "address_ignored": "`reason`",
    "approve_ignored": "`reason`",
    "cancel_refused": "`reason`",
    "review_reopened": "`changed`, `review_timeout_seconds`, `digest`",
    "review_decided": "`decision`, `digest`; `note`, if it has one",
    "recalled": "",
    "refunded": "`payment_id`, `reference`, `amount`, `currency`",
    "reconciled": "`found`, `reason`",
}

#: What the payload of a step's event holds.
STEP_EVENTS: Final[dict[Step, str]] = {
    Step.RECEIVED: "`payment_id`, `amount`, `currency`",
    Step.AWAITING_REVIEW: "`review_timeout_seconds`",
    Step.CHARGING: "`payment_id`; `digest` of what was approved; `note` of the approval, if it has one",
    Step.CHARGED: "`payment_id`, `reference`, `amount`, `currency`",
    Step.PREPARED: "",
    Step.SHIPPED: "`tracking`, `pickup`",
    Step.REJECTED: "`reason`; `note` of the review, if it has one",
    Step.EXPIRED: "`reason`",
    Step.CANCELLED: "`reason`",
    Step.PAYMENT_FAILED: "`payment_id`, `reason`",
    Step.SHIPPING_FAILED: "`reason`",
}


def _event_types(schema: dict[str, Any]) -> None:
    payloads = {str(name): payload for name, payload in (STEP_EVENTS | OTHER_EVENTS).items()}
    schema["enum"] = list(payloads)
    schema["description"] = "What happened, and what the payload holds:\n\n" + "\n".join(
        f"- `{name}`: {payload or 'nothing'}" for name, payload in payloads.items()
    )


class Event(BaseModel):
    """One line of the timeline."""

    id: int = Field(examples=[42])
    type: str = Field(examples=["charged"], json_schema_extra=_event_types)
    ts: datetime
    payload: dict[str, Any] = Field(examples=[{"amount": "50.00", "currency": "USD"}])


class Events(BaseModel):
    """Answer of `GET /orders/{id}/events`, oldest first."""

    events: list[Event]


class PaymentView(BaseModel):
    """The order's payment, once a charge has begun."""

    payment_id: str
    status: PaymentStatus = Field(examples=["CHARGED"])
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
    reopened_for: str | None = Field(None, description=REOPENED_FOR)
    digest: str = Field("", description=DIGEST)
    tracking: str | None
    payment: PaymentView | None
    trace_id: str | None = Field(None, description="The trace that shows all of the order; null if it was not traced.")
    review_note: str | None = Field(None, description="What the clerk noted with the decision.")
    reason: str | None = Field(None, description="Why an order that has ended did not ship.")


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
    payment_id: str | None
    earlier_orders: int | None = Field(
        description="How many orders of this customer came before, counted to 100; null without a `customer_id`."
    )
    created_at: datetime
    reopened_for: str | None = Field(None, description=REOPENED_FOR)
    digest: str = Field("", description=DIGEST)


class ReviewPage(BaseModel):
    """Answer of `GET /reviews`, most urgent first."""

    reviews: list[ReviewTask]
    next: str | None = Field(description="Pass as `after` to get the next page; null on the last.")
