"""The edge of the API: how it stops, what strangers and slow clients may do, and what it says about itself."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import os
import re
import signal
import sys
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, cast

import asyncpg
import httpx
import pytest
from pydantic import SecretStr
from structlog.testing import capture_logs

from app import workers
from app.api import create_app
from app.errors import SettingsError, TooManyStreams
from app.http import docs_page, serving
from app.http.edge import Hosts
from app.order import feed, gauges
from app.order.api import wants_stream
from app.order.feed import EventFeed
from app.order.models import Event, OrderPage
from app.order.repository import OrderRepository
from app.settings import Settings, load
from app.telemetry import metrics
from tests.support import serving as running_app
from tests.support import until, until_step
from tests.telemetry import environment, free_port, started, until_ready

LIVE = {"Accept": "text/event-stream"}


async def _in_review(client: httpx.AsyncClient, payment: str = "pay") -> str:
    """An order that waits for its review; its id."""
    unique = uuid.uuid4().hex[:12]
    body = {"payment_id": f"{payment}-{unique}", "review_timeout_seconds": 600}
    answer = await client.post(f"/orders/o-{unique}/start", json=body)
    assert answer.status_code == 202, answer.text
    await until_step(client, f"o-{unique}", "awaiting_review")
    return f"o-{unique}"


@pytest.fixture
def logged() -> Iterator[list[Any]]:
    """What is logged; unconfigured, structlog draws tracebacks for seconds."""
    for name, module in [*sys.modules.items()]:
        if name.startswith("app.") and hasattr(module, "log"):
            # A logger that was used under another configuration keeps to that.
            vars(module.log).pop("bind", None)
    with capture_logs() as lines:
        yield lines


async def _said_to(port: int, *parts: bytes, pause: float = 0.0) -> bytes:
    """What the API says to this until it closes the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        with suppress(ConnectionError):  # what it said before it closed is still to be read
            for part in parts:
                writer.write(part)
                await writer.drain()
                await asyncio.sleep(pause)
        return await reader.read()
    finally:
        writer.close()


def _port(url: str) -> int:
    return int(url.rsplit(":", 1)[1])


#: Nothing is behind the API: what gets past the edge is answered 503.
NOWHERE: dict[str, Any] = {
    "database_url": "postgresql://127.0.0.1:1/nowhere",
    "temporal_address": "127.0.0.1:1",
    "temporal_rpc_timeout": 0.2,
}


@asynccontextmanager
async def _api(**settings: Any) -> AsyncIterator[httpx.AsyncClient]:
    chosen = Settings(**NOWHERE, **settings)
    async with (
        running_app(create_app(chosen), http=serving.protocol(chosen)) as url,
        httpx.AsyncClient(base_url=url, timeout=30) as client,
    ):
        yield client


@pytest.fixture(scope="module")
async def edge() -> AsyncIterator[httpx.AsyncClient]:
    """A client of an API as it is on a desk."""
    async with _api() as client:
        yield client


# --- stopping


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_the_published_line_drains_while_a_timeline_is_watched(
    settings: Settings, pool: asyncpg.Pool, tmp_path: Path, number: signal.Signals
) -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = ("uvicorn", "app.main:app", "--port", str(port), "--no-access-log")
    env = environment(settings, TRELLIS_API_HEADER_TIMEOUT="1")
    async with started(tmp_path / "log", env, *command) as server:
        await until_ready(url, server)
        assert await asyncio.wait_for(_said_to(port, b""), 10) == b"", "uvicorn alone would wait forever"
        async with httpx.AsyncClient(base_url=url, timeout=30) as client:
            watched, charged = await _in_review(client), await _in_review(client, "pay-slow")
            async with client.stream("GET", f"/orders/{watched}/events", headers=LIVE) as watching:
                lines = watching.aiter_lines()
                assert await anext(lines)
                await client.post(f"/orders/{charged}/signals/approve")

                async def at_the_provider() -> bool:
                    return await pool.fetchval("SELECT status = 'INIT' FROM payments") is True

                await until(at_the_provider, "the charge to be under way")
                server.running.send_signal(number)
                async with asyncio.timeout(15):
                    assert [line async for line in lines]  # to its end, which is no broken connection
                    code = await server.running.wait()
        # uvicorn repeats the signal after the drain, so that its parent sees why it ended.
        assert code in {0, -number}, server.log.read_text()
    log = server.log.read_text()
    assert "workers stopped" in log
    assert "Finished server process" in log
    # The attempt that ran was not cut off.
    assert await pool.fetchval("SELECT status FROM payments") == "CHARGED"


