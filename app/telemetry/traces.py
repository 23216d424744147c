"""Traces: off without an OTLP endpoint, and then without cost. Everything else is configured by `OTEL_*` variables.

What leaves the process passes `Redacting`, which knows the attributes that may: an address, a query parameter or
a payload cannot get out because a library begins to record it.
"""

from __future__ import annotations

import asyncio
import os
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import IO, TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

import structlog
from opentelemetry import trace
from opentelemetry.sdk.trace import Event, ReadableSpan, SpanProcessor
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.trace import Status, StatusCode

from app.telemetry.metrics import KNOWN_METHODS, POOL_RESET, operation

if TYPE_CHECKING:
    import httpx
    from fastapi import FastAPI
    from opentelemetry.context import Context
    from opentelemetry.instrumentation.httpx import RequestInfo
    from opentelemetry.sdk.trace import Span
    from starlette.types import ASGIApp, Scope
    from temporalio.contrib.opentelemetry import ReplaySafeTracerProvider
    from temporalio.plugin import SimplePlugin

#: Attributes that may leave the process, beside those of the resource.
ALLOWED: Final = frozenset(
    {
        *("order.id", "temporal.activity.attempt", "temporalWorkflowID", "temporalRunID", "temporalActivityID"),
        *("temporalUpdateID", "error.type", "exception.type"),
        *("http.request.method", "http.response.status_code", "http.route", "http.request.resend_count"),
        *(
            "url.scheme",
            "url.template",
            "server.address",
            "server.port",
            "network.protocol.version",
            "network.transport",
        ),
        *("db.system.name", "db.namespace", "db.query.text", "db.query.summary", "db.operation.name"),
        "db.collection.name",
    }
)

#: A partner's path from its version on, and what stands for an id in it.
_PARTNER_PATH: Final = re.compile(r"/v1/.*")
_PARTNER_ID: Final = re.compile(r"^(/v1/[a-z]+/)[^/]+")

_READING_DELAY_MS: Final = 500
#: Seconds for the last spans to leave; a collector that is down must not hold up the end of a process.
_FLUSH_SECONDS: Final = 3.0

log = structlog.get_logger(__name__)

_provider: ReplaySafeTracerProvider | None = None
_shared: ContextVar[Mapping[str, str | int] | None] = ContextVar("span_attributes", default=None)


def configure_tracing(output: IO[str] | None = None) -> bool:
    """Set up traces for this process, once, before anything that is to be traced is built; whether they are on.

    Args:
        output: where to write spans for people to read, besides a collector.
    """
    global _provider  # noqa: PLW0603 - OpenTelemetry's provider is the process's as well
    exporters = _exporters(output)
    if _provider is not None or not exporters:
        return _provider is not None
    # Read by the instrumentations when they are set up.
    os.environ.setdefault("OTEL_SEMCONV_STABILITY_OPT_IN", "http,database")
    os.environ.setdefault("OTEL_SERVICE_NAME", "trellis")
    from opentelemetry.instrumentation.asyncpg import AsyncPGInstrumentor
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from temporalio.contrib.opentelemetry import create_tracer_provider

    # The sampler is that of OTEL_TRACES_SAMPLER; without it, everything whose parent was not left out.
    provider = create_tracer_provider(shutdown_on_exit=False)
    # The plugin asks for its tracer once per span, and each would be a new one.
    provider.get_tracer = cache(provider.get_tracer)  # type: ignore[method-assign]
    provider.add_span_processor(_Describe())
    for exporter in exporters:
        # People read along; a collector is sent batches as the standard variables say.
        delay = None if output is None else _READING_DELAY_MS
        provider.add_span_processor(BatchSpanProcessor(Redacting(exporter), schedule_delay_millis=delay))
    trace.set_tracer_provider(provider)
    AsyncPGInstrumentor().instrument(  # type: ignore[no-untyped-call]
        tracer_provider=provider
    )
    _provider = provider
    return True


def _exporters(output: IO[str] | None) -> list[SpanExporter]:
    exporters: list[SpanExporter] = []
    disabled = os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true"
    endpoint = os.environ.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT") or os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT")
    if endpoint and not disabled and os.environ.get("OTEL_TRACES_EXPORTER", "otlp") != "none":
        exporters.append(_otlp(endpoint))
    if output is not None:
        from app.telemetry.spans import ReadableExporter

        exporters.append(ReadableExporter(output))
    return exporters


def _otlp(endpoint: str) -> SpanExporter:
    protocol = os.environ.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL") or os.environ.get("OTEL_EXPORTER_OTLP_PROTOCOL")
    if protocol is None:
        # The port of gRPC is as good as a word.
        protocol = "grpc" if urlsplit(endpoint).port == 4317 else "http/protobuf"
    if protocol == "grpc":
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as GrpcExporter

        return GrpcExporter()
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as HttpExporter

    return HttpExporter()


def temporal_plugins() -> list[SimplePlugin]:
    """What the Temporal client needs so that its calls and its workers' work are traced."""
    if _provider is None:
        return []
    from temporalio.contrib.opentelemetry import OpenTelemetryPlugin

    return [OpenTelemetryPlugin(add_temporal_spans=True)]


def instrument_api(app: FastAPI) -> None:
    """Trace the requests of an application, but for the probes."""
    if _provider is None:
        return
    from opentelemetry.instrumentation.asgi import OpenTelemetryMiddleware

    build, provider = app.build_middleware_stack, _provider

    def build_traced() -> ASGIApp:
        # Around everything, so that an unexpected error and the answer to it are the request's. FastAPI's own
        # instrumentation does the same, and looks for the route of each request a second time.
        return OpenTelemetryMiddleware(
            build(),
            excluded_urls="healthz,readyz",
            default_span_details=lambda scope: (_method(scope), {}),
            tracer_provider=provider,
            exclude_spans=["send", "receive"],
        )

    app.build_middleware_stack = build_traced  # type: ignore[method-assign]


