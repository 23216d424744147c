"""Who the partners are, and how they are called: the sandbox only when it is asked for, credentials, limits."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import ssl
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from decimal import Decimal
from pathlib import Path
from typing import Any

import httpx
import pytest
import structlog
from starlette.types import Receive, Scope, Send

from app.cli.client import connect
from app.domain.money import Money
from app.errors import PaymentUnavailable, SettingsError
from app.partners.clients import MAX_ANSWER, check, open_partners
from app.payment.http_gateway import HttpPaymentGateway
from app.services import open_services
from app.settings import Settings, load
from app.telemetry.metrics import REGISTRY
from tests.support import serving, until
from tests.telemetry import environment, free_port, http_collector, started, until_ready

# --- the sandbox is asked for, never fallen back to -----------------------------------------------------------


@pytest.fixture(autouse=True)
def _no_sandbox_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with the product: `tests/conftest.py` chooses the sandbox for all others."""
    monkeypatch.delenv("TRELLIS_SANDBOX", raising=False)


SERVING = (
    ("-m", "app", "api"),
    ("-m", "app", "worker", "default"),
    ("-m", "app", "run-all"),
    ("-m", "uvicorn", "app.main:app"),
)


async def ended(*command: str, **environment: str) -> tuple[int | None, str]:
    """Exit code and output of a process that ends by itself."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *command,
        env={**os.environ, "TRELLIS_DATABASE_URL": "postgresql://nobody@127.0.0.1:1/nowhere", **environment},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        async with asyncio.timeout(120):
            output, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return process.returncode, output.decode()


@pytest.mark.timeout(180)
@pytest.mark.parametrize("command", SERVING, ids=lambda command: command[2])
async def test_without_partners_a_serving_process_ends_and_names_the_variables(command: tuple[str, ...]) -> None:
    code, output = await ended(*command)
    assert code != 0
    for variable in ("TRELLIS_PAYMENT_URL", "TRELLIS_CARRIER_URL", "TRELLIS_SANDBOX"):
        assert variable in output
    assert output.startswith("trellis: ")
    assert output.count("\n") == 1, output


async def test_without_partners_no_command_opens_them() -> None:
    with pytest.raises(
        SettingsError, match=r"TRELLIS_PAYMENT_URL and TRELLIS_CARRIER_URL are not set; .*_SANDBOX=true"
    ):
        async with open_services(Settings()):
            pass


@pytest.mark.parametrize(("given", "missing"), [("payment_url", "CARRIER_URL"), ("carrier_url", "PAYMENT_URL")])
def test_half_of_the_partners_is_refused_unless_the_sandbox_is_asked_for(given: str, missing: str) -> None:
    half = {given: "https://partner.example"}
    with pytest.raises(SettingsError, match=f"TRELLIS_{missing} is not set") as refused:
        load(**half).require_partners()
    assert f"TRELLIS_{given.upper()}" not in str(refused.value)
    load(**half, sandbox=True).require_partners()


def test_both_partners_or_the_sandbox_are_enough() -> None:
    load(payment_url="https://money.example", carrier_url="https://parcels.example").require_partners()
    load(sandbox=True).require_partners()
    assert load(payment_url="", carrier_url="").payment_url is None
    assert Settings().sandbox is False


async def test_the_gauge_and_the_log_tell_that_the_sandbox_is_in_use(settings: Settings) -> None:
    def gauge(partner: str) -> float | None:
        return REGISTRY.get_sample_value("trellis_sandbox_in_use", {"partner": partner})

    with structlog.testing.capture_logs() as lines:
        async with open_partners(settings.model_copy(update={"carrier_url": "https://parcels.example"})):
            assert (gauge("payment"), gauge("carrier")) == (1, 0)
        [line] = lines
        assert (line["log_level"], line["partners"]) == ("warning", ["payment"])
        real = {"payment_url": "https://money.example", "carrier_url": "https://parcels.example", "sandbox": True}
        async with open_partners(settings.model_copy(update=real)):
            assert (gauge("payment"), gauge("carrier")) == (0, 0)
        assert lines == [line]


# --- where a partner is, and what it is given to know us by ---------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        *("ftp://money.example", "money.example", "https://", "https://money.example:99999", "https://mon ey.example"),
        *("https://user:secret@money.example", "https://secret@money.example", "https://money.example/?key=secret"),
        *("https://money.example/v1#secret", "https://money.example/?"),
    ],
)
def test_an_url_is_an_address_and_no_more(url: str) -> None:
    for partner in ("payment", "carrier"):
        with pytest.raises(SettingsError, match=f"TRELLIS_{partner.upper()}_URL: it must be ") as refused:
            load(**{f"{partner}_url": url})
        assert "secret" not in str(refused.value).replace("What is secret", "")
        if "secret" in url:
            assert f"TRELLIS_{partner.upper()}_TOKEN" in str(refused.value)


def test_http_to_another_machine_is_asked_for() -> None:
    for here in ("http://127.0.0.1:8090/payments", "http://localhost:1", "http://[::1]:8090", "https://10.0.0.1"):
        load(payment_url=here)
    for there in ("http://money.example", "HTTP://money.example", "http://10.0.0.1", "http://localhost.example"):
        with pytest.raises(SettingsError, match=r"TRELLIS_CARRIER_URL is http://.*TRELLIS_PARTNERS_ALLOW_HTTP=true"):
            load(carrier_url=there)
        load(carrier_url=there, partners_allow_http=True)


def test_credentials_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    url = "https://money.example"
    for given, reason in (
        ({"payment_token": "a", "payment_token_file": tmp_path}, "TRELLIS_PAYMENT_TOKEN_FILE are both set"),
        ({"carrier_tls_cert": tmp_path}, "TRELLIS_CARRIER_TLS_KEY is not set"),
        ({"payment_tls_key": tmp_path}, "TRELLIS_PAYMENT_TLS_CERT is not set"),
        ({"payment_token": "two words"}, "TRELLIS_PAYMENT_TOKEN: it has characters that no token has"),
        ({"payment_token": "line\nbreak"}, "TRELLIS_PAYMENT_TOKEN: it has characters that no token has"),
        ({"payment_url": "http://127.0.0.1:1", "payment_tls_ca": tmp_path}, r"TRELLIS_PAYMENT_TLS_\* is set"),
    ):
        with pytest.raises(SettingsError, match=reason) as refused:
            load(**{"payment_url": url, "carrier_url": url, **given})
        assert "two words" not in str(refused.value)


def test_files_that_hold_no_credentials_are_named_before_anything_starts(tmp_path: Path) -> None:
    empty, missing = tmp_path / "empty", tmp_path / "missing"
    empty.write_text("\n")
    for given, variable in (
        ({"payment_token_file": missing}, "TRELLIS_PAYMENT_TOKEN_FILE"),
        ({"carrier_token_file": empty}, "TRELLIS_CARRIER_TOKEN_FILE"),
        ({"payment_tls_ca": empty}, "TRELLIS_PAYMENT_TLS_CA"),
        (
            {"carrier_tls_cert": empty, "carrier_tls_key": missing},
            "TRELLIS_CARRIER_TLS_CERT and TRELLIS_CARRIER_TLS_KEY",
        ),
    ):
        settings = load(payment_url="https://money.example", carrier_url="https://parcels.example", **given)
        with pytest.raises(SettingsError, match=variable):
            check(settings)


# --- calls ----------------------------------------------------------------------------------------------------


class Partner:
    """A partner of a test's making, on a real port: what it is asked, and the answer it is told to give."""

    def __init__(self) -> None:
        self.asked: list[dict[str, str]] = []
        self.answer: Callable[[Send], Awaitable[None]] = lambda send: reply(send, 200, b"{}")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            self.asked.append({name.decode(): value.decode() for name, value in scope["headers"]})
            await self.answer(send)


