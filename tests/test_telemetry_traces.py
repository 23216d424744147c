"""One trace per order, read back from a collector that the test runs, from processes as they run in production."""

from __future__ import annotations

import asyncio
import signal
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import asyncpg
import httpx
import pytest

from app.failpoints import EXIT_CODE
from app.settings import Settings
from app.telemetry.traces import ALLOWED
from tests.support import until_step
from tests.telemetry import (
    Collector,
    Process,
    ReceivedSpan,
    environment,
    free_port,
    grpc_collector,
    http_collector,
    started,
    tree,
    until_ready,
)

FAILED = "!PaymentUnavailable"
CLAIM = ["INSERT payments"]
#: The id is known: it is looked at, and the order is at its step already.
CLAIM_AGAIN = [
    *("INSERT events", *CLAIM),
    *("BEGIN", "SELECT orders", "INSERT payments", "SELECT payments", "UPDATE orders", "SELECT events", "COMMIT"),
]

SETTLED = ["POST /v1/charges", "UPDATE orders", "UPDATE orders"]


def whole(*charge: list[str]) -> list[Any]:
    """Every span of an order that is shipped, nothing twice, with these attempts at its charge."""
    return [
        [
            "POST /orders/{id}/start",
            "SELECT orders",
            [
                "StartWorkflow:OrderWorkflow",
                [
                    "RunWorkflow:OrderWorkflow",
                    ["StartActivity:receive", ["RunActivity:receive #1", "INSERT orders"]],
                    ["StartActivity:validate", ["RunActivity:validate #1", "UPDATE orders"]],
                    ["StartActivity:charge", *charge],
                    [
                        "StartChildWorkflow:ShippingWorkflow",
                        [
                            "RunWorkflow:ShippingWorkflow",
                            ["StartActivity:prepare", ["RunActivity:prepare #1", "UPDATE orders"]],
                            [
                                "StartActivity:dispatch",
                                ["RunActivity:dispatch #1", "UPDATE orders", "POST /v1/parcels", "UPDATE orders"],
                            ],
                        ],
                    ],
                ],
            ],
        ]
    ]


#: Two failed charges, then success.
WHOLE = whole(
    [f"RunActivity:charge #1 {FAILED}", *CLAIM, "POST /v1/charges !503", "UPDATE orders"],
    [f"RunActivity:charge #2 {FAILED}", *CLAIM_AGAIN, "POST /v1/charges !503", "UPDATE orders"],
    ["RunActivity:charge #3", *CLAIM_AGAIN, *SETTLED],
)


@pytest.fixture
def order() -> str:
    """An order id that nobody used, as all tests share one Temporal."""
    return f"o-{uuid.uuid4().hex[:8]}"


async def _start(api: httpx.AsyncClient, order: str, payment: str = "pay-flaky-1") -> None:
    body = {"payment_id": payment, "review_timeout_seconds": 600}
    (await api.post(f"/orders/{order}/start", json=body)).raise_for_status()
    await until_step(api, order, "awaiting_review")


async def _finish(api: httpx.AsyncClient, order: str) -> str:
    (await api.post(f"/orders/{order}/signals/approve")).raise_for_status()
    await until_step(api, order, "shipped", timeout=80)
    trace_id: str = (await api.get(f"/orders/{order}")).json()["trace_id"]
    return trace_id


@pytest.mark.parametrize(
    ("collecting", "protocol", "cached"),
    [(grpc_collector, "grpc", 1000), (http_collector, "http/protobuf", 0)],
    ids=["grpc", "http, without a cache"],
)
async def test_an_order_is_one_trace(
    settings: Settings,
    tmp_path: Path,
    order: str,
    collecting: Callable[[], AbstractContextManager[Collector]],
    protocol: str,
    cached: int,
) -> None:
    port = free_port()
    update = {"max_cached_workflows": cached, "local_steps": cached > 0}
    settings = settings.model_copy(update=update)
    settings.model_fields_set.update(update)
    with collecting() as collector:
        env = environment(
            settings, OTEL_EXPORTER_OTLP_ENDPOINT=collector.endpoint, OTEL_EXPORTER_OTLP_PROTOCOL=protocol
        )
        url = f"http://127.0.0.1:{port}"
        command = ("uvicorn", "app.main:app", "--port", str(port), "--no-access-log")
        async with started(tmp_path / "log", env, *command) as product, httpx.AsyncClient(base_url=url) as api:
            await until_ready(url, product)
            await _start(api, order)
            trace_id = await _finish(api, order)
            await collector.until("RunWorkflow:OrderWorkflow", trace_id)
            # What ends the process sends what it still has.
            await product.stop()
        spans = collector.trace(trace_id)
        assert tree(spans) == WHOLE
        _check_contents(spans, order)
        _check_durations(spans)
        _check_links(collector.spans, trace_id)


