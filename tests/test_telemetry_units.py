"""The parts of telemetry that need no process: what is let out of a log line and of a span, and what is not."""

from __future__ import annotations

import io
import json
import logging
from typing import Any

import httpx
import pytest
import structlog
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from app.api import CanonicalLog
from app.errors import PaymentUnavailable, TrellisError
from app.settings import Settings
from app.telemetry import logs, metrics, traces
from app.telemetry.spans import line
from app.temporal.interceptors import translate

SECRET = "Quillfeather"


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What is logged from here on, as the product formats it."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    output = io.StringIO()
    monkeypatch.setattr("sys.stderr", output)
    logs.configure_logging(Settings(log_format="json"))
    structlog.configure(cache_logger_on_first_use=False)
    yield output
    root.handlers[:] = handlers
    root.setLevel(level)


def _only(output: io.StringIO) -> dict[str, object]:
    (text,) = output.getvalue().splitlines()
    parsed: dict[str, object] = json.loads(text)
    return parsed


def test_personal_data_are_redacted_at_any_depth(logged: io.StringIO) -> None:
    structlog.get_logger("x").info(
        "told", order_id="o-1", note=SECRET, request={"Address": {"line1": SECRET}, "items": [{"city": SECRET}]}
    )
    found = _only(logged)
    assert found["note"] == "[redacted]"
    assert found["request"] == {"Address": "[redacted]", "items": [{"city": "[redacted]"}]}
    assert found["order_id"] == "o-1"


def test_an_object_is_named_and_not_printed(logged: io.StringIO) -> None:
    structlog.get_logger("x").info("told", what=httpx.URL(f"http://x/?q={SECRET}"), error=ValueError(SECRET))
    found = _only(logged)
    assert (found["what"], found["error"]) == ("<URL>", "<ValueError>")


def _fail() -> None:
    try:
        {}[SECRET]
    except KeyError as error:
        raise PaymentUnavailable(SECRET) from error


@pytest.mark.parametrize("name", ["asyncpg", "uvicorn.error", "temporalio.worker", "trellis"])
def test_a_stack_has_places_and_kinds_without_messages(logged: io.StringIO, name: str) -> None:
    try:
        _fail()
    except TrellisError:
        logging.getLogger(name).exception("it failed")
    found = _only(logged)
    assert SECRET not in logged.getvalue()
    assert "app.errors.PaymentUnavailable: The payment provider did not answer" in str(found["exception"])
    assert "KeyError" in str(found["exception"])
    assert f"{__file__}:" in str(found["exception"])


def test_a_stack_that_is_text_already(logged: io.StringIO) -> None:
    stack = (
        f'Traceback (most recent call last):\n  File "a.py", line 1, in f\n    f("{SECRET}")\nValueError: {SECRET}\n'
    )
    logging.getLogger("uvicorn.error").error(stack)
    assert _only(logged)["exception"] == '  File "a.py", line 1, in f\nValueError'


def test_the_sdks_facts_become_fields(logged: io.StringIO) -> None:
    extra = {"temporal_workflow": {"workflow_id": "order/o-1", "run_id": "r", "attempt": 1}}
    logging.getLogger("temporalio.workflow").warning("hm", extra=extra)
    found = _only(logged)
    assert (found["workflow_id"], found["run_id"]) == ("order/o-1", "r")
    assert "temporal_workflow" not in found


def test_a_span_keeps_what_is_allowed_and_an_error_its_type() -> None:
    kept = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(traces.Redacting(kept)))
    tracer = provider.get_tracer("test")
    span = tracer.start_span("x", kind=SpanKind.SERVER)
    span.set_attributes({"order.id": "o-1", "url.query": SECRET, "url.full": SECRET, "error.type": "ValueError"})
    span.record_exception(ValueError(SECRET))
    span.set_status(StatusCode.ERROR, SECRET)
    span.end()
    (cleaned,) = kept.get_finished_spans()
    assert SECRET not in cleaned.to_json()
    assert cleaned.attributes == {"order.id": "o-1", "error.type": "ValueError"}
    assert cleaned.status.description == "ValueError"
    assert [dict(event.attributes or {}) for event in cleaned.events] == [{"exception.type": "ValueError"}]


def test_a_statement_without_a_story_is_left_out() -> None:
    kept = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(traces.Redacting(kept)))
    tracer = provider.get_tracer("test")
    with tracer.start_as_current_span("probe", attributes={"db.query.text": "SELECT 1"}):
        pass
    with tracer.start_as_current_span("request"):
        for query in ("SELECT 1", "SELECT pg_advisory_unlock_all();\nCLOSE ALL;"):
            tracer.start_span(query, attributes={"db.query.text": query}).end()
    assert [span.name for span in kept.get_finished_spans()] == ["SELECT 1", "request"]


def test_a_span_is_a_line() -> None:
    span = ReadableSpan(
        "UPDATE orders", attributes={"order.id": "o-1"}, start_time=1_500_000_000, end_time=1_502_000_000
    )
    assert line(span).split() == ["00:00:01.500", "2.0", "ms", "UPDATE", "orders", "order.id=o-1", "root"]


@pytest.mark.parametrize(
    ("query", "operation"),
    [
        ("UPDATE orders SET x = 1", "UPDATE orders"),
        ("\nINSERT INTO payments (a) VALUES ($1)\nON CONFLICT DO NOTHING", "INSERT payments"),
        ("INSERT INTO kept (a) VALUES ($1) ON CONFLICT (a) DO UPDATE SET a = 1", "INSERT kept"),
        ("WITH was AS (SELECT id FROM orders FOR NO KEY UPDATE), m AS (UPDATE orders SET x=1) SELECT", "UPDATE orders"),
        ("SELECT a FROM payments JOIN orders ON true FOR NO KEY UPDATE OF payments", "SELECT payments"),
        ("SELECT EXISTS (SELECT FROM events WHERE true)", "SELECT events"),
        ("BEGIN;", "BEGIN"),
        ("COMMIT;", "COMMIT"),
        ("SELECT 1", "SELECT"),
        ("SELECT pg_advisory_unlock_all();\nCLOSE ALL;", "RESET"),
        ("LISTEN x", "OTHER"),
        ("", "OTHER"),
    ],
)
def test_a_statement_is_named_by_what_it_does(query: str, operation: str) -> None:
    assert metrics.operation(query) == operation


def test_error_types_are_a_closed_set() -> None:
    class Surprising(Exception):
        pass

    assert metrics.closed_error_type(translate(PaymentUnavailable("x")).type or "") == "PaymentUnavailable"
    assert metrics.closed_error_type(translate(ConnectionRefusedError()).type or "") == "DatabaseUnavailable"
    assert metrics.closed_error_type(translate(Surprising("x")).type or "") == "Unexpected"


# --- requests


async def test_a_request_begins_without_the_context_of_the_one_before() -> None:
    """Sent on one connection before the answer to the first has come, the second begins in the first one's task."""
    began_with = []

    async def application(*_: object) -> None:
        began_with.append(structlog.contextvars.get_contextvars())
        structlog.contextvars.bind_contextvars(order_id="o-1")

    served = CanonicalLog(application)
    for _ in range(2):
        await served({"type": "http", "path": "/orders", "method": "GET"}, _nothing, _nothing)
    assert began_with == [{}, {}]


async def _nothing(*_: object) -> Any:
    raise AssertionError("nobody reads or answers")
