"""One scripted run of the product: every metric is moved and counted exactly, and nothing personal gets out.

The workflow cache is off, so that every workflow task replays its history: what is counted twice then is found.
"""

from __future__ import annotations

import asyncio
import itertools
import re
import sys
import uuid
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families
from temporalio.client import Client
from temporalio.service import RPCError, RPCStatusCode

from app.db.pool import create_pool
from app.settings import Settings
from tests.conftest import Servers
from tests.support import until_step
from tests.telemetry import Collector, Process, environment, eventually, free_port, http_collector, started, until_ready

#: In every field that a person or a customer's system fills in.
CANARY = "Quillfeather"
ADDRESS = {"line1": f"1 {CANARY} Street", "city": f"{CANARY}ville", "state": f"{CANARY}shire", "zip": "62701"}

DOCUMENT = Path(__file__).parent.parent / "docs" / "observability.md"

#: Name of the family, type, labels: the contract with dashboards and alerts.
TABLE: dict[str, tuple[str, set[str]]] = {
    "trellis_orders_started": ("counter", set()),
    "trellis_orders_closed": ("counter", {"step"}),
    "trellis_step_duration_seconds": ("histogram", {"step"}),
    "trellis_activity_attempts": ("counter", {"activity", "task_queue", "outcome"}),
    "trellis_activity_retries": ("counter", {"activity", "task_queue", "error_type"}),
    "trellis_activity_duration_seconds": ("histogram", {"activity", "outcome"}),
    "trellis_signals": ("counter", {"signal", "outcome"}),
    "trellis_payments": ("counter", {"status"}),
    "trellis_refunds": ("counter", {"outcome"}),
    "trellis_orders_open": ("gauge", {"step"}),
    "trellis_orders_oldest_age_seconds": ("gauge", {"step"}),
    "trellis_payments_unsettled_age_seconds": ("gauge", set()),
    "trellis_reviews_due": ("gauge", set()),
    "http_server_request_duration_seconds": ("histogram", {"method", "route", "status"}),
    "trellis_db_query_duration_seconds": ("histogram", {"operation"}),
    "trellis_db_pool_connections": ("gauge", {"state"}),
    "trellis_db_pool_waiters": ("gauge", set()),
    "trellis_event_streams": ("gauge", set()),
    "trellis_event_streams_refused": ("counter", {"limit"}),
    "trellis_background_failures": ("counter", {"task"}),
    "trellis_reconciled_orders": ("counter", {"outcome"}),
    "trellis_sandbox_in_use": ("gauge", {"partner"}),
}

#: What is not to happen in an orderly run, or is over at its end; tests of their own bring it about.
STILL = {
    "trellis_db_pool_waiters",
    "trellis_event_streams",
    "trellis_event_streams_refused",
    "trellis_background_failures",
    "trellis_reconciled_orders",
}


@dataclass
class Page:
    """A page of metrics, parsed by the strict parser."""

    text: str

    def __post_init__(self) -> None:
        self.families = {family.name: family for family in text_string_to_metric_families(self.text)}

    def values(self, name: str, suffix: str, *labels: str) -> dict[Any, float]:
        """What was counted, by the values of these labels; zeros are left out."""
        found: Counter[Any] = Counter()
        for sample in self.families[name].samples:
            if sample.name == name + suffix:
                key = tuple(sample.labels[label] for label in labels)
                found[key[0] if len(key) == 1 else key] += sample.value
        return {key: value for key, value in found.items() if value}


