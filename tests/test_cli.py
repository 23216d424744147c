"""`trellis order` and `trellis demo` against the real product: what they print, and how they end."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import sys
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib import metadata
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
import typer
from typer.core import TyperCommand
from typer.main import get_group
from typer.testing import CliRunner

from app.cli import main, order
from app.cli.client import CallFailed, ExitCode, ServerSent, answer, connect, server_sent
from app.cli.demo import percentile
from app.cli.timeline import tell
from app.domain.text import printable
from app.local.process import free_port
from tests.support import until_step

LIFE = ["received", "awaiting_review", "charging", "charged", "prepared", "shipped"]


@dataclass(frozen=True)
class Finished:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        assert self.code == 0, self
        return json.loads(self.out)


#: `trellis` without the commands that serve: loading those takes longer than what is tested here.
CLIENT_SIDE = """
import typer
from app.cli import demo, order
app = typer.Typer()
app.add_typer(order.app, name="order")
app.command()(demo.demo)
app()
"""


class Cli:
    """`trellis` for one API. In processes of its own, because the API logs in this one."""

    def __init__(self, url: str, *program: str) -> None:
        self._program = program or ("-c", CLIENT_SIDE)
        self._environment = {**os.environ, "TRELLIS_URL": url}

    async def __call__(self, *arguments: str) -> Finished:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, *self._program, *arguments),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=self._environment,
        )
        try:
            out, err = await process.communicate()
        finally:
            if process.returncode is None:
                process.kill()
        return Finished(process.returncode or 0, out.decode(), err.decode())


@pytest.fixture
def cli(api_url: str) -> Cli:
    return Cli(api_url)


@pytest.fixture
def order_id() -> str:
    return f"cli-{uuid.uuid4().hex[:8]}"


async def start(api: httpx.AsyncClient, order_id: str, **more: Any) -> None:
    """An order with time enough to decide on it."""
    request = {"payment_id": f"pay-{order_id}", "review_timeout_seconds": 600} | more
    (await api.post(f"/orders/{order_id}/start", json=request)).raise_for_status()


def types(lines: str) -> list[str]:
    return [json.loads(line)["type"] for line in lines.splitlines()]


# --- a life


async def test_an_order_is_watched_until_it_is_shipped(cli: Cli, api: httpx.AsyncClient, order_id: str) -> None:
    started = await cli(
        *("order", "start", order_id, "--item", "TEA-100:2:12.50", "--item", "CUP:1:3", "--currency", "EUR"),
        *("--address", "1 Main St, Apt 4, Springfield, IL, 62701", "--customer-id", "c-42", "--review-timeout", "600"),
    )
    assert (started.code, started.err) == (0, "")
    assert started.out.startswith(f"{order_id} accepted: workflow order/{order_id}, run ")

    watching = asyncio.create_task(cli("order", "watch", order_id, "--json"))
    await until_step(api, order_id, "awaiting_review")
    approved = await cli("order", "approve", order_id, "--note", "known customer", "--json")
    assert approved.json["order_id"] == order_id
    watched = await watching
    assert (watched.code, types(watched.out)) == (0, LIFE)

    found = (await cli("order", "show", order_id, "--json")).json
    assert (found["step"], found["total"], found["currency"]) == ("shipped", "28.00", "EUR")
    assert found["payment_id"] == f"pay-{order_id}"
    assert found["address"]["line1"] == "1 Main St, Apt 4"


async def test_text_tells_what_json_tells(cli: Cli, api: httpx.AsyncClient, order_id: str) -> None:
    await start(api, order_id, items=[{"sku": "CUP", "quantity": 3, "unit_price": "1.50"}])
    await until_step(api, order_id, "awaiting_review")
    reviews = await cli("order", "reviews")
    assert re.search(
        rf"^{order_id} +\d+ +\S+ +4.50 USD +3 CUP +pay-{order_id} +[0-9a-f]{{64}}$", reviews.out, re.MULTILINE
    )
    approved = await cli("order", "approve", order_id, "--note", "fine")
    assert approved.out.startswith(f"{order_id}: the approval counts; the order is ")
    watched = await cli("order", "watch", order_id)
    assert watched.code == 0
    assert [line.split()[1] for line in watched.out.splitlines()] == LIFE
    when = r"^[\d:.]+(?:Z|[+-]\d{4})"
    assert re.search(rf"{when}  charging +“fine”  digest=[0-9a-f]{{64}}  payment_id=pay-", watched.out, re.MULTILINE)
    assert re.search(rf"{when}  charged +4.50 USD  reference=", watched.out, re.MULTILINE)

    views = (("events", order_id), ("status", order_id), ("show", order_id), ("list", "--step", "shipped"))
    events, status, shown, listed = await asyncio.gather(*(cli("order", *view) for view in views))
    assert events.out == watched.out
    assert status.out.splitlines() == [f"{'ORDER':{len(order_id)}}  STEP     LAST ERROR", f"{order_id}  shipped"]
    assert re.search(r"^step +shipped$", shown.out, re.MULTILINE)
    assert re.search(r"^note +fine$", shown.out, re.MULTILINE)
    assert re.search(r"^CUP  3         1.50 USD$", shown.out, re.MULTILINE)
    assert re.search(rf"^{order_id}  shipped .* 4.50 USD  pay-{order_id} ", listed.out, re.MULTILINE)
    assert "\x1b" not in watched.out + status.out + shown.out + listed.out


async def test_trouble_is_shown_while_it_lasts(cli: Cli, api: httpx.AsyncClient, order_id: str) -> None:
    await start(api, order_id, payment_id=f"pay-flaky-{order_id}")
    await api.post(f"/orders/{order_id}/signals/approve")
    watched = await cli("order", "watch", order_id)
    assert watched.code == 0
    assert re.search(r"  attempt_failed +charge, attempt 1  PaymentUnavailable: ", watched.out)
    assert re.search(r"  attempt_retried +charge, attempt 2  PaymentUnavailable\n", watched.out)


async def test_signals_are_sent_and_not_answered(cli: Cli, api: httpx.AsyncClient, order_id: str) -> None:
    await start(api, order_id)
    new = ("--line1", "2 Side St", "--city", "Springfield", "--state", "IL", "--zip", "62701")
    moved = await cli("order", "address", order_id, *new, "--signal")
    assert moved.out == f"{order_id}: address sent; the timeline tells whether it counts\n"
    assert (await cli("order", "approve", order_id, "--signal", "--json")).json["signal"] == "approve"
    watched = await cli("order", "watch", order_id, "--json")
    assert {"address_changed", "shipped"} <= set(types(watched.out))
    assert (await api.get(f"/orders/{order_id}")).json()["address"]["line1"] == "2 Side St"


async def test_cancel_and_address_are_answered(cli: Cli, api: httpx.AsyncClient, order_id: str) -> None:
    await start(api, order_id)
    moved = await cli("order", "address", order_id, "--address", "2 Side St,Springfield,IL,62701")
    assert moved.out.startswith(f"{order_id}: the address counts; the order is ")
    assert (await cli("order", "cancel", order_id)).out.startswith(f"{order_id}: the cancellation counts; ")
    watched = await cli("order", "watch", order_id)
    assert watched.code == ExitCode.ENDED_OTHERWISE
    assert "  cancelled         cancelled before the charge\n" in watched.out


async def test_a_note_that_cannot_be_seen_is_refused(cli: Cli, api: httpx.AsyncClient, order_id: str) -> None:
    await start(api, order_id)
    refused = await cli("order", "reject", order_id, "--note", "two\u2028lines", "--json")
    assert refused.code == ExitCode.USAGE
    assert "body.note: the character U+2028 is not allowed" in refused.err
    rejected = await cli("order", "reject", order_id, "--note", "Zoë", "--json")
    assert rejected.json["order_id"] == order_id
    text = await cli("order", "watch", order_id)
    assert "rejected by the review  “Zoë”\n" in text.out


def test_what_events_of_before_hold_ends_no_line() -> None:
    assert printable("two\u2028lines, Zoë") == "two�lines, Zoë"


async def test_a_broken_connection_is_made_again(api_url: str, api: httpx.AsyncClient, order_id: str) -> None:
    async with breaking_once(api_url, after=b"awaiting_review") as (url, broken):
        cli = Cli(url)
        await start(api, order_id)
        watching = asyncio.create_task(cli("order", "watch", order_id, "--json"))
        await broken.wait()
        await api.post(f"/orders/{order_id}/signals/approve")
        watched = await watching
    assert (watched.code, types(watched.out)) == (0, LIFE)
    assert re.fullmatch(r"trellis: the connection to \S+ broke off \(.*\); trying again\n", watched.err)


async def test_pages_are_put_together(api_url: str, api: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(order, "PAGE", 2)
    prefix = f"cli-{uuid.uuid4().hex[:8]}"
    for number in range(5):
        await start(api, f"{prefix}-{number}")
        await until_step(api, f"{prefix}-{number}", "awaiting_review")

    def pages(most: int | None) -> tuple[list[str], bool]:
        with connect(api_url) as client:
            found = order._pages(client, "/orders", "orders", most)
        return [row["order_id"] for row in found["orders"]], found["next"] is not None

    newest_first = [f"{prefix}-{number}" for number in (4, 3, 2, 1, 0)]
    assert await asyncio.to_thread(pages, None) == (newest_first, False)
    assert await asyncio.to_thread(pages, 3) == (newest_first[:3], True)
    assert await asyncio.to_thread(pages, 5) == (newest_first, False)


async def test_orders_of_one_customer_and_ids_to_complete(
    cli: Cli, api: httpx.AsyncClient, api_url: str, order_id: str
) -> None:
    await start(api, order_id, customer_id=f"c-{order_id}", currency="eur")
    await start(api, f"{order_id}-other")
    for each in (order_id, f"{order_id}-other"):
        await until_step(api, each, "awaiting_review")
    listed = (await cli("order", "list", "--customer", f"c-{order_id}", "--json")).json["orders"]
    assert [(each["order_id"], each["currency"]) for each in listed] == [(order_id, "EUR")]

    def complete(url: str) -> list[str]:
        context = typer.Context(TyperCommand("status"), info_name="status")
        context.params = {"url": url}
        return order._known_ids(context, f"{order_id}-")

    assert await asyncio.to_thread(complete, api_url) == [f"{order_id}-other"]
    assert await asyncio.to_thread(complete, f"http://127.0.0.1:{free_port()}") == []


async def test_all_orders_are_watched_until_ctrl_c(api_url: str, api: httpx.AsyncClient, order_id: str) -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "app", "watch", "--json"),
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "TRELLIS_URL": api_url},
    )
    assert process.stdout
    try:
        await start(api, order_id)
        await until_step(api, order_id, "awaiting_review")
        await api.post(f"/orders/{order_id}/signals/approve")
        steps = []
        async with asyncio.timeout(30):
            while steps[-1:] != ["shipped"]:
                order = json.loads(await process.stdout.readline())
                assert order["order_id"] == order_id
                steps.append(order["step"])
        process.send_signal(signal.SIGINT)
        assert await process.wait() == 0
    finally:
        if process.returncode is None:
            process.kill()


def test_the_version_is_printed() -> None:
    result = CliRunner().invoke(main.app, ["--version"])
    assert (result.exit_code, result.stdout) == (0, f"trellis {metadata.version('trellis')}\n")


# --- how commands end


async def test_exit_codes(cli: Cli, api: httpx.AsyncClient, order_id: str) -> None:
    expired = f"{order_id}-late"
    await start(api, expired, review_timeout_seconds=1)
    assert (await cli("order", "watch", expired)).code == ExitCode.ENDED_OTHERWISE
    cases = {
        ("status", "nobody-knows"): (3, "trellis: 404 No order has this id: nobody-knows\n"),
        ("watch", "nobody-knows"): (3, "trellis: 404 No order has this id: nobody-knows\n"),
        ("cancel", expired): (3, f"trellis: 409 The order can no longer take this: {expired} is expired\n"),
        ("start", expired): (3, "trellis: 409 The order exists already with another request: "),
        ("start", order_id, "--item", "TEA:1:1.234"): (2, "trellis: 422 The request is not valid: body.items.0."),
        ("start", order_id, "--review-timeout", "0"): (2, "trellis: 422 The request is not valid: body.review_"),
        ("list", "--url", "localhost:8000"): (2, "trellis: localhost:8000 is not an address; "),
    }
    ends = await asyncio.gather(*(cli("order", *arguments) for arguments in cases))
    for end, (code, line) in zip(ends, cases.values(), strict=True):
        assert (end.code, end.out) == (code, "")
        assert end.err.startswith(line)
        assert end.err.count("\n") == 1


@pytest.mark.parametrize("command", [("order", "status", "o-1"), ("order", "watch", "o-1"), ("demo", "1")])
async def test_no_api_is_one_line(command: tuple[str, ...]) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    end = await Cli(url, "-m", "app")(*command)
    assert end == Finished(4, "", f"trellis: no API at {url}; is `trellis run` running? choose another with --url\n")


#: A command in a process that has the SDK's core in it, with something that tells when it is taken apart.
BESIDE_THE_CORE = """
import atexit, sys
import temporalio.bridge.temporal_sdk_bridge
from app.cli.main import main
atexit.register(lambda: print("exit functions ran"))
class LetGo:
    def __del__(self):
        print("taken apart")
