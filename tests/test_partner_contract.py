"""What any adapter of a payment provider or a carrier has to get right.

By default the adapters over HTTP are tried, against the sandbox. `--gateway module:name` and `--carrier module:name`
try others: `name` is called without arguments and is an async context manager of a `GatewayCase` or a `CarrierCase`.
Ids are new in every run, so that the partner's own test system can be used again and again.
"""

from __future__ import annotations

import asyncio
import importlib
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import httpx
import pytest

from app.domain.money import Money
from app.errors import CarrierUnavailable, PaymentConflict, PaymentDeclined, PaymentUnavailable, ShipmentRefused
from app.payment.gateway import PaymentGateway
from app.payment.http_gateway import HttpPaymentGateway
from app.sandbox.app import create_sandbox
from app.sandbox.ledger import Ledger
from app.shipping.carrier import Carrier
from app.shipping.http_carrier import HttpCarrier
from app.shipping.models import Address

ADDRESS = Address(line1="1 Main St", city="Springfield", state="IL", zip="62701")
PRICE = Money(amount=Decimal("19.90"), currency="USD")


@dataclass(frozen=True)
class GatewayCase:
    """A gateway to try, and what its provider's test system needs."""

    gateway: PaymentGateway
    #: Makes the gateway with another client, for answers that no provider should give; None: it is not over httpx.
    over: Callable[[httpx.AsyncClient], PaymentGateway] | None = None
    #: A payment id that is declined; None: the provider declines by something else.
    declined: Callable[[], str] | None = None
    price: Money = PRICE


@dataclass(frozen=True)
class CarrierCase:
    """A carrier to try, and what its test system needs."""

    carrier: Carrier
    over: Callable[[httpx.AsyncClient], Carrier] | None = None
    #: An address where nobody delivers; None: there is none.
    undeliverable: Address | None = None
    address: Address = ADDRESS


def new_id() -> str:
    return f"contract-{uuid.uuid4().hex}"


@asynccontextmanager
async def _sandbox(database_url: str, path: str) -> AsyncIterator[httpx.AsyncClient]:
    async with Ledger(database_url) as ledger:
        transport = httpx.ASGITransport(create_sandbox(ledger), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url=f"http://sandbox{path}") as client:
            yield client


@asynccontextmanager
async def _sandbox_gateway(database_url: str) -> AsyncIterator[GatewayCase]:
    async with _sandbox(database_url, "/payments") as client:
        yield GatewayCase(HttpPaymentGateway(client), HttpPaymentGateway, lambda: f"pay-decline-{uuid.uuid4().hex}")


@asynccontextmanager
async def _sandbox_carrier(database_url: str) -> AsyncIterator[CarrierCase]:
    async with _sandbox(database_url, "/carrier") as client:
        yield CarrierCase(HttpCarrier(client), HttpCarrier, ADDRESS.model_copy(update={"zip": "00002"}))


def _opener(
    request: pytest.FixtureRequest, option: str, default: Callable[[str], AbstractAsyncContextManager[Any]]
) -> AbstractAsyncContextManager[Any]:
    given = request.config.getoption(option)
    if given is None:
        return default(request.getfixturevalue("database_url"))
    module, _, name = given.partition(":")
    opened: AbstractAsyncContextManager[Any] = getattr(importlib.import_module(module), name)()
    return opened


@pytest.fixture
def gateway_opener(request: pytest.FixtureRequest) -> AbstractAsyncContextManager[GatewayCase]:
    return _opener(request, "--gateway", _sandbox_gateway)


@pytest.fixture
async def payments(gateway_opener: AbstractAsyncContextManager[GatewayCase]) -> AsyncIterator[GatewayCase]:
    async with gateway_opener as case:
        yield case


@pytest.fixture
def carrier_opener(request: pytest.FixtureRequest) -> AbstractAsyncContextManager[CarrierCase]:
    return _opener(request, "--carrier", _sandbox_carrier)