async def reply(send: Send, status: int, *body: bytes, pause: float = 0.0, **headers: str) -> None:
    """Answer in pieces."""
    named = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": status, "headers": named})
    for piece in body:
        await asyncio.sleep(pause)
        await send({"type": "http.response.body", "body": piece, "more_body": True})
    await send({"type": "http.response.body", "body": b""})


@pytest.fixture
async def partner() -> AsyncIterator[tuple[Partner, str]]:
    application = Partner()
    async with serving(application) as url:
        yield application, url


@asynccontextmanager
async def gateway(url: str, **more: Any) -> AsyncIterator[HttpPaymentGateway]:
    """The product's own gateway to a provider at this URL."""
    async with open_partners(load(payment_url=url, carrier_url="https://parcels.example", **more)) as opened:
        yield HttpPaymentGateway(opened.payment)


PRICE = Money(amount=Decimal("19.90"), currency="USD")


async def test_a_token_goes_with_every_call_and_can_be_replaced(partner: tuple[Partner, str], tmp_path: Path) -> None:
    provider, url = partner
    file = tmp_path / "token"
    file.write_text("first\n")
    async with gateway(url, payment_token_file=file) as asking:
        for token in ("first", "second"):
            file.write_text(f"{token}\n")
            with pytest.raises(PaymentUnavailable):
                await asking.charge("pay-1", PRICE)
            assert provider.asked[-1]["authorization"] == f"Bearer {token}"
        file.write_text("")
        with pytest.raises(PaymentUnavailable, match="TokenUnreadable"):
            await asking.find_charge("pay-1")
        assert len(provider.asked) == 2, "nothing is sent without it"
    async with gateway(url, payment_token="given") as asking:
        with pytest.raises(PaymentUnavailable):
            await asking.find_refund("pay-1")
    assert provider.asked[-1]["authorization"] == "Bearer given"