@dataclass
class Run:
    """What the scripted run left behind."""

    settings: Settings
    process: Process
    collector: Collector
    api: httpx.AsyncClient
    metrics_url: str
    requests: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    orders: dict[str, str] = field(default_factory=dict)
    #: What an audit in between, which asks the provider for payments by their ids, said on standard error.
    audit_log: str = ""
    after_script: Page = field(default_factory=lambda: Page("# EOF\n"))
    at_the_end: Page = field(default_factory=lambda: Page("# EOF\n"))

    async def page(self) -> Page:
        async with httpx.AsyncClient() as client:
            accept = {"accept": "application/openmetrics-text; version=1.0.0"}
            return Page((await client.get(f"{self.metrics_url}/metrics", headers=accept)).text)

    async def start(self, name: str, payment: str, **more: Any) -> str:
        order_id = self.orders[name] = f"{name}-{uuid.uuid4().hex[:8]}"
        body = {"payment_id": f"{payment}-{CANARY}-{name}", "customer_id": CANARY, "review_timeout_seconds": 600}
        (await self.api.post(f"/orders/{order_id}/start", json=body | more)).raise_for_status()
        return order_id

    async def signal(self, order_id: str, signal: str, status: int = 202, json: Any = None) -> None:
        answer = await self.api.post(f"/orders/{order_id}/signals/{signal}", json=json)
        assert answer.status_code == status, answer.text

    async def review(self, order_id: str, decision: str) -> None:
        body = {"decision": decision, "note": f"says {CANARY}"}
        (await self.api.post(f"/orders/{order_id}/review", json=body)).raise_for_status()

    async def until(self, order_id: str, *steps: str) -> None:
        await until_step(self.api, order_id, *steps, timeout=40)


@pytest.fixture(scope="module")
async def run(servers: Servers, shared_database: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Run]:
    unique, metrics_port, port = uuid.uuid4().hex[:8], free_port(), free_port()
    settings = Settings(
        database_url=shared_database,
        temporal_address=servers.temporal_address,
        sandbox=True,
        order_task_queue=f"orders-{unique}",
        shipping_task_queue=f"shipping-{unique}",
        graceful_shutdown_timeout=5,
        dispatch_attempts=2,
        max_cached_workflows=0,
        local_steps=False,
        metrics_port=metrics_port,
    )
    url, metrics_url = f"http://127.0.0.1:{port}", f"http://127.0.0.1:{metrics_port}"
    with http_collector() as collector:
        env = environment(settings, OTEL_EXPORTER_OTLP_ENDPOINT=collector.endpoint)
        log = tmp_path_factory.mktemp("script") / "log"
        command = ("uvicorn", "app.main:app", "--port", str(port), "--no-access-log")
        async with started(log, env, *command) as process:
            await until_ready(metrics_url, process)
            requests: Counter[tuple[str, str, str]] = Counter()
            async with httpx.AsyncClient(base_url=url, timeout=30, event_hooks=_counting(requests)) as api:
                whole = Run(settings, process, collector, api, metrics_url, requests)
                await _script(whole)
                whole.after_script = await whole.page()
                whole.audit_log = await _audit(env)
                await _stuck(whole)
                whole.at_the_end = await whole.page()
            await process.stop()
        yield whole


def _counting(requests: Counter[tuple[str, str, str]]) -> dict[str, Any]:
    async def count(response: httpx.Response) -> None:
        route = re.sub(r"^/orders/[^/]+", "/orders/{id}", response.request.url.path)
        requests[response.request.method, route, str(response.status_code)] += 1

    return {"response": [count]}


async def _audit(env: dict[str, str]) -> str:
    command = ("audit", "--partners", "lookup", "--no-temporal")
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "app", *command, env=env | {"TRELLIS_METRICS_PORT": "0"}, stderr=asyncio.subprocess.PIPE
    )
    _, said = await process.communicate()
    assert process.returncode == 0, said.decode()
    return said.decode()


