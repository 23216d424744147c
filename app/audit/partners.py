"""Whom the auditor asks outside: the provider's and the carrier's own books."""

from __future__ import annotations

from http import HTTPStatus
from typing import TYPE_CHECKING, Final, Protocol

import httpx
from pydantic import BaseModel, ValidationError

from app.audit.models import Movement, Movements, Parcel, ParcelState
from app.errors import CarrierUnavailable, PaymentUnavailable
from app.money import Money

if TYPE_CHECKING:
    from app.payment.gateway import PaymentGateway, Receipt

NO_PARCEL: Final = Parcel(state=ParcelState.UNKNOWN)


class ProviderBooks(Protocol):
    """Where the auditor learns what the provider moved."""

    async def movements(self, payment_id: str) -> Movements:
        """Everything that was moved under this payment id.

        Raises:
            PaymentUnavailable: no answer.
        """
        ...


class CarrierBooks(Protocol):
    """Where the auditor learns what became of a parcel, without changing it."""

    async def parcel(self, order_id: str) -> Parcel:
        """The parcel of this order.

        Raises:
            CarrierUnavailable: no answer.
        """
        ...


class GatewayBooks(ProviderBooks):
    """Any provider, through the two look-ups that charging needs anyway.

    They go by idempotency key: money that was taken without the key is seen only by a provider's own ledger.
    """

    def __init__(self, gateway: PaymentGateway) -> None:
        self._gateway = gateway

    async def movements(self, payment_id: str) -> Movements:
        """See `ProviderBooks.movements`."""
        return Movements(
            charges=_movements(await self._gateway.find_charge(payment_id)),
            refunds=_movements(await self._gateway.find_refund(payment_id)),
        )


class LedgerBooks(ProviderBooks, CarrierBooks):
    """Partners that show their ledger at `/v1/ledger`, as the sandbox does: money moved without a key shows, too."""

    def __init__(self, payments: httpx.AsyncClient, carrier: httpx.AsyncClient) -> None:
        self._payments = payments
        self._carrier = carrier

    async def movements(self, payment_id: str) -> Movements:
        """See `ProviderBooks.movements`."""
        try:
            response = await self._payments.get("/v1/ledger", params={"payment": payment_id})
            response.raise_for_status()
            account = _Account.model_validate_json(response.content)
        except (httpx.HTTPError, ValidationError) as error:
            raise PaymentUnavailable(type(error).__name__) from None
        return Movements(
            charges=[entry.movement for entry in account.charges],
            refunds=[entry.movement for entry in account.refunds],
        )

    async def parcel(self, order_id: str) -> Parcel:
        """See `CarrierBooks.parcel`."""
        try:
            response = await self._carrier.get("/v1/ledger", params={"order_id": order_id})
            if response.status_code == HTTPStatus.NOT_FOUND and "parcel_not_found" in response.text:
                return NO_PARCEL
            response.raise_for_status()
            return Parcel.model_validate_json(response.content)
        except (httpx.HTTPError, ValidationError) as error:
            raise CarrierUnavailable(type(error).__name__) from None


class _Entry(BaseModel):
    id: str
    amount: str
    currency: str

    @property
    def movement(self) -> Movement:
        return Movement(
            reference=self.id, money=Money.model_validate({"amount": self.amount, "currency": self.currency})
        )


class _Account(BaseModel):
    charges: list[_Entry]
    refunds: list[_Entry]


def _movements(receipt: Receipt | None) -> list[Movement]:
    return [Movement(reference=receipt.reference, money=receipt.money)] if receipt else []