@asynccontextmanager
async def _in_parts(
    folder: Path, env: dict[str, str], *, first: dict[str, str]
) -> AsyncIterator[tuple[httpx.AsyncClient, Process]]:
    """The product as processes of their own: its API, and the worker of orders, which has the environment `first`."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    async with (
        started(folder / "api", env, "app", "api", "--port", str(port)) as serving,
        started(folder / "shipping", env, "app", "worker", "shipping"),
        started(folder / "first", first, "app", "worker", "default") as worker,
        httpx.AsyncClient(base_url=url) as api,
    ):
        await until_ready(url, serving)
        yield api, worker


async def test_a_killed_worker_leaves_no_gap_and_no_double(settings: Settings, tmp_path: Path, order: str) -> None:
    with grpc_collector() as collector:
        env = environment(settings, OTEL_EXPORTER_OTLP_ENDPOINT=collector.endpoint, OTEL_EXPORTER_OTLP_PROTOCOL="grpc")
        async with _in_parts(tmp_path, env, first=env) as (api, first):
            await _start(api, order)
            trace_id = (await api.get(f"/orders/{order}")).json()["trace_id"]
            # The order waits: its attempts and their statements are there already, its workflow is not.
            await collector.until("RunActivity:validate", trace_id)
            assert "RunWorkflow:OrderWorkflow" not in {span.name for span in collector.trace(trace_id)}
            assert await first.stop(signal.SIGKILL) == -signal.SIGKILL
            async with started(tmp_path / "second", env, "app", "worker", "default"):
                assert await _finish(api, order) == trace_id
                await collector.until("RunWorkflow:OrderWorkflow", trace_id)
        spans = collector.trace(trace_id)
        assert tree(spans) == WHOLE
        _check_durations(spans)


@pytest.mark.timeout(240)
async def test_a_worker_killed_in_mid_charge_leaves_its_statements_and_a_second_attempt(
    settings: Settings, tmp_path: Path, order: str
) -> None:
    """The provider has charged, and the worker dies before it can write that down. What it was about dies with it;
    what it had sent stays, below an attempt that never ended, and the next attempt tells the rest once."""
    with grpc_collector() as collector:
        env = environment(settings, OTEL_EXPORTER_OTLP_ENDPOINT=collector.endpoint, OTEL_EXPORTER_OTLP_PROTOCOL="grpc")
        # The provider takes three seconds, in which the statements before are sent.
        broken = {"TRELLIS_FAILPOINTS": "charge.after_gateway=die", "TRELLIS_FAILPOINTS_ALLOWED": "true"}
        dying = {**env, **broken, "OTEL_BSP_SCHEDULE_DELAY": "1000"}
        async with _in_parts(tmp_path, env, first=dying) as (api, first):
            await _start(api, order, "pay-slow-1")
            (await api.post(f"/orders/{order}/signals/approve")).raise_for_status()
            assert await asyncio.wait_for(first.running.wait(), 30) == EXIT_CODE
            async with started(tmp_path / "second", env, "app", "worker", "default"):
                # The first attempt is given up after its 40 s.
                await until_step(api, order, "shipped", timeout=90)
                trace_id = (await api.get(f"/orders/{order}")).json()["trace_id"]
                await collector.until("RunWorkflow:OrderWorkflow", trace_id)
        spans = collector.trace(trace_id)
        known = {span.span_id for span in spans}
        left = [span for span in spans if span.parent_id not in known and span.name != "POST /orders/{id}/start"]
        assert [span.name for span in sorted(left, key=lambda each: each.start)] == CLAIM
        assert len({span.parent_id for span in left}) == 1
        assert {span.attributes["temporal.activity.attempt"] for span in left} == {1}
        assert tree([span for span in spans if span not in left]) == whole(
            ["RunActivity:charge #2", *CLAIM_AGAIN, *SETTLED]
        )
        assert len(known) == len(spans)
        _check_durations(spans, seconds=40)


def _check_contents(spans: list[ReceivedSpan], order: str) -> None:
    for span in spans:
        assert span.attributes["order.id"] == order, span
        assert set(span.attributes) <= ALLOWED, span
        assert span.resource["service.name"] == "trellis"
    by_name = {span.name: span for span in spans}
    request = by_name["POST /orders/{id}/start"].attributes
    assert request["http.request.method"] == "POST"
    assert request["http.route"] == "/orders/{id}/start"
    assert request["http.response.status_code"] == 202
    statement = by_name["INSERT payments"].attributes
    assert statement["db.system.name"] == "postgresql"
    assert statement["db.operation.name"] == "INSERT"
    assert statement["db.collection.name"] == "payments"
    assert "VALUES ($1, $2, 'INIT', 0, $3, $4)" in statement["db.query.text"]
    failed = [span for span in spans if span.error == "PaymentUnavailable"]
    assert [span.attributes["error.type"] for span in failed] == ["PaymentUnavailable"] * 2


def _check_durations(spans: list[ReceivedSpan], seconds: float = 3) -> None:
    """A parent lasts as long as the work it waited for."""
    workflow = next(span for span in spans if span.name == "RunWorkflow:OrderWorkflow")
    child = next(span for span in spans if span.name == "RunWorkflow:ShippingWorkflow")
    attempts = [span for span in spans if span.name == "RunActivity:charge"]
    assert workflow.seconds > seconds, "the pauses between its attempts are in it"
    assert all(workflow.start <= attempt.start and attempt.end <= workflow.end for attempt in attempts)
    assert workflow.start < child.start < child.end <= workflow.end
    assert child.seconds > 0


def _check_links(spans: list[ReceivedSpan], trace_id: str) -> None:
    """The approval is a trace of its own, with a link to the order's."""
    handled = next(span for span in spans if span.name == "HandleSignal:approve")
    assert handled.trace_id != trace_id
    assert handled.links == (trace_id,)
    assert tree([span for span in spans if span.trace_id == handled.trace_id])[0][0] == (
        "POST /orders/{id}/signals/approve"
    )