def name_request(scope: Scope) -> None:
    """Name the current span, that of a request, after its route, once that is found; before the answer has ended."""
    route = getattr(scope.get("route"), "path", None)
    if _provider is not None and route is not None:
        span = trace.get_current_span()
        span.update_name(f"{_method(scope)} {route}")
        span.set_attribute("http.route", route)


def _method(scope: Scope) -> str:
    # In the name of a span, "HTTP" stands for a method that nobody knows.
    method = scope.get("method")
    return method if method in KNOWN_METHODS else "HTTP"


def instrument_client(client: httpx.AsyncClient) -> None:
    """Trace the calls of a client, also of one that calls an application in this process."""
    if _provider is None:
        return
    from opentelemetry.instrumentation.httpx import HTTPXClientInstrumentor

    HTTPXClientInstrumentor.instrument_client(client, tracer_provider=_provider, request_hook=_name_partner_call)


async def _name_partner_call(span: trace.Span, request: RequestInfo) -> None:
    path = _PARTNER_PATH.search(str(getattr(request.url, "path", "")))
    if path:
        template = _PARTNER_ID.sub(r"\1{id}", path[0])
        span.update_name(f"{request.method.decode()} {template}")
        span.set_attribute("url.template", template)


async def flush() -> None:
    """Let the spans that have ended leave, for a few seconds at most."""
    if _provider is None:
        return
    # A thread that nobody waits for at the end of the process, unlike those of `asyncio.to_thread`.
    flushing = threading.Thread(target=_provider.force_flush, daemon=True)
    flushing.start()
    await asyncio.to_thread(flushing.join, _FLUSH_SECONDS)
    if flushing.is_alive():
        log.warning("the collector of traces does not answer; the last spans are lost")


def trace_id() -> str | None:
    """The current trace in hexadecimal digits; None when there is none or it is not kept."""
    context = trace.get_current_span().get_span_context()
    return f"{context.trace_id:032x}" if context.trace_flags.sampled else None


@contextmanager
def attributes(**values: str | int) -> Iterator[None]:
    """Give these attributes to the current span and to those begun in the block; `order_id` is `order.id`."""
    token = _shared.set(_shared.get())
    describe(**values)
    try:
        yield
    finally:
        _shared.reset(token)


def describe(**values: str | int) -> None:
    """The same for as long as the current context lasts."""
    if _provider is not None:
        named = {key.replace("_", "."): value for key, value in values.items()}
        _shared.set({**(_shared.get() or {}), **named})
        trace.get_current_span().set_attributes(named)


def forget() -> None:
    """Begin anew: what `describe` said before is not of what comes now."""
    _shared.set(None)


def failed(error_type: str) -> None:
    """Give the current span its error, by type."""
    trace.get_current_span().set_attribute("error.type", error_type)


class _Describe(SpanProcessor):
    """Completes spans when they begin: the order they are of, and a name for a statement that tells something."""

    def on_start(self, span: Span, parent_context: Context | None = None) -> None:  # noqa: ARG002 - the SDK's
        known = span.attributes or {}
        more = dict(_shared.get() or {})
        workflow = known.get("temporalWorkflowID")
        if isinstance(workflow, str):
            # `order/<id>` and `shipping/<id>`.
            more["order.id"] = workflow.partition("/")[2]
        query = known.get("db.query.text")
        if isinstance(query, str):
            summary = operation(query)
            verb, _, table = summary.partition(" ")
            span.update_name(summary)
            more |= {"db.query.summary": summary, "db.operation.name": verb}
            if table:
                more["db.collection.name"] = table
        # At once, since each call takes the span's lock and copies what it is given.
        span.set_attributes(more)


class Redacting(SpanExporter):
    """Passes on spans with the attributes that are `ALLOWED`, and errors by type only: their messages and stacks
    quote what they choked on."""

    def __init__(self, exporter: SpanExporter) -> None:
        self._exporter = exporter

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Called in a thread of its own, so that no request waits for it."""
        return self._exporter.export([_clean(span) for span in spans if not _is_housekeeping(span)])

    def shutdown(self) -> None:
        """Part of the interface."""
        self._exporter.shutdown()

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        """Part of the interface."""
        return self._exporter.force_flush(timeout_millis)


def _is_housekeeping(span: ReadableSpan) -> bool:
    """Statements that are no part of a story: the pool's, and those of probes and waits, which have no parent."""
    query = (span.attributes or {}).get("db.query.text")
    return isinstance(query, str) and (span.parent is None or query.startswith(POOL_RESET))


def _clean(span: ReadableSpan) -> ReadableSpan:
    status = span.status
    has_failed = status.status_code is StatusCode.ERROR
    if not has_failed and not span.events and ALLOWED.issuperset(span.attributes or ()):
        return span
    if has_failed:
        status = Status(StatusCode.ERROR, str((span.attributes or {}).get("error.type", "")) or None)
    return ReadableSpan(
        name=span.name,
        context=span.context,
        parent=span.parent,
        resource=span.resource,
        attributes=_allowed(span.attributes),
        events=[Event(event.name, _allowed(event.attributes), event.timestamp) for event in span.events],
        links=span.links,
        kind=span.kind,
        status=status,
        start_time=span.start_time,
        end_time=span.end_time,
        instrumentation_scope=span.instrumentation_scope,
    )


def _allowed(attributes: Mapping[str, Any] | None) -> dict[str, Any]:
    return {key: value for key, value in (attributes or {}).items() if key in ALLOWED}