async def _script(run: Run) -> None:
    shipped = await run.start("shipped", "pay-flaky", address=ADDRESS)
    await run.until(shipped, "awaiting_review")
    await run.signal(shipped, "address", json=ADDRESS | {"line1": f"2 {CANARY} Street"})
    client = await Client.connect(run.settings.temporal_address)
    await client.get_workflow_handle(f"order/{shipped}").signal("address", {"line1": CANARY})
    await run.signal(shipped, "approve")
    await run.until(shipped, "charging")
    await run.signal(shipped, "approve")

    declined = await run.start("declined", "pay-decline")
    await run.until(declined, "awaiting_review")
    await run.review(declined, "approve")

    cancelled = await run.start("cancelled", "pay")
    await run.until(cancelled, "awaiting_review")
    await run.signal(cancelled, "cancel")

    expired = await run.start("expired", "pay", review_timeout_seconds=1)

    rejected = await run.start("rejected", "pay")
    await run.until(rejected, "awaiting_review")
    await run.review(rejected, "reject")

    refunded = await run.start("refunded", "pay", address=ADDRESS | {"zip": "00002"})
    await run.signal(refunded, "approve")

    slow = await run.start("slow", "pay", address=ADDRESS | {"zip": "00003"})
    await run.signal(slow, "approve")
    await _until_dispatching(run, slow)
    await run.signal(slow, "address", json=ADDRESS)
    await client.get_workflow_handle(f"shipping/{slow}").signal("address", ADDRESS)

    await run.until(declined, "payment_failed")
    await run.until(cancelled, "cancelled")
    await run.until(expired, "expired")
    await run.until(rejected, "rejected")
    await run.until(refunded, "shipping_failed")
    await run.until(shipped, "shipped")
    await run.until(slow, "shipped")
    await run.signal(shipped, "approve", 409)
    await run.signal(cancelled, "cancel", 409)
    taken = await run.api.post("/orders/conflict/start", json={"payment_id": f"pay-{CANARY}-slow"})
    assert taken.status_code == 409
    await run.api.get("/orders/nobody/status")
    await run.api.get("/nowhere")


async def _until_dispatching(run: Run, order_id: str) -> None:
    async with create_pool(run.settings) as pool:
        query = "SELECT dispatch_started_at IS NOT NULL FROM orders WHERE id = $1"
        await eventually(lambda: pool.fetchval(query, order_id), 30)


async def _stuck(run: Run) -> None:
    """A payment in doubt, a refund that the provider refuses because its books have lost the charge, and a review that
    has waited for an hour and has ten minutes left."""
    due = await run.start("due", "pay")
    doubtful = await run.start("doubtful", "pay-down")
    await run.signal(doubtful, "approve")
    lost = await run.start("lost", "pay", address=ADDRESS | {"zip": "00005"})
    await run.signal(lost, "approve")
    await run.until(lost, "prepared")
    await run.until(due, "awaiting_review")
    async with create_pool(run.settings) as pool:
        await pool.execute("UPDATE orders SET state_since = state_since - interval '1 hour' WHERE id = $1", due)
        await pool.execute("DELETE FROM sandbox.charges WHERE payment LIKE '%-lost'")
        failing = "SELECT count(*) > 0 FROM events WHERE order_id = $1 AND payload_json ->> 'error_type' = $2"
        await eventually(lambda: pool.fetchval(failing, lost, "RefundRefused"), 40)
        await eventually(lambda: pool.fetchval(failing, doubtful, "PaymentUnavailable"), 40)

    # The gauges are read every five seconds.
    async def shown() -> bool:
        page = await run.page()
        return all(page.values(name, "") for name in ("trellis_payments_unsettled_age_seconds", "trellis_reviews_due"))

    await eventually(shown)


# --- metrics


def test_names_types_and_labels_are_the_tables(run: Run) -> None:
    ours = {
        name: family
        for name, family in run.at_the_end.families.items()
        if not name.startswith(("temporal_", "process_"))
    }
    assert set(ours) == set(TABLE)
    for name, (kind, labels) in TABLE.items():
        assert ours[name].type == kind, name
        assert {frozenset(sample.labels) - {"le"} for sample in ours[name].samples} == {frozenset(labels)}, name


def test_what_is_documented_exists_and_moves(run: Run) -> None:
    documented = set(re.findall(r"^\| `((?:trellis|http)_\w+)[`{]", DOCUMENT.read_text(), re.MULTILINE))
    assert {name.removesuffix("_total") for name in documented} == set(TABLE)
    for name in set(TABLE) - STILL:
        assert any(sample.value for sample in run.at_the_end.families[name].samples), name