async def test_without_an_endpoint_nothing_is_traced(settings: Settings, tmp_path: Path, order: str) -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = ("uvicorn", "app.main:app", "--port", str(port), "--no-access-log")
    async with started(tmp_path / "log", environment(settings), *command) as product:
        async with httpx.AsyncClient(base_url=url) as api:
            await until_ready(url, product)
            await _start(api, order)
            assert (await api.get(f"/orders/{order}")).json()["trace_id"] is None
        await product.stop()
        lines = product.lines
    assert [line for line in lines if line["event"] == "attempt"]
    assert not [line for line in lines if "trace_id" in line]


async def test_a_collector_that_is_down_costs_a_warning(settings: Settings, tmp_path: Path, order: str) -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    env = environment(settings, OTEL_EXPORTER_OTLP_ENDPOINT=f"http://127.0.0.1:{free_port()}")
    command = ("uvicorn", "app.main:app", "--port", str(port), "--no-access-log")
    async with started(tmp_path / "log", env, *command) as product:
        async with httpx.AsyncClient(base_url=url) as api:
            await until_ready(url, product)
            await _start(api, order)
            await _finish(api, order)
        began = time.monotonic()
        await product.stop()
        assert time.monotonic() - began < 15
        noisy: list[Any] = [line for line in product.lines if line["logger"].startswith("opentelemetry")]
        levels = {line["level"] for line in product.lines}
    assert 1 <= len(noisy) < 20, noisy
    assert "critical" not in levels


async def test_the_page_of_an_order_leads_to_its_trace(pool: asyncpg.Pool) -> None:
    with pytest.raises(asyncpg.CheckViolationError):
        await pool.execute("INSERT INTO orders (id, state, trace_id) VALUES ('o', 'received', 'not a trace')")