@pytest.fixture
async def parcels(carrier_opener: AbstractAsyncContextManager[CarrierCase]) -> AsyncIterator[CarrierCase]:
    async with carrier_opener as case:
        yield case


# --- money ----------------------------------------------------------------------------------------------------


async def test_a_charge_and_its_refund_happen_once_each(payments: GatewayCase) -> None:
    gateway, price, payment_id = payments.gateway, payments.price, new_id()
    assert await gateway.find_charge(payment_id) is None
    receipt = await gateway.charge(payment_id, price)
    assert receipt.money == price
    assert await gateway.charge(payment_id, price) == receipt == await gateway.find_charge(payment_id)
    assert await gateway.find_refund(payment_id) is None
    refund = await gateway.refund(payment_id, price)
    assert await gateway.refund(payment_id, price) == refund == await gateway.find_refund(payment_id)
    assert refund.money == price
    assert refund.reference != receipt.reference, "a refund must not be taken for the charge"
    assert await gateway.charge(payment_id, price) == receipt, "a charge repeated after the refund moves nothing"


async def test_payments_are_told_apart(payments: GatewayCase) -> None:
    first, second = new_id(), new_id()
    receipts = [await payments.gateway.charge(payment_id, payments.price) for payment_id in (first, second)]
    assert receipts[0].reference != receipts[1].reference
    await payments.gateway.refund(first, payments.price)
    assert await payments.gateway.find_refund(second) is None


async def test_twenty_parallel_charges_move_money_once(payments: GatewayCase) -> None:
    payment_id = new_id()
    charges = (payments.gateway.charge(payment_id, payments.price) for _ in range(20))
    outcomes = await asyncio.gather(*charges, return_exceptions=True)
    failures = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
    assert {type(failure) for failure in failures} <= {PaymentUnavailable}
    receipt = await payments.gateway.charge(payment_id, payments.price)
    assert {outcome.reference for outcome in outcomes if not isinstance(outcome, BaseException)} <= {receipt.reference}


async def test_a_key_is_used_for_one_amount(payments: GatewayCase) -> None:
    payment_id, price = new_id(), payments.price
    other = Money(amount=price.amount * 2, currency=price.currency)
    receipt = await payments.gateway.charge(payment_id, price)
    with pytest.raises(PaymentConflict):
        await payments.gateway.charge(payment_id, other)
    with pytest.raises(PaymentConflict):
        await payments.gateway.refund(payment_id, other)
    assert await payments.gateway.find_charge(payment_id) == receipt


async def test_what_was_never_charged_is_not_refunded(payments: GatewayCase) -> None:
    with pytest.raises(PaymentConflict):
        await payments.gateway.refund(new_id(), payments.price)


async def test_unusual_payment_ids_keep_their_key(payments: GatewayCase) -> None:
    for start in ("..", "a.b", "a/b", "a b", "50%", "a%2Fb", "a?b#c"):
        payment_id = f"{start}{new_id()}"
        receipt = await payments.gateway.charge(payment_id, payments.price)
        assert await payments.gateway.find_charge(payment_id) == receipt


async def test_a_declined_charge_stays_declined(payments: GatewayCase) -> None:
    if payments.declined is None:
        pytest.skip("this provider declines by something else than the payment id")
    payment_id = payments.declined()
    for _ in range(2):
        with pytest.raises(PaymentDeclined):
            await payments.gateway.charge(payment_id, payments.price)
    assert await payments.gateway.find_charge(payment_id) is None


# --- parcels --------------------------------------------------------------------------------------------------


async def test_the_first_of_dispatch_and_recall_decides(parcels: CarrierCase) -> None:
    carrier, address, taken, recalled = parcels.carrier, parcels.address, new_id(), new_id()
    handover = await carrier.dispatch(taken, address)
    assert await carrier.dispatch(taken, address) == handover == await carrier.recall(taken)
    assert await carrier.recall(recalled) is None
    with pytest.raises(ShipmentRefused):
        await carrier.dispatch(recalled, address)
    assert await carrier.recall(recalled) is None


