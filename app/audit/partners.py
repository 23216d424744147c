"""Whom the auditor asks outside: the provider's and the carrier's own books."""

from __future__ import annotations

from http import HTTPStatus
from typing import TYPE_CHECKING, Final, Protocol, runtime_checkable

import httpx
from pydantic import BaseModel, ValidationError

from app.audit.models import Movement, Movements, Parcel, ParcelState
from app.domain.money import Money
from app.errors import CarrierUnavailable, InvalidRequest, PaymentUnavailable

if TYPE_CHECKING:
    from app.payment.gateway import PaymentGateway, Receipt
    from app.shipping.carrier import Carrier

NO_PARCEL: Final = Parcel(state=ParcelState.UNKNOWN)


@runtime_checkable
class ProviderBooks(Protocol):
    """Where the auditor learns what the provider moved."""

    async def movements(self, payment_id: str) -> Movements:
        """Everything that was moved under this payment id.

        Raises:
            PaymentUnavailable: no answer.
        """
        ...


@runtime_checkable
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


class ProviderLedger(ProviderBooks):
    """A provider that shows its ledger at `/v1/ledger`, as the sandbox does: money moved without a key shows, too."""

    def __init__(self, client: httpx.AsyncClient) -> None:
        self._client = client

    async def movements(self, payment_id: str) -> Movements:
        """See `ProviderBooks.movements`."""
        try:
            response = await self._client.get("/v1/ledger", params={"payment": payment_id})
            response.raise_for_status()
            account = _Account.model_validate_json(response.content)
            return Movements(
                charges=[entry.movement for entry in account.charges],
                refunds=[entry.movement for entry in account.refunds],
            )
        except (httpx.HTTPError, ValidationError) as error:
            raise PaymentUnavailable(type(error).__name__) from None


class CarrierLedger(CarrierBooks):
    """A carrier that shows its ledger, likewise."""

    def __init__(self, client: httpx.AsyncClient) -> None:
        self._client = client

    async def parcel(self, order_id: str) -> Parcel:
        """See `CarrierBooks.parcel`."""
        try:
            response = await self._client.get("/v1/ledger", params={"order_id": order_id})
            if response.status_code == HTTPStatus.NOT_FOUND and "parcel_not_found" in response.text:
                return NO_PARCEL
            response.raise_for_status()
            return Parcel.model_validate_json(response.content)
        except (httpx.HTTPError, ValidationError) as error:
            raise CarrierUnavailable(type(error).__name__) from None


class LedgerBooks(ProviderBooks, CarrierBooks):
    """Both in one."""

    def __init__(self, payments: httpx.AsyncClient, carrier: httpx.AsyncClient) -> None:
        self._provider = ProviderLedger(payments)
        self._carrier = CarrierLedger(carrier)

    async def movements(self, payment_id: str) -> Movements:
        """See `ProviderBooks.movements`."""
        return await self._provider.movements(payment_id)

    async def parcel(self, order_id: str) -> Parcel:
        """See `CarrierBooks.parcel`."""
        return await self._carrier.parcel(order_id)


# --- what the partners that are wired can be asked


@runtime_checkable
class OverHttp(Protocol):
    """A partner that is reached over HTTP, as the built-in clients are."""

    client: httpx.AsyncClient
    #: Whether it has `/v1/ledger`, as the sandbox has.
    shows_ledger: bool


def books_of_provider(gateway: PaymentGateway) -> ProviderBooks:
    """The fullest books that this provider shows: its own method `movements`, its ledger, or the look-ups by key that
    each must have."""
    if isinstance(gateway, ProviderBooks):
        return gateway
    if isinstance(gateway, OverHttp) and gateway.shows_ledger:
        return ProviderLedger(gateway.client)
    return GatewayBooks(gateway)


def books_of_carrier(carrier: Carrier) -> CarrierBooks | None:
    """The same for the carrier: its own method `parcel`, or its ledger. None: it can't be asked without changing what
    becomes of the parcel."""
    if isinstance(carrier, CarrierBooks):
        return carrier
    if isinstance(carrier, OverHttp) and carrier.shows_ledger:
        return CarrierLedger(carrier.client)
    return None


def ledger_of(partner: object) -> httpx.AsyncClient:
    """The client of a partner that somebody says has a ledger.

    Raises:
        InvalidRequest: it is not reached over HTTP.
    """
    if not isinstance(partner, OverHttp):
        raise InvalidRequest(f"{type(partner).__name__} is not reached over HTTP, and has no ledger to ask")
    return partner.client


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