# --- background tasks


class Broken(OrderRepository):
    """A repository that chokes on the timelines of some orders, or of all."""

    def __init__(self, pool: asyncpg.Pool, *poisoned: str) -> None:
        super().__init__(pool)
        self.poisoned = set(poisoned)

    async def events_of_many(self, seen: dict[str, int]) -> Any:
        if self.poisoned & {"*", *seen}:
            raise KeyError("payload_json")  # any error that is not one of a database that is away
        return await super().events_of_many(seen)


def _failures(task: str) -> float:
    return metrics.REGISTRY.get_sample_value("trellis_background_failures_total", {"task": task}) or 0.0


async def _all_of(watching: AsyncIterator[Event | None]) -> list[str]:
    return [event.type async for event in watching if event]


async def _written(pool: asyncpg.Pool, order_id: str, step: str = "received") -> None:
    await pool.execute("INSERT INTO orders (id, state) VALUES ($1, $2)", order_id, step)
    await pool.execute("INSERT INTO events (order_id, type, payload_json) VALUES ($1, $2, '{}')", order_id, step)


async def test_one_timeline_that_cannot_be_read_ends_and_the_others_go_on(
    pool: asyncpg.Pool, logged: list[Any]
) -> None:
    for order_id in ("good", "bad"):
        await _written(pool, order_id)
    timelines, failures = EventFeed(Broken(pool, "bad")), _failures("timelines")
    async with asyncio.timeout(20):
        good = timelines.watch("good")
        assert await anext(good)
        assert await _all_of(timelines.watch("bad")) == []
        await pool.execute("INSERT INTO events (order_id, type, payload_json) VALUES ('good', 'note', '{}')")
        event = await anext(good)
        assert event
        assert event.type == "note"
    assert _failures("timelines") > failures
    await good.aclose()
    await timelines.close()


async def test_an_event_that_cannot_be_read_is_counted(pool: asyncpg.Pool, logged: list[Any]) -> None:
    """What `python -m tests.alerts` makes TrellisBackgroundFailures fire with."""
    await _written(pool, "o-1")
    await pool.execute("INSERT INTO events (order_id, type, ts) VALUES ('o-1', 'note', '4000-01-01 BC')")
    timelines, failures = EventFeed(OrderRepository(pool)), _failures("timelines")
    async with asyncio.timeout(20):
        assert await _all_of(timelines.watch("o-1")) == []
    assert _failures("timelines") > failures
    await timelines.close()


async def test_several_workers_do_not_share_a_metrics_port() -> None:
    env = {name: text for name, text in os.environ.items() if not name.startswith("TRELLIS_")}
    env |= {"TRELLIS_SANDBOX": "true", "TRELLIS_METRICS_PORT": str(free_port())}
    command = ("-m", "uvicorn", "app.main:app", "--port", str(free_port()), "--workers", "2")
    process = await asyncio.create_subprocess_exec(sys.executable, *command, stderr=asyncio.subprocess.PIPE, env=env)
    try:
        async with asyncio.timeout(60):
            _, said = await process.communicate()
    finally:
        if process.returncode is None:
            process.terminate()
    assert said.count(b"a process is a replica") == 1
    assert b"Traceback" not in said


async def test_watchers_are_told_when_the_reader_fails_and_it_runs_again(
    pool: asyncpg.Pool, monkeypatch: pytest.MonkeyPatch, logged: list[Any]
) -> None:
    await _written(pool, "o-1")
    timelines, failures = EventFeed(OrderRepository(pool)), _failures("timelines")
    look = timelines._look

    async def fail_once() -> None:
        monkeypatch.setattr(timelines, "_look", look)
        raise AssertionError

    monkeypatch.setattr(timelines, "_look", fail_once)
    async with asyncio.timeout(20):
        assert await _all_of(timelines.watch("o-1")) == []
        again = timelines.watch("o-1")
        assert await anext(again)
    assert _failures("timelines") == failures + 1
    await again.aclose()
    await timelines.close()