def test_orders_are_counted_exactly(run: Run) -> None:
    page = run.after_script
    assert page.values("trellis_orders_started", "_total") == {(): 7}
    assert page.values("trellis_orders_closed", "_total", "step") == {
        "shipped": 2,
        "payment_failed": 1,
        "cancelled": 1,
        "expired": 1,
        "rejected": 1,
        "shipping_failed": 1,
    }
    assert page.values("trellis_step_duration_seconds", "_count", "step") == {
        "received": 7,
        "awaiting_review": 7,
        "charging": 4,
        "charged": 3,
        "prepared": 3,
    }
    seconds = page.values("trellis_step_duration_seconds", "_sum", "step")
    assert seconds["charging"] > 3, "the order with two failed charges waited 1 s and 2 s"
    assert page.values("trellis_payments", "_total", "status") == {
        "INIT": 4,
        "CHARGED": 3,
        "FAILED": 1,
        "REFUNDED": 1,
    }
    assert page.values("trellis_refunds", "_total", "outcome") == {"succeeded": 1}
    assert page.values("trellis_signals", "_total", "signal", "outcome") == {
        ("approve", "accepted"): 3,
        ("approve", "ignored"): 1,
        ("approve", "refused"): 1,
        ("cancel", "accepted"): 1,
        ("cancel", "refused"): 1,
        ("address", "accepted"): 1,
        ("address", "ignored"): 1,
        ("address", "refused"): 1,
    }


ATTEMPTS = {
    ("receive", "success"): 7,
    ("validate", "success"): 7,
    ("close", "success"): 3,
    ("charge", "success"): 3,
    ("charge", "retry"): 2,
    ("charge", "failure"): 1,
    ("note", "success"): 2,
    ("change_address", "success"): 2,
    ("prepare", "success"): 3,
    ("dispatch", "success"): 2,
    ("dispatch", "failure"): 1,
    ("recall", "success"): 1,
    ("refund", "success"): 1,
}


def test_attempts_are_counted_exactly(run: Run) -> None:
    page, settings = run.after_script, run.settings
    assert page.values("trellis_activity_attempts", "_total", "activity", "outcome") == ATTEMPTS
    assert page.values("trellis_activity_duration_seconds", "_count", "activity", "outcome") == ATTEMPTS
    labels = ("activity", "task_queue", "error_type")
    assert page.values("trellis_activity_retries", "_total", *labels) == {
        ("charge", settings.order_task_queue, "PaymentUnavailable"): 2
    }
    queues = page.values("trellis_activity_attempts", "_total", "activity", "task_queue")
    assert queues["dispatch", settings.shipping_task_queue] == 3


def test_requests_and_statements_are_counted(run: Run) -> None:
    page = run.at_the_end
    assert page.values("http_server_request_duration_seconds", "_count", "method", "route", "status") == {
        (method, "unknown" if route == "/nowhere" else route, status): count
        for (method, route, status), count in run.requests.items()
    }
    operations = run.after_script.values("trellis_db_query_duration_seconds", "_count", "operation")
    assert operations["INSERT orders"] == 7
    assert operations["BEGIN"] == operations["COMMIT"] + operations.get("ROLLBACK", 0)
    assert "OTHER" not in operations


def test_what_is_stuck_shows(run: Run) -> None:
    page = run.at_the_end
    assert page.values("trellis_orders_open", "", "step") == {"awaiting_review": 1, "charging": 1, "prepared": 1}
    oldest = page.values("trellis_orders_oldest_age_seconds", "", "step")
    assert oldest.keys() == {"awaiting_review", "charging", "prepared"}
    assert page.values("trellis_reviews_due", "") == {(): 1}
    assert page.values("trellis_payments_unsettled_age_seconds", "")[()] > 0
    assert page.values("trellis_refunds", "_total", "outcome")["refused"] >= 1


