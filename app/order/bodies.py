"""What callers of the API may send, with every rule. Checked here and nowhere after: each body becomes the model of
`app.order.models` that travels on, which has no rules (docs/decisions/0054-strict-at-the-edge.md)."""

from __future__ import annotations

from decimal import Decimal
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from app.domain.money import MAX_TOTAL, Currency, Price, quantize
from app.domain.types import Remark
from app.order.models import MAX_ITEMS, MAX_REVIEW_SECONDS, PaymentId, Review, ShortId, StartOrder, Verdict
from app.shipping.models import AddressBody


class ItemBody(BaseModel):
    """One line of an order."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sku: ShortId
    quantity: Annotated[int, Field(ge=1, le=10_000, strict=True)]
    unit_price: Price


class StartOrderBody(BaseModel):
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
    items: list[ItemBody] = Field(
        default_factory=list,
        min_length=1,
        max_length=MAX_ITEMS,
        description="Left out, the order is one unit of `TRELLIS-DEMO`, where there is a price for that "
        "(`TRELLIS_DEMO_PRICE`); elsewhere it is required.",
    )
    currency: Currency = "USD"
    address: AddressBody | None = None
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
    def request(self) -> StartOrder:
        """The same as it travels from here on."""
        return StartOrder.model_validate(self.model_dump())


class ReviewBody(BaseModel):
    """Body of `POST /orders/{id}/review`."""

    model_config = ConfigDict(
        extra="forbid", json_schema_extra={"examples": [{"decision": "approve", "note": "known customer"}]}
    )

    decision: Verdict
    note: Remark = ""
    digest: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")] | None = Field(
        None,
        description="`digest` of what you have looked at. The decision is refused with 409 if the order is no longer "
        "that.",
    )

    @property
    def review(self) -> Review:
        """The same as it travels from here on."""
        return Review.model_validate(self.model_dump())


def _fault(rule: str, *place: str | int) -> InitErrorDetails:
    return InitErrorDetails(type=PydanticCustomError("value_error", rule), loc=place, input=None)


def _sum(items: list[ItemBody]) -> Decimal:
    return sum((item.quantity * item.unit_price for item in items), Decimal(0))