async def test_the_gauges_are_read_again_after_any_error(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, logged: list[Any]
) -> None:
    tries = 0

    async def fail(_: object) -> None:
        nonlocal tries
        tries += 1
        raise KeyError("state")

    monkeypatch.setattr(gauges, "read", fail)
    monkeypatch.setattr("app.telemetry.supervision.pauses", lambda: itertools.repeat(0.01))
    failures = _failures("gauges")
    reading = asyncio.create_task(workers._read_gauges(settings.model_copy(update={"metrics_port": 1})))

    async def again() -> bool:
        return tries > 1

    await until(again, "the gauges to be read again")
    reading.cancel()
    assert _failures("gauges") > failures


# --- strangers

APPROVE = "/orders/o-1/signals/approve"


@pytest.mark.parametrize(
    "headers",
    [
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},  # another port of this machine
        {"Sec-Fetch-Site": "cross-site", "Origin": "http://localhost:8000", "Host": "localhost:8000"},
        {"Origin": "https://evil.example"},
        {"Origin": "http://localhost:3000", "Host": "localhost:8000"},
        {"Origin": "null"},
    ],
)
async def test_another_site_changes_nothing(edge: httpx.AsyncClient, headers: dict[str, str]) -> None:
    for method, path in (("POST", APPROVE), ("PUT", "/orders/o-1/address"), ("DELETE", "/nothing")):
        answer = await edge.request(method, path, headers=headers, json={})
        assert answer.status_code == 403, (method, path)
        assert answer.headers["content-type"] == "application/problem+json"
        assert answer.json()["code"] == "CrossSite"
    # Reads are not kept from it: its page cannot see the answer.
    assert (await edge.get("/healthz", headers=headers)).status_code == 200
    assert "access-control-allow-origin" not in (await edge.get("/healthz", headers=headers)).headers


@pytest.mark.parametrize(
    "headers",
    [
        {},  # curl, and every client that is no browser
        {"Sec-Fetch-Site": "same-origin", "Origin": "https://shop.example", "Host": "127.0.0.1:8000"},
        {"Sec-Fetch-Site": "none"},
        {"Origin": "http://LOCALHOST:8000", "Host": "localhost:8000"},
    ],
)
async def test_its_own_pages_and_programs_are_let_in(edge: httpx.AsyncClient, headers: dict[str, str]) -> None:
    answer = await edge.post(APPROVE, headers=headers)
    assert answer.status_code == 503, "there is nothing behind this API"


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example"]
)
async def test_a_name_that_was_rebound_reads_nothing(edge: httpx.AsyncClient, host: str) -> None:
    calls = [
        ("GET", "/orders/o-1/status", {}),
        ("GET", "/orders/o-1/events", LIVE),
        ("POST", "/orders/o-1/start", {}),
        ("GET", "/readyz", {}),
        ("GET", "/docs", {}),
    ]
    for method, path, headers in calls:
        answer = await edge.request(method, path, headers={"Host": host, **headers})
        assert answer.status_code == 421, path
        assert answer.json()["code"] == "HostNotAllowed"
        assert "TRELLIS_ALLOWED_HOSTS" in answer.json()["detail"]
        assert "evil" not in answer.text


HERE = ("127.0.0.1", 8000)
POD = ("10.1.2.3", 8000)