async def test_the_token_does_not_follow_a_redirect(partner: tuple[Partner, str]) -> None:
    provider, url = partner
    elsewhere = Partner()
    async with serving(elsewhere) as there, gateway(url, payment_token="secret") as asking:
        provider.answer = lambda send: reply(send, 307, location=f"{there}/v1/charges")
        with pytest.raises(PaymentUnavailable, match="307"):
            await asking.charge("pay-1", PRICE)
    assert not elsewhere.asked


@pytest.mark.parametrize(
    ("headers", "pieces"), [({}, 33), ({"content_encoding": "gzip"}, 1)], ids=["too large", "compressed"]
)
async def test_an_answer_without_end_is_no_answer(
    partner: tuple[Partner, str], headers: dict[str, str], pieces: int
) -> None:
    provider, url = partner
    provider.answer = lambda send: reply(send, 200, *([b" " * (MAX_ANSWER // 32)] * pieces), **headers)
    async with gateway(url) as asking:
        for call in (asking.charge("pay-1", PRICE), asking.find_refund("pay-1")):
            with pytest.raises(PaymentUnavailable, match="AnswerTooLarge"):
                await call
    assert provider.asked[0]["accept-encoding"] == "identity"


async def test_an_answer_in_crumbs_is_no_answer(partner: tuple[Partner, str]) -> None:
    provider, url = partner
    provider.answer = lambda send: reply(send, 200, *([b" "] * 1000), pause=0.1)
    async with gateway(url, partner_timeout=0.3) as asking, asyncio.timeout(30):
        with pytest.raises(PaymentUnavailable, match="AnswerTooSlow"):
            await asking.charge("pay-1", PRICE)


async def test_the_environment_has_no_say_in_where_a_call_goes(
    partner: tuple[Partner, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    provider, url = partner
    proxy = Partner()
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login somebody password else\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    async with serving(proxy) as there:
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, there)
        async with gateway(url) as asking:
            with pytest.raises(PaymentUnavailable):
                await asking.find_charge("pay-1")
        with connect(url) as api:
            assert await asyncio.to_thread(api.get, "/orders") == {}
    assert not proxy.asked
    assert [asked.get("authorization") for asked in provider.asked] == [None, None]


def make_certificate(folder: Path, name: str) -> None:
    command = f"openssl req -x509 -newkey rsa:2048 -nodes -days 1 -subj /CN={name} -addext subjectAltName=IP:127.0.0.1"
    files = ("-keyout", folder / f"{name}.key", "-out", folder / f"{name}.crt")
    subprocess.run([*command.split(), *files], check=True, capture_output=True)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="there is no openssl to make certificates with")
async def test_a_client_certificate_is_shown_and_the_server_must_be_the_right_one(tmp_path: Path) -> None:
    for name in ("server", "client"):
        make_certificate(tmp_path, name)
    provider, given = Partner(), {"payment_tls_ca": tmp_path / "server.crt"}
    tls = {
        "ssl_certfile": tmp_path / "server.crt",
        "ssl_keyfile": tmp_path / "server.key",
        "ssl_ca_certs": str(tmp_path / "client.crt"),
        "ssl_cert_reqs": ssl.CERT_REQUIRED,
    }
    shown = {"payment_tls_cert": tmp_path / "client.crt", "payment_tls_key": tmp_path / "client.key"}
    async with serving(provider, **tls) as url:
        for files in ({}, given, shown):
            async with gateway(url.replace("http:", "https:"), **files) as asking:
                with pytest.raises(PaymentUnavailable, match="Error"):
                    await asking.find_charge("pay-1")
        assert not provider.asked
        async with gateway(url.replace("http:", "https:"), **given, **shown) as asking:
            with pytest.raises(PaymentUnavailable, match="200 with an unreadable body"):
                await asking.find_charge("pay-1")
    assert len(provider.asked) == 1


@pytest.mark.skipif(shutil.which("openssl") is None, reason="there is no openssl to make certificates with")
async def test_a_certificate_that_is_replaced_counts_without_a_restart(tmp_path: Path) -> None:
    for name in ("server", "client", "next"):
        make_certificate(tmp_path, name)
    provider = Partner()
    tls = {
        "ssl_certfile": tmp_path / "server.crt",
        "ssl_keyfile": tmp_path / "server.key",
        "ssl_ca_certs": str(tmp_path / "next.crt"),
        "ssl_cert_reqs": ssl.CERT_REQUIRED,
    }
    files = {f"payment_tls_{kind}": tmp_path / f"client.{end}" for kind, end in (("cert", "crt"), ("key", "key"))}
    async with (
        serving(provider, **tls) as url,
        gateway(url.replace("http:", "https:"), payment_tls_ca=tmp_path / "server.crt", **files) as asking,
    ):
        with pytest.raises(PaymentUnavailable, match="Error"):
            await asking.find_charge("pay-1")
        # Half of it is not taken, and spoils nothing.
        (tmp_path / "next.crt").rename(tmp_path / "client.crt")
        with pytest.raises(PaymentUnavailable, match="Error"):
            await asking.find_charge("pay-1")
        assert not provider.asked
        (tmp_path / "next.key").rename(tmp_path / "client.key")
        with pytest.raises(PaymentUnavailable, match="200 with an unreadable body"):
            await asking.find_charge("pay-1")
    assert len(provider.asked) == 1


@pytest.mark.timeout(180)
async def test_a_token_is_in_no_log_no_trace_and_no_error(
    settings: Settings, partner: tuple[Partner, str], tmp_path: Path
) -> None:
    provider, url = partner
    canary = f"canary-{uuid.uuid4().hex}"
    refused = json.dumps({"error": {"code": f"no {canary}"}}).encode()
    provider.answer = lambda send: reply(send, 401, refused, www_authenticate=canary)
    port, file = free_port(), tmp_path / "token"
    file.write_text(canary)
    with http_collector() as collector:
        env = environment(
            settings,
            OTEL_EXPORTER_OTLP_ENDPOINT=collector.endpoint,
            OTEL_EXPORTER_OTLP_PROTOCOL="http/protobuf",
            TRELLIS_LOG_LEVEL="debug",
            TRELLIS_PAYMENT_URL=url,
            TRELLIS_CARRIER_URL=url,
            TRELLIS_PAYMENT_TOKEN=canary,
            TRELLIS_CARRIER_TOKEN_FILE=str(file),
        )
        command = ("uvicorn", "app.main:app", "--port", str(port), "--no-access-log")
        api_url = f"http://127.0.0.1:{port}"
        async with started(tmp_path / "log", env, *command) as product, httpx.AsyncClient(base_url=api_url) as api:
            await until_ready(api_url, product)
            order = f"o-{uuid.uuid4().hex[:8]}"
            item = {"sku": "tea", "quantity": 1, "unit_price": "5.00"}
            body = {"payment_id": f"pay-{order}", "items": [item], "review_timeout_seconds": 600}
            (await api.post(f"/orders/{order}/start", json=body)).raise_for_status()
            (await api.post(f"/orders/{order}/signals/approve")).raise_for_status()

            async def failed() -> Any:
                return (await api.get(f"/orders/{order}/status")).json()["last_error"]

            last_error = await until(failed, "an attempt that was refused", timeout=60)
            shown = [(await api.get(f"/orders/{order}{path}")).text for path in ("", "/status", "/events")]
            await product.stop()
        spans = repr(collector.spans)
    assert "401" in json.dumps(last_error)
    assert provider.asked[-1]["authorization"] == f"Bearer {canary}"
    for text in (*shown, spans, (tmp_path / "log").read_text()):
        assert text
        assert canary not in text
