"""Money: decimal amounts in an ISO 4217 currency, never float."""

from __future__ import annotations

from decimal import Decimal, InvalidOperation
from typing import Annotated, Final

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    StringConstraints,
    WithJsonSchema,
    model_validator,
)

from app.domain.types import DECIMAL_NUMBER

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
    # Before the case is changed: there are letters of other alphabets whose upper case is one of ours.
    StringConstraints(pattern=r"^[A-Za-z]+$", to_upper=True),
    AfterValidator(_known_currency),
    Field(description="ISO 4217 code, in any case.", examples=["USD"]),
]

#: Any decimal; written to JSON as a string. What an amount may be is checked where it comes in, not where it is read
#: again: an order that was accepted stays readable when a rule becomes stricter.
Amount = Annotated[
    Decimal,
    Field(allow_inf_nan=False, examples=["19.90"]),
    PlainSerializer(str, return_type=str, when_used="json"),
]


def plain_decimal(amount: object) -> object:
    """An amount as text, if it is one as people write it; anything else as it is.

    Raises:
        ValueError: it is a text of another kind, which Python may well take for a number; or it has been a float.
    """
    if isinstance(amount, bool | float) or (isinstance(amount, str) and not DECIMAL_NUMBER.fullmatch(amount)):
        raise ValueError('not a decimal number: digits, and a point where there are more after it, such as "19.90"')
    return amount


#: A price as a caller may send it, with at most two digits after the point: text, or a number of JSON that nobody has
#: made a float of (`app.http.json_body`).
Price = Annotated[
    Amount,
    Field(ge=0, le=MAX_TOTAL, decimal_places=2),
    BeforeValidator(plain_decimal),
    # A zero may have come with a sign.
    AfterValidator(abs),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)?$"},
                {"type": "number", "minimum": 0, "maximum": float(MAX_TOTAL)},
            ],
            "examples": ["19.90"],
        },
        mode="validation",
    ),
]


class Money(BaseModel):
    """An amount with its currency, carrying exactly the currency's digits (`"0.50"` USD, `"50"` JPY).

    An amount that its currency cannot have is kept as it is, and no rule refuses it: Temporal's histories hold this
    model (docs/decisions/0054-strict-at-the-edge.md).
    """

    model_config = ConfigDict(frozen=True)

    amount: Amount
    currency: str

    @model_validator(mode="after")
    def _fit_currency(self) -> Money:
        object.__setattr__(self, "amount", fit(self.amount, self.currency))
        return self

    @property
    def fault(self) -> str | None:
        """Why nobody can be charged this; None if they can."""
        if self.amount <= 0:
            return "the total must be more than 0"
        try:
            quantize(self.amount, self.currency)
        except ValueError as error:
            return str(error)
        return None

    def __str__(self) -> str:
        return f"{self.amount} {self.currency}"


def fit(amount: Decimal, currency: str) -> Decimal:
    """`amount` with exactly the currency's digits, or as it is where there is no such amount."""
    try:
        return quantize(amount, currency)
    except ValueError:
        return amount


def exact_amount(amount: Decimal, currency: str) -> Decimal:
    """An amount from outside, which is not negative, with exactly the currency's digits.

    Raises:
        ValueError: its currency has no such amount, or is unknown.
    """
    if amount < 0:
        raise ValueError("an amount is not negative")
    return quantize(amount, currency)


def quantize(amount: Decimal, currency: str) -> Decimal:
    """`amount` with exactly the currency's digits.

    Raises:
        ValueError: if that would lose money, as with 0.5 JPY; or if the currency is unknown.
    """
    _known_currency(currency)
    try:
        fitted = amount.quantize(Decimal(1).scaleb(-CURRENCY_DIGITS[currency]))
    except InvalidOperation:
        raise ValueError("too many digits") from None
    if fitted != amount:
        raise ValueError(f"{currency} has {CURRENCY_DIGITS[currency]} digits after the decimal point")
    return fitted
