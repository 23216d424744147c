"""A payment provider over HTTP, as `PaymentGateway`. The contract on the wire is in docs/sandbox.md."""

from __future__ import annotations

from http import HTTPStatus
from typing import TYPE_CHECKING, Annotated, Final, Literal
from urllib.parse import quote

import httpx
from pydantic import BaseModel, StringConstraints, ValidationError

from app.domain.money import Money, exact_amount
from app.domain.types import Reference
from app.errors import PaymentConflict, PaymentDeclined, PaymentMismatch, PaymentUnavailable
from app.payment.gateway import PaymentGateway, Receipt, refund_key

if TYPE_CHECKING:
    from app.errors import TrellisError

_MOVED: Final = frozenset({HTTPStatus.OK, HTTPStatus.CREATED})


class HttpPaymentGateway(PaymentGateway):
    """`PaymentGateway` over HTTP. Base URL, time limit and credentials are the client's.

    Whatever is not understood is `PaymentUnavailable`: it says nothing about the money, and asking again with the
    same key is safe.
    """

    def __init__(self, client: httpx.AsyncClient, *, shows_ledger: bool = False) -> None:
        """`shows_ledger`: the other side has `/v1/ledger`, as the sandbox has, which the audit may ask."""
        self.client = self._client = client
        self.shows_ledger = shows_ledger

    async def charge(self, payment_id: str, money: Money) -> Receipt:
        """See `PaymentGateway.charge`."""
        response = await self._post("/v1/charges", payment_id, payment_id, money)
        if response.status_code in _MOVED:
            return _receipt(response, money)
        raise _charge_error(response)

    async def refund(self, payment_id: str, money: Money) -> Receipt:
        """See `PaymentGateway.refund`."""
        response = await self._post("/v1/refunds", refund_key(payment_id), payment_id, money)
        if response.status_code in _MOVED:
            return _receipt(response, money)
        raise _refund_error(response)

    async def find_charge(self, payment_id: str) -> Receipt | None:
        """See `PaymentGateway.find_charge`."""
        return await self._find("/v1/charges/", payment_id, missing="charge_not_found")

    async def find_refund(self, payment_id: str) -> Receipt | None:
        """See `PaymentGateway.find_refund`."""
        return await self._find("/v1/refunds/", refund_key(payment_id), missing="refund_not_found")

    async def _post(self, path: str, key: str, payment_id: str, money: Money) -> httpx.Response:
        body = {"payment": payment_id, "amount": str(money.amount), "currency": money.currency}
        try:
            return await self._client.post(path, json=body, headers={"Idempotency-Key": key})
        except httpx.RequestError as error:
            raise PaymentUnavailable(type(error).__name__) from error

    async def _find(self, path: str, key: str, *, missing: str) -> Receipt | None:
        # Dots too: an id may be "..", which would be resolved as a step up.
        address = path + quote(key, safe="").replace(".", "%2E")
        try:
            response = await self._client.get(address)
        except httpx.RequestError as error:
            raise PaymentUnavailable(type(error).__name__) from error
        if response.status_code == HTTPStatus.OK:
            return _receipt(response)
        # Only the provider's own word counts: a wrong base URL answers 404, too.
        if response.status_code == HTTPStatus.NOT_FOUND and _code(response) == missing:
            return None
        raise _unavailable(response)


class _Movement(BaseModel):
    """A charge or a refund as the provider writes it."""

    id: Reference
    status: Literal["succeeded"]
    #: Only a string: a JSON number may have been a float somewhere.
    amount: Annotated[str, StringConstraints(pattern=r"^[0-9]+(\.[0-9]+)?$")]
    currency: str


class _ErrorBody(BaseModel):
    class _Error(BaseModel):
        #: Short and plain, because it ends in `last_error`, events and logs.
        code: Annotated[str, StringConstraints(pattern=r"^[a-z0-9_]{1,64}$")]

    error: _Error


def _receipt(response: httpx.Response, asked: Money | None = None) -> Receipt:
    try:
        movement = _Movement.model_validate_json(response.content)
        money = _money(movement, asked)
    except ValueError:
        # Not chained: a validation error quotes what it read.
        raise PaymentUnavailable(f"{response.status_code} with an unreadable body") from None
    if asked is not None and money != asked:
        raise PaymentMismatch(f"asked for {asked}, the provider answered {money}")
    return Receipt(reference=movement.id, money=money)


def _money(movement: _Movement, asked: Money | None) -> Money:
    money = Money.model_validate({"amount": movement.amount, "currency": movement.currency})
    # What was asked for is understood, whatever has become of the rules for amounts since then.
    if money != asked:
        exact_amount(money.amount, money.currency)
    return money


def _charge_error(response: httpx.Response) -> TrellisError:
    match response.status_code:
        case HTTPStatus.PAYMENT_REQUIRED:
            return PaymentDeclined(_code(response) or "no reason given")
        case HTTPStatus.UNPROCESSABLE_ENTITY:
            return PaymentConflict(_code(response) or "422")
        case _:
            return _unavailable(response)


def _refund_error(response: httpx.Response) -> TrellisError:
    code = _code(response)
    match response.status_code, code:
        case HTTPStatus.UNPROCESSABLE_ENTITY, _:
            return PaymentConflict(code or "422")
        case HTTPStatus.NOT_FOUND, "charge_not_found":
            return PaymentConflict("charge_not_found")
        case _:
            return _unavailable(response)


def _unavailable(response: httpx.Response) -> PaymentUnavailable:
    code = _code(response)
    return PaymentUnavailable(f"{response.status_code} {code}" if code else str(response.status_code))


def _code(response: httpx.Response) -> str | None:
    """The provider's short code for an error; None if there is none that can be shown."""
    try:
        return _ErrorBody.model_validate_json(response.content).error.code
    except ValidationError:
        return None
