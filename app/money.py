"""Money: decimal amounts in an ISO 4217 currency, never float."""

from __future__ import annotations

from decimal import Decimal
from typing import Annotated, Final

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PlainSerializer,
    StringConstraints,
    model_validator,
)

#: Digits after the decimal point of the currencies that are taken (ISO 4217, minor units).
CURRENCY_DIGITS: Final[dict[str, int]] = {
    "AUD": 2, "BRL": 2, "CAD": 2, "CHF": 2, "CLP": 0, "CNY": 2, "CZK": 2, "DKK": 2, "EUR": 2, "GBP": 2,
    "HKD": 2, "HUF": 2, "IDR": 2, "ILS": 2, "INR": 2, "ISK": 0, "JPY": 0, "KRW": 0, "MXN": 2, "MYR": 2,
    "NOK": 2, "NZD": 2, "PHP": 2, "PLN": 2, "RON": 2, "SEK": 2, "SGD": 2, "THB": 2, "TRY": 2, "TWD": 2,
    "USD": 2, "VND": 0, "ZAR": 2,
}  # fmt: skip

#: The largest total of one order, in units of its currency.
MAX_TOTAL: Final = Decimal("1000000.00")


def _known_currency(code: str) -> str:
    if code not in CURRENCY_DIGITS:
        raise ValueError(f"unknown currency; one of {', '.join(CURRENCY_DIGITS)}")
    return code


#: ISO 4217; lower case is taken, and becomes upper case.
Currency = Annotated[
    str,
    StringConstraints(to_upper=True),
    AfterValidator(_known_currency),
    Field(description="ISO 4217 code, in any case.", examples=["USD"]),
]

#: Decimal with at most two digits after the point; written to JSON as a string.
Amount = Annotated[
    Decimal,
    Field(ge=0, le=MAX_TOTAL, decimal_places=2, allow_inf_nan=False, examples=["19.90"]),
    PlainSerializer(str, return_type=str, when_used="json"),
]


class Money(BaseModel):
    """An amount with its currency, carrying exactly the currency's digits (`"0.50"` USD, `"50"` JPY)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    amount: Amount
    currency: Currency

    @model_validator(mode="after")
    def _fit_currency(self) -> Money:
        fitted = quantize(self.amount, self.currency)
        object.__setattr__(self, "amount", fitted)
        return self

    def __str__(self) -> str:
        return f"{self.amount} {self.currency}"


def quantize(amount: Decimal, currency: str) -> Decimal:
    """`amount` with exactly the currency's digits.

    Raises:
        ValueError: if that would lose money, as with 0.5 JPY.
    """
    fitted = amount.quantize(Decimal(1).scaleb(-CURRENCY_DIGITS[currency]))
    if fitted != amount:
        raise ValueError(f"{currency} has {CURRENCY_DIGITS[currency]} digits after the decimal point")
    return fitted