@pytest.mark.parametrize(
    ("allowed", "listens_locally", "server", "taken", "refused"),
    [
        (None, True, HERE, "localhost LOCALHOST:1 a.localhost 127.0.0.1:8000 [::1]:8000 10.0.0.2", "trellis_app a.b"),
        (None, True, ("::1", 8000), "localhost", "shop.example"),
        (None, True, POD, "trellis-api:8000 localhost shop.example", ""),  # uvicorn --host 0.0.0.0
        (None, False, HERE, "localhost trellis_app shop.example", ""),  # TRELLIS_API_HOST=0.0.0.0
        (("a.b", "*.c.d"), False, POD, "a.b:443 A.b. x.c.d 10.1.2.3:8000", "c.d localhost x.a.b"),
        (("*",), True, HERE, "shop.example", ""),
    ],
)  # fmt: skip
def test_names_that_are_taken(
    allowed: tuple[str, ...] | None, listens_locally: bool, server: tuple[str, int], taken: str, refused: str
) -> None:
    hosts = Hosts(allowed, listens_locally=listens_locally)
    for name in taken.split():
        assert hosts.allow(name.encode(), server), name
    for name in refused.split():
        assert not hosts.allow(name.encode(), server), name


def test_allowed_hosts_are_a_list_with_commas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRELLIS_ALLOWED_HOSTS", "shop.example, *.shop.test,")
    assert load().allowed_hosts == ("shop.example", "*.shop.test")
    monkeypatch.setenv("TRELLIS_ALLOWED_HOSTS", "https://shop.example/")
    with pytest.raises(SettingsError, match=r"TRELLIS_ALLOWED_HOSTS: .*no scheme, port or path"):
        load()


# --- slow clients

HEAD = b"POST /orders/o-1/start HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


async def test_a_head_that_does_not_come_is_not_waited_for() -> None:
    async with _api(api_header_timeout=0.3) as client, asyncio.timeout(20):
        port = _port(str(client.base_url).rstrip("/"))
        assert await _said_to(port) == b""
        # A byte now and then does not put it off.
        with pytest.raises(ConnectionError):
            await _dribble(port)
        # Neither does one on a connection that has been answered.
        answered = await _said_to(port, b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n", b"\r\n", pause=0.1)
        assert answered.startswith(b"HTTP/1.1 200")


async def _dribble(port: int) -> None:
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    while True:
        writer.write(b"G")
        await writer.drain()
        await asyncio.sleep(0.05)


async def test_a_body_that_does_not_come_is_408() -> None:
    async with _api(api_body_timeout=0.3) as client, asyncio.timeout(20):
        port = _port(str(client.base_url).rstrip("/"))
        answer = await _said_to(port, HEAD + b"Content-Length: 30\r\n\r\n{", b'"')
        assert answer.startswith(b"HTTP/1.1 408")
        assert b"connection: close" in answer
        assert b'"code":"RequestTimeout"' in answer


async def test_an_answer_that_nobody_reads_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "WRITE_TIMEOUT", 0.3)
    async with _api() as client, asyncio.timeout(30):
        _, writer = await asyncio.open_connection("127.0.0.1", _port(str(client.base_url).rstrip("/")), limit=1)
        with pytest.raises(ConnectionError):
            await _ask_without_end(writer)
        writer.close()