def test_the_sdks_metrics_are_on_the_same_page(run: Run) -> None:
    families = run.at_the_end.families
    assert families["temporal_activity_execution_failed"].type == "counter"
    assert families["temporal_workflow_completed"].type == "counter"
    assert families["temporal_activity_schedule_to_start_latency_seconds"].type == "histogram"
    assert families["temporal_num_pollers"].type == "gauge"


def test_exemplars_lead_to_traces(run: Run) -> None:
    traces = {span.trace_id for span in run.collector.spans}
    exemplars = {
        (family.name, sample.exemplar.labels["trace_id"])
        for family in run.at_the_end.families.values()
        for sample in family.samples
        if sample.exemplar
    }
    assert {name for name, _ in exemplars} >= {
        "trellis_step_duration_seconds",
        "trellis_activity_duration_seconds",
        "http_server_request_duration_seconds",
        "trellis_db_query_duration_seconds",
    }
    assert {trace_id for _, trace_id in exemplars} <= traces


# --- logs


def test_one_line_per_attempt_and_per_request(run: Run) -> None:
    lines = run.process.lines
    attempts = [line for line in lines if line["event"] == "attempt"]
    scripted = {run.orders[name] for name in run.orders if name not in {"due", "doubtful", "lost"}}
    counted = Counter((line["activity"], line["outcome"]) for line in attempts if line["order_id"] in scripted)
    assert counted == Counter(ATTEMPTS)
    for line in attempts:
        expected = {"trace_id", "span_id", "order_id", "workflow_id", "run_id", "attempt", "task_queue"}
        assert expected <= set(line), line
        assert line["workflow_id"] in {f"order/{line['order_id']}", f"shipping/{line['order_id']}"}
        assert ("error_type" in line) == (line["outcome"] != "success")
    requests = [line for line in lines if line["event"] == "request"]
    assert len(requests) == run.requests.total()
    assert all({"trace_id", "span_id", "method", "route", "status"} <= set(line) for line in requests)
    of_orders = [line for line in requests if "{id}" in line["route"]]
    assert all(line["order_id"] for line in of_orders)


# --- what must not get out


def test_nothing_personal_gets_out(run: Run) -> None:
    assert CANARY not in run.process.log.read_text()
    assert CANARY not in run.audit_log
    assert CANARY not in run.at_the_end.text
    assert run.collector.bodies
    assert not [body for body in run.collector.bodies if CANARY.encode() in body]


def test_what_could_have_told_it_was_there(run: Run) -> None:
    """The shipment was told an address, and the partners payment ids and addresses: nothing got out of that, either."""
    spans = Counter(span.name for span in run.collector.spans)
    for name in (
        *("RunWorkflow:OrderWorkflow", "RunWorkflow:ShippingWorkflow", "HandleSignal:address"),
        *("POST /v1/charges", "POST /v1/refunds", "POST /v1/parcels", "POST /v1/parcels/{id}/recall"),
        "GET /v1/charges/{id}",
    ):
        assert spans[name], f"no {name} in {sorted(spans)}"
    handled = {
        span.attributes["temporalWorkflowID"] for span in run.collector.spans if span.name == "HandleSignal:address"
    }
    assert {workflow.partition("/")[0] for workflow in handled} == {"order", "shipping"}
    activities = {line["activity"] for line in run.process.lines if line["event"] == "attempt"}
    assert activities >= {"charge", "refund", "dispatch", "recall", "change_address"}


async def test_nothing_personal_is_searchable_in_temporal(run: Run) -> None:
    client = await Client.connect(run.settings.temporal_address)
    shipments = 0
    for kind, order_id in itertools.product(("order", "shipping"), run.orders.values()):
        try:
            description = await client.get_workflow_handle(f"{kind}/{order_id}").describe()
        except RPCError as error:
            if (kind, error.status) != ("shipping", RPCStatusCode.NOT_FOUND):
                raise
            continue  # it never came to a shipment
        shipments += kind == "shipping"
        said = (description.typed_search_attributes, await description.memo(), await description.static_summary())
        assert CANARY not in f"{description.id} {said} {await description.static_details()}"
    assert shipments >= 4