kept = LetGo()
sys.argv = ["trellis", *sys.argv[1:]]
main()
"""


@pytest.mark.parametrize(
    ("arguments", "code"),
    [(("--help",), 0), (("deployment", "promote", "--name", "d"), 2), (("order", "nonsense"), 2)],
)
async def test_a_command_ends_beside_the_core_with_its_own_code(arguments: tuple[str, ...], code: int) -> None:
    end = await Cli("http://127.0.0.1:1", "-c", BESIDE_THE_CORE)(*arguments)
    assert end.code == code
    assert end.out.endswith("exit functions ran\n"), "and nothing after them: the interpreter was not taken apart"


@pytest.mark.parametrize(
    "arguments",
    [
        ("start", "o-1", "--item", "TEA:x:1"),
        ("start", "o-1", "--item", "TEA"),
        ("start", "o-1", "--item", "TEA:\u0662:1"),
        ("start", "o-1", "--city", "Springfield"),
        ("start", "o-1", "--address", "Springfield, IL"),
        ("start", "o-1", "--address", "a,b,c,d", "--zip", "1"),
        ("start", "a/b"),
        ("address", "o-1"),
        ("approve", "o-1", "--signal", "--note", "lost on the way"),
        ("list", "--step", "nowhere"),
        ("list", "--limit", "0"),
    ],
)
def test_wrong_usage_calls_nobody(arguments: tuple[str, ...]) -> None:
    result = CliRunner(env={"TRELLIS_URL": "http://127.0.0.1:1"}).invoke(order.app, arguments)
    assert result.exit_code == ExitCode.USAGE
    assert "Usage: " in result.stderr


@pytest.mark.parametrize("name", sorted(get_group(order.app).commands))
def test_every_command_has_the_common_options(name: str) -> None:
    helped = CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1"}).invoke(order.app, [name, "--help"])
    assert helped.exit_code == 0
    for part in ("--url", "TRELLIS_URL", "--json", "Exit codes: 0 ok; 1 "):
        assert part in helped.stdout


@pytest.mark.parametrize(
    ("status", "body", "code", "line"),
    [
        (503, {"title": "Temporal did not answer", "detail": "again"}, 4, "503 Temporal did not answer: again"),
        (500, {"title": "Something went wrong here"}, 4, "500 Something went wrong here"),
        (404, {"title": "Not Found", "detail": "Not Found"}, 3, "404 Not Found"),
        (502, "<html>", 4, "http://shop/ answered 502 Bad Gateway"),
        (200, "<html>", 4, "http://shop/ answered 200 OK; is that the API? choose another with --url"),
        (404, "<html>", 4, "http://shop/ answered 404 Not Found; is that the API? choose another with --url"),
    ],
)
def test_what_an_answer_means(status: int, body: object, code: int, line: str) -> None:
    request = httpx.Request("GET", "http://shop/orders?limit=1")
    content = {"json": body} if isinstance(body, dict) else {"text": body}
    with pytest.raises(CallFailed) as failed:
        answer(httpx.Response(status, request=request, **content))
    assert (failed.value.code, str(failed.value)) == (code, line)


# --- the demo


async def test_demo_drives_every_scenario_to_its_end(cli: Cli) -> None:
    report = (await cli("demo", "5", "--mix", "--json")).json
    assert report["steps"] == {"shipped": 2, "cancelled": 1, "payment_failed": 1, "expired": 1}
    assert report["unexpected"] == []
    assert 0 < report["start_seconds"]["p50"] <= report["start_seconds"]["p99"] < report["end_to_end_seconds"]["p99"]


async def test_demo_prints_a_summary(cli: Cli) -> None:
    end = await cli("demo", "3", "--concurrency", "2")
    assert (end.code, end.err) == (0, "")
    assert re.search(r"^approve +shipped +3( +\d+ ms| +[\d.]+ s){4}$", end.out, re.MULTILINE)
    assert re.search(r"^3 orders in [\d.]+ s, [\d.]+ orders/s, 0 unexpected$", end.out, re.MULTILINE)


async def test_demo_fails_when_an_order_does_not_end(api_alone: httpx.AsyncClient) -> None:
    end = await Cli(str(api_alone.base_url))("demo", "1", "--patience", "1")
    assert end.code == ExitCode.ENDED_OTHERWISE
    assert re.search(r"^demo-\w+-0001 \(approve\): still received, not shipped$", end.out, re.MULTILINE)


# --- parts


def test_server_sent_events_are_cut_at_newlines_only() -> None:
    stream = (
        "event: a\r\ndata: {1\u2028}\r\nid: 7\r\n\r\n: still here\n\ndata:x\ndata: y\n\nevent: no data\n\ndata: unfini"
    )
    whole = [ServerSent("7", "{1\u2028}"), ServerSent("", "x\ny")]
    assert list(server_sent([stream.encode()])) == whole
    assert list(server_sent(bytes([byte]) for byte in stream.encode())) == whole


@pytest.mark.parametrize(
    ("payload", "told"),
    [
        ({}, ""),
        ({"amount": "5.00", "currency": "USD", "payment_id": "pay-1"}, "5.00 USD  payment_id=pay-1"),
        ({"reason": "rejected by the review", "note": "no stock"}, "rejected by the review  “no stock”"),
        (
            {"activity": "charge", "attempt": 2, "error_type": "E", "message": "no", "retryable": True},
            "charge, attempt 2  E: no",
        ),
        (
            {"activity": "charge", "attempt": 1, "error_type": "E", "message": "no", "retryable": False},
            "charge, attempt 1  E: no (not tried again)",
        ),
        ({"tracking": "trk_1", "pickup": True}, "to be picked up  tracking=trk_1"),
        ({"something": "new", "attempt": 3}, "something=new  attempt=3"),
    ],
)
def test_events_are_told(payload: dict[str, Any], told: str) -> None:
    kept = dict(payload)
    assert tell(payload) == told
    assert payload == kept


def test_percentiles_are_nearest_ranks() -> None:
    assert percentile([], 50) is None
    assert percentile([3.0], 99) == 3.0
    assert [percentile(range(1, 101), percent) for percent in (0, 50, 99, 100)] == [1, 50, 99, 100]


def test_printable_keeps_text_and_drops_control() -> None:
    assert printable("Zoë, 5 €\t\x1b[2J\r\n") == "Zoë, 5 €��[2J��"


# --- a network that breaks


@asynccontextmanager
async def breaking_once(url: str, *, after: bytes) -> AsyncIterator[tuple[str, asyncio.Event]]:
    """A way to `url` that breaks off once, after the server has sent `after`. Yields its URL, and when it broke."""
    target, broken = urlsplit(url), asyncio.Event()

    async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection(target.hostname, target.port)
        requests = asyncio.create_task(_copy(reader, back))
        async for chunk in _chunks(there):
            writer.write(chunk)
            await writer.drain()
            if after in chunk and not broken.is_set():
                broken.set()
                break
        requests.cancel()
        writer.close()
        back.close()

    async with await asyncio.start_server(pass_on, "127.0.0.1", 0) as server:
        host, port = server.sockets[0].getsockname()
        yield f"http://{host}:{port}", broken


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    async for chunk in _chunks(reader):
        writer.write(chunk)
        await writer.drain()


async def _chunks(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while chunk := await reader.read(65536):
        yield chunk
