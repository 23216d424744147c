"""What an audit finds, in words: one kind for each way the books can be wrong."""

from __future__ import annotations

from datetime import datetime
from decimal import Decimal
from enum import StrEnum
from typing import Final

from pydantic import BaseModel, Field

from app.domain.money import Money
from app.domain.steps import PaymentStatus, Step


class Kind(StrEnum):
    """The kinds of violation. The names are stable: scripts and alerts match them."""

    CHARGED_TWICE = "charged_twice"
    CHARGE_UNSETTLED = "charge_unsettled"
    CHARGE_MISSING = "charge_missing"
    REFUND_MISSING = "refund_missing"
    REFUNDED_TWICE = "refunded_twice"
    REFUND_WITHOUT_CHARGE = "refund_without_charge"
    REFUNDED_NOT_CLOSED = "refunded_not_closed"
    AMOUNT_DIFFERS = "amount_differs"
    REFERENCE_DIFFERS = "reference_differs"
    PAYMENT_STEP_MISMATCH = "payment_step_mismatch"
    PAYMENT_IN_DOUBT = "payment_in_doubt"
    EVENT_DOUBLED = "event_doubled"
    EVENT_MISSING = "event_missing"
    OPEN_WITHOUT_WORKFLOW = "open_without_workflow"
    ORDER_MISSING = "order_missing"
    PARCEL_UNSETTLED = "parcel_unsettled"
    PARCEL_MISSING = "parcel_missing"
    UNREADABLE = "unreadable"


#: What each kind means, for people; `trellis audit --kinds` prints it.
MEANING: Final[dict[Kind, str]] = {
    Kind.CHARGED_TWICE: "the provider took money more than once under one payment id",
    Kind.CHARGE_UNSETTLED: "the provider has a charge that was never given back, and the order is not the one it paid",
    Kind.CHARGE_MISSING: "the payment says charged, and the provider knows of no charge",
    Kind.REFUND_MISSING: "the payment says refunded, and the provider gave nothing back",
    Kind.REFUNDED_TWICE: "the provider gave money back more than once under one payment id",
    Kind.REFUND_WITHOUT_CHARGE: "the provider gave money back that it never took",
    Kind.REFUNDED_NOT_CLOSED: "the provider gave the money back, and the order was shipped or failed all the same",
    Kind.AMOUNT_DIFFERS: "order, payment, event and provider do not name the same amount and currency",
    Kind.REFERENCE_DIFFERS: "the payment names another movement than the provider does",
    Kind.PAYMENT_STEP_MISMATCH: "the payment's status does not go with the order's step",
    Kind.PAYMENT_IN_DOUBT: "the order is closed, and nobody has settled yet whether its charge went through",
    Kind.EVENT_DOUBLED: "a step was told twice in the timeline",
    Kind.EVENT_MISSING: "the timeline does not lead from `received` to the order's step, one legal move at a time",
    Kind.OPEN_WITHOUT_WORKFLOW: "the order is open, and no workflow of it is running: `trellis reconcile` settles it",
    Kind.ORDER_MISSING: "a workflow or a timeline tells of an order that has no row",
    Kind.PARCEL_UNSETTLED: "the carrier has the parcel, and the order was closed as not shipped",
    Kind.PARCEL_MISSING: "the order is shipped, and the carrier does not have the parcel, or under another id",
    Kind.UNREADABLE: "somebody wrote a row or an event that cannot be read as an order's",
}


class Violation(BaseModel):
    """One thing that is wrong with one order."""

    kind: Kind
    order_id: str
    detail: str = Field(description="Ids, steps and amounts; never an address or a name.")
    unconfirmed: bool = Field(
        False, description="Seen once; at the second look, whoever has to be asked about it did not answer."
    )


class Report(BaseModel):
    """The outcome of an audit."""

    orders: int = Field(0, description="Orders whose books were compared.")
    payments: int = Field(0, description="Payment ids that the provider was asked about.")
    workflows: int = Field(0, description="Closed order workflows that were looked for in the tables.")
    violations: list[Violation] = []
    incomplete: list[str] = Field([], description="What could not be looked at, and why; then clean is not proved.")

    @property
    def clean(self) -> bool:
        """Everything was looked at and nothing was wrong."""
        return not self.violations and not self.incomplete


# --- what is compared ----------------------------------------------------------------------------------------


class PaymentRow(BaseModel):
    """The order's row in `payments`."""

    payment_id: str
    status: PaymentStatus
    amount: Decimal
    asked: Decimal | None
    currency: str
    provider_reference: str | None
    refund_reference: str | None


class StepEvent(BaseModel):
    """An event named after a step, or `refunded`, with the money it tells of."""

    type: str
    amount: str | None
    currency: str | None


class OrderBooks(BaseModel):
    """All that the product itself has written down of one order, in one snapshot."""

    order_id: str
    step: Step
    step_since: datetime
    step_seconds: float = Field(description="How long it has been at its step, by the database's clock.")
    payment_id: str | None
    total: Money
    tracking: str | None
    payment: PaymentRow | None
    payment_owner: str | None = Field(description="The order whose payment row has this order's payment id.")
    events: list[StepEvent]

    @property
    def version(self) -> tuple[Step, datetime, str | None]:
        """Differs when the order has moved."""
        return self.step, self.step_since, self.payment.status if self.payment else None


class Page(BaseModel):
    """Some orders' books."""

    books: list[OrderBooks] = []
    #: Orders whose rows cannot be read, with the kind of error.
    unreadable: dict[str, str] = {}


class Movement(BaseModel):
    """A charge or a refund as the provider has it."""

    reference: str
    money: Money


class Movements(BaseModel):
    """All that the provider moved under one payment id."""

    charges: list[Movement] = []
    refunds: list[Movement] = []


class ParcelState(StrEnum):
    """Where the carrier says the parcel is."""

    UNKNOWN = "unknown"
    TAKEN = "taken"
    RECALLED = "recalled"


class Parcel(BaseModel):
    """The carrier's word on an order's parcel."""

    state: ParcelState
    tracking: str | None = None