async def test_parcels_are_told_apart(parcels: CarrierCase) -> None:
    trackings = {(await parcels.carrier.dispatch(new_id(), parcels.address)).tracking for _ in range(3)}
    assert len(trackings) == 3


async def test_dispatch_and_recall_at_once_agree(parcels: CarrierCase) -> None:
    order_id = new_id()
    dispatched, recalled = await asyncio.gather(
        parcels.carrier.dispatch(order_id, parcels.address), parcels.carrier.recall(order_id), return_exceptions=True
    )
    assert isinstance(dispatched, ShipmentRefused | CarrierUnavailable) or not isinstance(dispatched, BaseException)
    settled = await parcels.carrier.recall(order_id)
    if not isinstance(dispatched, BaseException):
        assert settled == dispatched
    if not isinstance(recalled, BaseException):
        assert settled == recalled


async def test_unusual_order_ids_keep_their_parcel(parcels: CarrierCase) -> None:
    for start in ("..", "a.b", "-", "_"):
        order_id = f"{start}{new_id()}"
        assert await parcels.carrier.recall(order_id) is None
        with pytest.raises(ShipmentRefused):
            await parcels.carrier.dispatch(order_id, parcels.address)


async def test_an_undeliverable_parcel_is_refused(parcels: CarrierCase) -> None:
    if parcels.undeliverable is None:
        pytest.skip("this carrier delivers everywhere")
    order_id = new_id()
    with pytest.raises(ShipmentRefused):
        await parcels.carrier.dispatch(order_id, parcels.undeliverable)
    assert await parcels.carrier.recall(order_id) is None


# --- answers no partner should give -----------------------------------------------------------------------------


def answering(response: httpx.Response | httpx.RequestError) -> httpx.AsyncClient:
    def answer(_request: httpx.Request) -> httpx.Response:
        if isinstance(response, httpx.RequestError):
            raise response
        return response

    return httpx.AsyncClient(transport=httpx.MockTransport(answer), base_url="http://partner")


NOT_AN_ANSWER = [
    httpx.Response(200, text="<html>"),
    httpx.Response(200, content=b"\xff\xfe"),
    httpx.Response(200, json=[]),
    httpx.Response(200, json={}),
    httpx.Response(202, json={}),
    httpx.Response(204),
    httpx.Response(302, headers={"location": "http://elsewhere/"}),
    httpx.Response(401),
    httpx.Response(404, text="no such page"),
    httpx.Response(429),
    httpx.Response(500),
    httpx.Response(504),
    httpx.ConnectError("refused"),
    httpx.ConnectTimeout("slow"),
    httpx.ReadTimeout("slow"),
    httpx.PoolTimeout("busy"),
    httpx.ReadError("reset"),
    httpx.RemoteProtocolError("closed"),
    httpx.DecodingError("not gzip"),
]


@pytest.mark.parametrize("answer", NOT_AN_ANSWER, ids=repr)
async def test_what_is_not_an_answer_of_a_provider_is_unavailable(
    payments: GatewayCase, answer: httpx.Response | httpx.RequestError
) -> None:
    if payments.over is None:
        pytest.skip("this gateway is not over httpx")
    gateway = payments.over(answering(answer))
    for call in (
        gateway.charge("pay-1", payments.price),
        gateway.refund("pay-1", payments.price),
        gateway.find_charge("pay-1"),
        gateway.find_refund("pay-1"),
    ):
        with pytest.raises(PaymentUnavailable):
            await call


@pytest.mark.parametrize("answer", NOT_AN_ANSWER, ids=repr)
async def test_what_is_not_an_answer_of_a_carrier_is_unavailable(
    parcels: CarrierCase, answer: httpx.Response | httpx.RequestError
) -> None:
    if parcels.over is None:
        pytest.skip("this carrier is not over httpx")
    carrier = parcels.over(answering(answer))
    for call in (carrier.dispatch("o-1", parcels.address), carrier.recall("o-1")):
        with pytest.raises(CarrierUnavailable):
            await call