async def _ask_without_end(writer: asyncio.StreamWriter) -> None:
    # Until the buffers of both ends are full of answers, and the connection is reset.
    while True:
        writer.write(b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n" * 100)
        await writer.drain()
        await asyncio.sleep(0)


async def test_requests_at_once_are_limited_but_for_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    slow, release = asyncio.Event(), asyncio.Event()

    async def wait(*_: object) -> OrderPage:
        slow.set()
        await release.wait()
        return OrderPage(orders=[], next=None)

    monkeypatch.setattr(OrderRepository, "newest", wait)
    async with _api(api_limit_concurrency=1) as client, asyncio.timeout(20):
        first = asyncio.create_task(client.get("/orders"))
        await slow.wait()
        answer = await client.get("/orders")
        assert (answer.status_code, answer.json()["code"]) == (503, "Overloaded")
        assert answer.headers["retry-after"]
        assert (await client.get("/healthz")).status_code == 200
        release.set()
        assert (await first).status_code == 200
        assert (await client.get("/reviews")).json()["code"] == "DatabaseUnavailable"


async def test_connections_are_limited() -> None:
    async with _api(api_limit_concurrency=1, max_streams=1) as client, asyncio.timeout(20):
        port = _port(str(client.base_url).rstrip("/"))
        held = [await asyncio.open_connection("127.0.0.1", port) for _ in range(2)]
        with pytest.raises((ConnectionError, httpx.RemoteProtocolError, httpx.ReadError)):
            await client.get("/healthz")
        for _, writer in held:
            writer.close()

        async def served() -> bool:
            try:
                return (await client.get("/healthz")).status_code == 200
            except httpx.HTTPError:
                return False

        await until(served, "a place to be free")


async def test_streams_are_limited_and_end_by_their_age(settings: Settings, pool: asyncpg.Pool) -> None:
    await _written(pool, "o-1")
    chosen = settings.model_copy(update={"max_streams": 1, "stream_max_seconds": 1.5})
    async with (
        running_app(create_app(chosen)) as url,
        httpx.AsyncClient(base_url=url, timeout=30) as client,
        asyncio.timeout(30),
    ):
        async with client.stream("GET", "/orders/o-1/events", headers=LIVE) as watching:
            assert watching.headers["x-accel-buffering"] == "no"
            refused = await client.get("/orders/o-1/events", headers=LIVE)
            assert (refused.status_code, refused.json()["code"]) == (503, "TooManyStreams")
            assert refused.headers["retry-after"]
            lines = [line async for line in watching.aiter_lines()]
        last = next(line.removeprefix("id: ") for line in lines if line.startswith("id: "))
        # It ended in order, and the place is free: the client goes on where it was.
        async with client.stream("GET", "/orders/o-1/events", headers=LIVE | {"Last-Event-ID": last}) as again:
            assert again.status_code == 200
            await _written(pool, "o-2")
            await pool.execute("INSERT INTO events (order_id, type, payload_json) VALUES ('o-1', 'note', '{}')")
            assert [line async for line in again.aiter_lines() if line.startswith("event: ")] == ["event: note"]


async def test_one_client_does_not_get_every_stream(settings: Settings, pool: asyncpg.Pool) -> None:
    await _written(pool, "o-1")
    stranger, customer = httpx.AsyncHTTPTransport(), httpx.AsyncHTTPTransport(local_address="127.0.0.2")
    before = _refused_streams("client")
    async with (
        running_app(create_app(settings.model_copy(update={"max_streams": 4}))) as url,
        httpx.AsyncClient(base_url=url, transport=stranger, timeout=30) as greedy,
        httpx.AsyncClient(base_url=url, transport=customer, timeout=30) as other,
        AsyncExitStack() as held,
        asyncio.timeout(30),
    ):
        for _ in range(2):
            await held.enter_async_context(greedy.stream("GET", "/orders/o-1/events", headers=LIVE))
        refused = await greedy.get("/orders/o-1/events", headers=LIVE)
        assert (refused.status_code, refused.json()["code"]) == (503, "TooManyStreams")
        assert refused.json()["detail"] == "2 at most for one client"
        assert refused.headers["retry-after"]
        served = await held.enter_async_context(other.stream("GET", "/orders/o-1/events", headers=LIVE))
        assert served.status_code == 200
    assert _refused_streams("client") == before + 1


def _refused_streams(limit: str) -> float:
    return metrics.REGISTRY.get_sample_value("trellis_event_streams_refused_total", {"limit": limit}) or 0.0


def test_a_client_is_an_address_or_a_network_of_ipv6() -> None:
    timelines = EventFeed(cast(OrderRepository, None), max_streams=10, max_streams_per_client=1)
    for first, second, same in (
        ("192.0.2.1", "192.0.2.1", True),
        ("192.0.2.1", "192.0.2.2", False),
        ("192.0.2.1", "::ffff:192.0.2.1", True),
        ("2001:db8::1", "2001:db8::ffff", True),
        ("2001:db8::1", "2001:db8:0:1::1", False),
    ):
        with timelines.place(first), pytest.raises(TooManyStreams) if same else nullcontext(), timelines.place(second):
            pass
    assert timelines._streams == 0
    assert not timelines._of_client


async def test_a_stream_ends_with_the_order_also_for_whoever_saw_more_than_there_is(
    pool: asyncpg.Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed, "HEARTBEAT", 0.2)
    await _written(pool, "o-1")
    timelines = EventFeed(OrderRepository(pool))
    async with asyncio.timeout(20):
        watching = timelines.watch("o-1", 10**9)  # the id is from before the database was restored
        assert await anext(watching) is None
        await pool.execute("UPDATE orders SET state = 'cancelled'")
        assert await _all_of(watching) == []
    await timelines.close()


@pytest.mark.parametrize(
    ("accept", "stream"),
    [
        ("text/event-stream", True),
        ("Text/Event-Stream; charset=utf-8", True),
        ("application/json, text/event-stream", True),
        ("application/json;q=0.5, text/event-stream;q=0.8", True),
        ("application/json, text/event-stream;q=0.5", False),
        ("text/event-stream;q=0", False),
        ("text/event-stream;q=nan", False),
        ("*/*", False),
        ("application/json", False),
    ],
)
def test_a_stream_is_for_whoever_asks_for_one(accept: str, stream: bool) -> None:
    assert wants_stream(accept) is stream


async def test_a_field_that_nobody_knows_is_not_repeated_at_length(edge: httpx.AsyncClient) -> None:
    answer = await edge.post("/orders/o-1/start", json={"payment_id": "p", "x" * 60_000: 1})
    assert answer.status_code == 422
    assert len(answer.content) < 1000


async def test_probes_below_a_path_prefix_are_not_logged(logged: list[Any]) -> None:
    async with running_app(create_app(Settings(**NOWHERE)), root_path="/shop") as url, httpx.AsyncClient() as client:
        assert (await client.get(f"{url}/healthz")).status_code == 200
        assert (await client.get(f"{url}/docs/start.js")).status_code == 200
        assert "docs/start.js" in (await client.get(f"{url}/docs")).text
    # A line is written after its answer has left: two may change places.
    assert sorted(line["route"] for line in logged if line["event"] == "request") == ["/docs", "unknown"]


# --- what is refused is read first


@pytest.mark.parametrize(
    ("path", "framing", "status"),
    [
        (b"/orders/o-1/start", b"Content-Length: 300000", b"413"),
        (b"/orders/o-1/start", b"Transfer-Encoding: chunked", b"413"),
        (b"/no/such/path", b"Content-Length: 60000", b"404"),
        (b"/orders/o-1/start", b"Content-Length: 60000\r\nSec-Fetch-Site: cross-site", b"403"),
        (b"/orders/o-1/start", b"Content-Length: 60000\r\nHost: evil.example", b"421"),
        (b"/orders/o-1/start", b"Content-Length: 300000\r\nContent-Encoding: gzip", b"413"),
        (b"/orders/o-1/start", b"Content-Length: 60000\r\nContent-Encoding: gzip", b"415"),
    ],
)
async def test_a_refusal_reaches_a_client_that_is_still_sending(
    edge: httpx.AsyncClient, path: bytes, framing: bytes, status: bytes
) -> None:
    """A connection that is closed with something unread is reset, and the answer is lost."""
    head = b"POST " + path + b" HTTP/1.1\r\nConnection: close\r\n" + framing + b"\r\n"
    head += b"" if b"Host" in framing else b"Host: localhost\r\n"
    size = 60_000 if b" 60000" in framing else 300_000
    block = b"x" * 10_000
    parts = [b"2710\r\n" + block + b"\r\n" if b"chunked" in framing else block] * (size // len(block))
    end = b"0\r\n\r\n" if b"chunked" in framing else b""
    answer = await _said_to(_port(str(edge.base_url).rstrip("/")), head + b"\r\n", *parts, end, pause=0.005)
    assert answer.startswith(b"HTTP/1.1 " + status), answer[:200]


async def test_an_error_that_nobody_expected_keeps_the_connection(
    edge: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, logged: list[Any]
) -> None:
    async def fail(*_: object) -> None:
        raise KeyError("secret")

    monkeypatch.setattr(OrderRepository, "newest", fail)
    call = b"GET /orders HTTP/1.1\r\nHost: localhost\r\n\r\n"
    last = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    answer = await _said_to(_port(str(edge.base_url).rstrip("/")), call, last, pause=0.3)
    assert answer.startswith(b"HTTP/1.1 500"), answer
    assert b"secret" not in answer
    assert b"HTTP/1.1 200" in answer, "the next request on the connection is answered"
    assert [line["event"] for line in logged if line["log_level"] == "error"] == ["unexpected error"]
    assert not [record for record in caplog.records if record.name == "uvicorn.error"], "and it is logged once"


# --- what the API says about itself


async def test_every_answer_has_the_security_headers(edge: httpx.AsyncClient) -> None:
    for path in ("/healthz", "/orders", "/nothing", "/docs", "/docs/start.js", "/openapi.json"):
        headers = (await edge.get(path)).headers
        assert headers["x-content-type-options"] == "nosniff", path
        assert headers["referrer-policy"] == "no-referrer", path
        assert "frame-ancestors 'none'" in headers["content-security-policy"], path
        assert len(headers.get_list("content-security-policy")) == 1, path


async def test_the_documentation_loads_nothing_from_elsewhere(edge: httpx.AsyncClient) -> None:
    page = await edge.get("/docs")
    assert "unsafe-eval" not in page.headers["content-security-policy"]
    assert "script-src 'self';" in page.headers["content-security-policy"]
    sources = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert len(sources) == 4
    for source in sources:
        if source != "data:,":
            found = await edge.get(f"/{source}")
            assert found.status_code == 200, source
            assert found.headers["content-type"].split(";")[0] in {"text/css", "text/javascript"}
    assert "<script>" not in page.text
    assert (await edge.get("/redoc")).status_code == 404


def test_swagger_ui_is_what_was_published() -> None:
    assets = Path(docs_page.__file__).parent / "static" / "swagger-ui"
    sums = dict(line.split("  ")[::-1] for line in (assets / "SHA256SUMS").read_text().splitlines())
    assert {"swagger-ui-bundle.js", "swagger-ui.css", "LICENSE", "NOTICE"} == set(sums)
    for name, expected in sums.items():
        assert hashlib.sha256((assets / name).read_bytes()).hexdigest() == expected, name


async def test_readiness_says_no_addresses_in_public(settings: Settings) -> None:
    secret = {"database_url": "postgresql://127.0.0.1:1/nowhere", "metrics_port": free_port()}
    chosen = settings.model_copy(update={**secret, "database_url": SecretStr(secret["database_url"])})
    async with running_app(create_app(chosen)) as url, httpx.AsyncClient() as client:
        public = await client.get(f"{url}/readyz")
        assert public.status_code == 503
        assert public.json()["checks"] == {"database": "does not answer", "temporal": "ok"}
        private = await client.get(f"http://127.0.0.1:{chosen.metrics_port}/readyz")
        assert "ConnectionRefusedError" in private.json()["checks"]["database"]


@pytest.mark.parametrize("path", ["/healthz", "/orders/o-1/status", "/openapi.json", "/docs", "/orders/o-1/events"])
async def test_head_is_get_without_the_body(edge: httpx.AsyncClient, path: str) -> None:
    answer, asked = await edge.head(path, headers=LIVE), await edge.get(path)
    assert (answer.status_code, answer.content) == (asked.status_code, b"")
    assert answer.headers["content-length"] == asked.headers["content-length"]


def test_failpoints_need_a_second_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRELLIS_FAILPOINTS", "charge.after_gateway=die")
    with pytest.raises(SettingsError, match="TRELLIS_FAILPOINTS_ALLOWED=true"):
        load()
    monkeypatch.setenv("TRELLIS_FAILPOINTS_ALLOWED", "true")
    assert load().failpoints


def test_whatever_the_image_installs_is_locked_by_hash() -> None:
    dockerfile = (Path(__file__).parents[1] / "Dockerfile").read_text().replace("\\\n", " ")
    installs = [line for line in dockerfile.splitlines() if " install " in line and not line.startswith("#")]
    assert len(installs) >= 5
    for line in installs:
        for command in line.split("&&"):
            assert " install " not in command or "--require-hashes" in command or "--no-index" in command, command
