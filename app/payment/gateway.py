"""What this product asks of a payment provider: four calls, each safe to repeat."""

from __future__ import annotations

from typing import Protocol

from pydantic import BaseModel, ConfigDict, Field

from app.domain.money import Money


class Receipt(BaseModel):
    """The provider's word on one movement of money."""

    model_config = ConfigDict(frozen=True)

    reference: str = Field(description="The provider's own id of the movement.")
    money: Money


class PaymentGateway(Protocol):
    """A payment provider. Both movements are idempotent by key: the same call again answers the same receipt.

    The key of a charge is the payment id. The key of a refund is derived from it (`refund_key`), so that a refund
    can never be taken for the charge.
    """

    async def charge(self, payment_id: str, money: Money) -> Receipt:
        """Take the money, once per `payment_id`.

        Raises:
            PaymentDeclined: the provider said no; asking again will not help.
            PaymentConflict: the key was used before with another amount or currency.
            PaymentUnavailable: no answer, or one that says "later"; the money may or may not have moved.
            PaymentMismatch: another amount was taken than asked for.
        """
        ...

    async def refund(self, payment_id: str, money: Money) -> Receipt:
        """Give the money of a charge back, once per `payment_id`.

        Raises:
            PaymentConflict: nothing was charged under this id, or another amount.
            PaymentUnavailable: as for `charge`.
        """
        ...

    async def find_charge(self, payment_id: str) -> Receipt | None:
        """The successful charge under this key, or None if there is none. Moves no money.

        Raises:
            PaymentUnavailable: no answer.
        """
        ...

    async def find_refund(self, payment_id: str) -> Receipt | None:
        """The successful refund of this payment, or None. Moves no money.

        Raises:
            PaymentUnavailable: no answer.
        """
        ...


def refund_key(payment_id: str) -> str:
    """The idempotency key of the refund of `payment_id`."""
    return f"{payment_id}:refund"
