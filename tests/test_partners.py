"""The HTTP adapters against the sandbox: in process, and over a real connection.

What any adapter has to get right is in `tests/test_partner_contract.py`.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from decimal import Decimal

import httpx
import pytest
import uvicorn

from app.domain.money import Money
from app.errors import (
    CarrierUnavailable,
    PaymentConflict,
    PaymentDeclined,
    PaymentMismatch,
    PaymentUnavailable,
    ShipmentRefused,
    TrellisError,
)
from app.payment.http_gateway import HttpPaymentGateway
from app.sandbox.app import create_sandbox
from app.sandbox.ledger import Ledger
from app.sandbox.protocol import Faults
from app.shipping.http_carrier import HttpCarrier
from app.shipping.models import Address
from tests.test_partner_contract import answering

FAULTS = Faults(flaky_failures=2, slow_seconds=0.8, down_seconds=0.4)
PRICE = Money(amount=Decimal("19.90"), currency="USD")


class Partners:
    """Both adapters, and the ledger behind them."""

    def __init__(self, ledger: Ledger, client: Callable[[str], httpx.AsyncClient]) -> None:
        self.ledger = ledger
        self.gateway = HttpPaymentGateway(client("/payments"))
        self.carrier = HttpCarrier(client("/carrier"))

    async def charges(self, payment_id: str) -> int:
        return len(await self.ledger.charges_of(payment_id))


@asynccontextmanager
async def in_process(ledger: Ledger, *, raise_app_exceptions: bool = False) -> AsyncIterator[Partners]:
    sandbox = create_sandbox(ledger, faults=FAULTS)
    transport = httpx.ASGITransport(app=sandbox, raise_app_exceptions=raise_app_exceptions)
    yield Partners(ledger, lambda path: httpx.AsyncClient(transport=transport, base_url=f"http://sandbox{path}"))


@asynccontextmanager
async def over_network(ledger: Ledger, *, timeout: float = 5.0) -> AsyncIterator[Partners]:
    config = uvicorn.Config(
        create_sandbox(ledger, faults=FAULTS), log_config=None, lifespan="off", timeout_graceful_shutdown=1
    )
    server = uvicorn.Server(config)
    listener = socket.create_server(("127.0.0.1", 0))
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    # It takes connections from the start; they wait for the server.
    base = f"http://127.0.0.1:{listener.getsockname()[1]}"
    clients: list[httpx.AsyncClient] = []

    def client(path: str) -> httpx.AsyncClient:
        clients.append(httpx.AsyncClient(base_url=base + path, timeout=timeout))
        return clients[-1]

    try:
        yield Partners(ledger, client)
    finally:
        for opened in clients:
            await opened.aclose()
        server.should_exit = True
        await serving


@pytest.fixture
async def ledger(database_url: str) -> AsyncIterator[Ledger]:
    async with Ledger(database_url) as opened:
        yield opened


@pytest.fixture
async def partners(ledger: Ledger) -> AsyncIterator[Partners]:
    async with in_process(ledger) as opened:
        yield opened


def address(zip_code: str = "62701") -> Address:
    return Address(line1="1 Main St", city="Springfield", state="IL", zip=zip_code)


# --- money --------------------------------------------------------------------------------------------------


async def test_amounts_arrive_exactly(partners: Partners) -> None:
    for amount, currency in (("50", "JPY"), ("0.00", "EUR"), ("0.01", "EUR"), ("1000000.00", "USD")):
        money = Money(amount=Decimal(amount), currency=currency)
        receipt = await partners.gateway.charge(f"pay-{money.amount}-{currency}", money)
        assert str(receipt.money) == f"{amount} {currency}"


async def test_another_amount_is_a_conflict(partners: Partners) -> None:
    await partners.gateway.charge("pay-1", PRICE)
    for other in (Money(amount=Decimal("19.91"), currency="USD"), Money(amount=PRICE.amount, currency="EUR")):
        with pytest.raises(PaymentConflict, match="idempotency_key_reused"):
            await partners.gateway.charge("pay-1", other)
        with pytest.raises(PaymentConflict, match="amount_mismatch"):
            await partners.gateway.refund("pay-1", other)
    assert await partners.charges("pay-1") == 1


async def test_decline_carries_the_short_code(partners: Partners) -> None:
    for _ in range(2):
        with pytest.raises(PaymentDeclined) as caught:
            await partners.gateway.charge("pay-decline", PRICE)
        assert caught.value.detail == "card_declined"
    assert await partners.gateway.find_charge("pay-decline") is None


async def test_twenty_parallel_charges_move_money_once(partners: Partners) -> None:
    outcomes = await asyncio.gather(
        *(partners.gateway.charge("pay-1", PRICE) for _ in range(20)), return_exceptions=True
    )
    failures = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
    assert len(failures) < 20
    assert {str(failure) for failure in failures} <= {str(PaymentUnavailable("409 idempotency_key_in_flight"))}
    assert await partners.charges("pay-1") == 1


async def test_flaky_provider_is_unavailable_and_then_works(partners: Partners) -> None:
    for _ in range(2):
        with pytest.raises(PaymentUnavailable, match="503 flaky"):
            await partners.gateway.charge("pay-flaky", PRICE)
    await partners.gateway.charge("pay-flaky", PRICE)
    assert await partners.charges("pay-flaky") == 1


@pytest.mark.parametrize("raise_app_exceptions", [True, False])
async def test_lost_reply_in_process_is_unavailable(ledger: Ledger, raise_app_exceptions: bool) -> None:
    async with in_process(ledger, raise_app_exceptions=raise_app_exceptions) as partners:
        with pytest.raises(PaymentUnavailable):
            await partners.gateway.charge("pay-lost", PRICE)
        assert await partners.charges("pay-lost") == 1
        receipt = await partners.gateway.charge("pay-lost", PRICE)
        assert receipt == await partners.gateway.find_charge("pay-lost")
        with pytest.raises(CarrierUnavailable):
            await partners.carrier.dispatch("o-1", address("00004"))
        assert await partners.carrier.dispatch("o-1", address("00004"))


async def test_outage_is_unavailable(partners: Partners) -> None:
    await partners.ledger.set_outage("payments", 60)
    await partners.ledger.set_outage("carrier", 60)
    for call in (partners.gateway.charge("pay-1", PRICE), partners.gateway.refund("pay-1", PRICE)):
        with pytest.raises(PaymentUnavailable, match="503 outage"):
            await call
    for look in (partners.gateway.find_charge("pay-1"), partners.gateway.find_refund("pay-1")):
        with pytest.raises(PaymentUnavailable, match="503 outage"):
            await look
    with pytest.raises(CarrierUnavailable, match="503 outage"):
        await partners.carrier.dispatch("o-1", None)
    with pytest.raises(CarrierUnavailable, match="503 outage"):
        await partners.carrier.recall("o-1")


# --- parcels ------------------------------------------------------------------------------------------------


async def test_refused_and_flaky_parcels(partners: Partners) -> None:
    with pytest.raises(ShipmentRefused, match="undeliverable"):
        await partners.carrier.dispatch("o-1", address("00002"))
    for _ in range(2):
        with pytest.raises(CarrierUnavailable, match="503 flaky"):
            await partners.carrier.dispatch("o-2", address("00001"))
    assert await partners.carrier.dispatch("o-2", address("00001"))


async def test_parcel_that_was_taken_in_silence_is_found_by_recall(partners: Partners) -> None:
    for _ in range(3):
        with pytest.raises(CarrierUnavailable):
            await partners.carrier.dispatch("o-1", address("00006"))
    assert await partners.carrier.recall("o-1") is not None
    with pytest.raises(CarrierUnavailable):
        await partners.carrier.dispatch("o-2", address("00005"))
    assert await partners.carrier.recall("o-2") is None


# --- answers no partner should give ---------------------------------------------------------------------------


def charged(**changes: object) -> httpx.Response:
    receipt = {"id": "ch_1", "status": "succeeded", "amount": "19.90", "currency": "USD"}
    return httpx.Response(200, json=receipt | changes)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (charged(amount="19.91"), PaymentMismatch),
        (charged(currency="EUR"), PaymentMismatch),
        (charged(amount=19.9), PaymentUnavailable),
        (charged(amount="19.901"), PaymentUnavailable),
        (charged(amount="1_9.90"), PaymentUnavailable),
        (charged(amount=" 19.90"), PaymentUnavailable),
        (charged(amount="1990E-2"), PaymentUnavailable),
        (charged(id="ch_\u202e1"), PaymentUnavailable),
        (charged(id="ch_\x00"), PaymentUnavailable),
        (charged(currency="???"), PaymentUnavailable),
        (charged(status="pending"), PaymentUnavailable),
        (charged(id=""), PaymentUnavailable),
        (httpx.Response(400, json={"error": {"code": "invalid_request"}}), PaymentUnavailable),
        (httpx.Response(409, json={"error": {"code": "idempotency_key_in_flight"}}), PaymentUnavailable),
    ],
)
async def test_receipt_for_something_else(answer: httpx.Response, expected: type[TrellisError]) -> None:
    gateway = HttpPaymentGateway(answering(answer))
    for call in (gateway.charge("pay-1", PRICE), gateway.refund("pay-1", PRICE)):
        with pytest.raises(expected):
            await call


async def test_codes_that_are_prose_stay_out_of_messages() -> None:
    prose = {"error": {"code": "Card of Jane Doe was declined"}}
    with pytest.raises(PaymentDeclined) as declined:
        await HttpPaymentGateway(answering(httpx.Response(402, json=prose))).charge("pay-1", PRICE)
    with pytest.raises(ShipmentRefused) as refused:
        await HttpCarrier(answering(httpx.Response(422, json=prose))).dispatch("o-1", address())
    assert "Jane" not in f"{declined.value}{refused.value}"


async def test_recall_that_took_without_tracking_is_not_an_answer() -> None:
    carrier = HttpCarrier(answering(httpx.Response(200, json={"outcome": "taken", "tracking": None})))
    with pytest.raises(CarrierUnavailable):
        await carrier.recall("o-1")


# --- over a connection ----------------------------------------------------------------------------------------


async def test_lost_replies_break_the_connection(ledger: Ledger) -> None:
    async with over_network(ledger) as partners:
        with pytest.raises(PaymentUnavailable, match="RemoteProtocolError"):
            await partners.gateway.charge("pay-lost", PRICE)
        assert await partners.gateway.charge("pay-lost", PRICE)
        with pytest.raises(CarrierUnavailable, match="RemoteProtocolError"):
            await partners.carrier.dispatch("o-1", address("00004"))
        assert await partners.carrier.dispatch("o-1", address("00004"))
        assert await partners.charges("pay-lost") == 1


async def test_impatient_client_is_charged_once(ledger: Ledger) -> None:
    """The client gives up, the provider does not: the repeat is told to wait, and then gets the first answer."""
    async with over_network(ledger, timeout=FAULTS.slow_seconds / 2) as partners:
        with pytest.raises(PaymentUnavailable, match="ReadTimeout"):
            await partners.gateway.charge("pay-slow", PRICE)
        with pytest.raises(PaymentUnavailable, match="409 idempotency_key_in_flight"):
            await partners.gateway.charge("pay-slow", PRICE)
        await asyncio.sleep(FAULTS.slow_seconds)
        receipt = await partners.gateway.charge("pay-slow", PRICE)
        assert receipt == await partners.gateway.find_charge("pay-slow")
        assert await partners.charges("pay-slow") == 1


async def test_parallel_charges_over_the_network(ledger: Ledger) -> None:
    async with over_network(ledger) as partners:
        outcomes = await asyncio.gather(
            *(partners.gateway.charge("pay-1", PRICE) for _ in range(20)), return_exceptions=True
        )
        assert {type(outcome) for outcome in outcomes if isinstance(outcome, Exception)} <= {PaymentUnavailable}
        assert await partners.charges("pay-1") == 1


async def test_command_serves_both_and_the_ledger_remembers(database_url: str, ledger: Ledger) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}/payments") as client:
        gateway = HttpPaymentGateway(client)
        with pytest.raises(PaymentUnavailable, match="ConnectError"):
            await gateway.charge("pay-1", PRICE)
        async with served(port, database_url) as process:
            receipt = await gateway.charge("pay-1", PRICE)
            with pytest.raises(PaymentUnavailable):
                await gateway.charge("pay-lost", PRICE)
            process.send_signal(signal.SIGTERM)
            output, _ = await process.communicate()
    assert b"Traceback" not in output
    async with in_process(ledger) as partners:
        assert await partners.gateway.charge("pay-1", PRICE) == receipt
        assert await partners.gateway.charge("pay-lost", PRICE)
        assert await partners.charges("pay-1") == await partners.charges("pay-lost") == 1


@asynccontextmanager
async def served(port: int, database_url: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """`trellis sandbox`, answering."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        "import typer; from app.cli.sandbox import sandbox; typer.run(sandbox)",
        f"--port={port}",
        env={**os.environ, "TRELLIS_SANDBOX_DATABASE_URL": database_url},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        async with asyncio.timeout(30), httpx.AsyncClient() as client:
            while True:
                try:
                    await client.get(f"http://127.0.0.1:{port}/healthz")
                    break
                except httpx.ConnectError:
                    await asyncio.sleep(0.05)
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
