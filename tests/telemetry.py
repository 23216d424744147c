"""What the tests of telemetry share: the product as processes, and a collector that keeps what it is sent."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import grpc
import httpx
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)

from app.settings import Settings, variable


async def eventually(check: Callable[[], bool | Awaitable[bool]], seconds: float = 20.0) -> None:
    """Return when it is so; fails when it is not so in time."""
    async with asyncio.timeout(seconds):
        while True:
            so = check()
            if so if isinstance(so, bool) else await so:
                return
            await asyncio.sleep(0.05)


ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class ReceivedSpan:
    """A span as it came over the wire."""

    name: str
    trace_id: str
    span_id: str
    parent_id: str
    start: int
    end: int
    attributes: dict[str, Any]
    links: tuple[str, ...]
    error: str | None
    resource: dict[str, Any]

    @property
    def seconds(self) -> float:
        return (self.end - self.start) / 1e9


@dataclass
class Collector:
    """What an OTLP receiver was sent."""

    endpoint: str = ""
    bodies: list[bytes] = field(default_factory=list)

    @property
    def spans(self) -> list[ReceivedSpan]:
        spans = []
        for body in list(self.bodies):
            for of_resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                resource = _attributes(of_resource.resource.attributes)
                for of_scope in of_resource.scope_spans:
                    spans += [_received(span, resource) for span in of_scope.spans]
        return spans

    def trace(self, trace_id: str) -> list[ReceivedSpan]:
        return [span for span in self.spans if span.trace_id == trace_id]

    async def until(self, name: str, trace_id: str, seconds: float = 15.0) -> list[ReceivedSpan]:
        """The trace, as soon as it has a span of this name."""
        await eventually(lambda: any(span.name == name for span in self.trace(trace_id)), seconds)
        return self.trace(trace_id)


def _received(span: Any, resource: dict[str, Any]) -> ReceivedSpan:
    return ReceivedSpan(
        name=span.name,
        trace_id=span.trace_id.hex(),
        span_id=span.span_id.hex(),
        parent_id=span.parent_span_id.hex(),
        start=span.start_time_unix_nano,
        end=span.end_time_unix_nano,
        attributes=_attributes(span.attributes),
        links=tuple(link.trace_id.hex() for link in span.links),
        error=span.status.message if span.status.code == 2 else None,
        resource=resource,
    )


def _attributes(attributes: Any) -> dict[str, Any]:
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in attributes}


@contextmanager
def grpc_collector() -> Iterator[Collector]:
    """An OTLP receiver over gRPC."""
    collector = Collector()

    class Service(trace_service_pb2_grpc.TraceServiceServicer):
        def Export(self, request: Any, _context: Any) -> Any:  # noqa: N802 - the protocol's name
            collector.bodies.append(request.SerializeToString())
            return ExportTraceServiceResponse()

    server = grpc.server(ThreadPoolExecutor(2))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(Service(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    collector.endpoint = f"http://127.0.0.1:{port}"
    server.start()
    try:
        yield collector
    finally:
        server.stop(None)


@contextmanager
def http_collector() -> Iterator[Collector]:
    """An OTLP receiver over HTTP."""
    collector = Collector()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            collector.bodies.append(self.rfile.read(int(self.headers["content-length"])))
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    collector.endpoint = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield collector
    finally:
        server.shutdown()


def tree(spans: list[ReceivedSpan]) -> list[Any]:
    """The spans of one trace as nested lists, `[name, children...]`, siblings in the order in which they began.

    An attempt's number is behind its name, and an error's type behind both.
    """
    children: dict[str, list[ReceivedSpan]] = {}
    for span in sorted(spans, key=lambda each: each.start):
        children.setdefault(span.parent_id, []).append(span)
    known = {span.span_id for span in spans}
    roots = [span for span in spans if span.parent_id not in known]
    assert len(roots) == 1, [(span.name, span.parent_id) for span in roots]

    def node(span: ReceivedSpan) -> Any:
        name = span.name
        if name.startswith("RunActivity:"):
            name += f" #{span.attributes['temporal.activity.attempt']}"
        if span.error is not None:
            name += f" !{span.error}"
        below = [node(child) for child in children.get(span.span_id, [])]
        return [name, *below] if below else name

    return [node(root) for root in roots]


# --- processes


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def environment(settings: Settings, **more: str) -> dict[str, str]:
    """The environment of a process with these settings."""
    given = {
        variable(name): str(getattr(value, "get_secret_value", lambda value=value: value)())
        for name, value in settings
        if name in settings.model_fields_set
    }
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "VIRTUAL_ENV") if name in os.environ}
    return {**kept, "TRELLIS_LOG_FORMAT": "json", "OTEL_BSP_SCHEDULE_DELAY": "200", **given, **more}


@dataclass
class Process:
    """A running process of the product; its log is in a file, a JSON object per line."""

    running: asyncio.subprocess.Process
    log: Path

    @property
    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.read_text().splitlines()]

    async def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        if self.running.returncode is None:
            self.running.send_signal(number)
        return await asyncio.wait_for(self.running.wait(), 40)


@asynccontextmanager
async def started(log: Path, env: dict[str, str], *command: str) -> AsyncIterator[Process]:
    """`python -m ...` while the block runs."""
    with log.open("ab") as output:
        running = await asyncio.create_subprocess_exec(
            sys.executable, "-m", *command, cwd=ROOT, env=env, stdout=output, stderr=output
        )
    process = Process(running, log)
    try:
        yield process
    finally:
        try:
            await process.stop()
        finally:
            if running.returncode is None:
                running.kill()


async def until_ready(url: str, process: Process, seconds: float = 40.0) -> None:
    """Wait until `/readyz` answers 200."""
    async with httpx.AsyncClient(base_url=url) as client, asyncio.timeout(seconds):
        while True:
            assert process.running.returncode is None, process.log.read_text()
            try:
                if (await client.get("/readyz")).status_code == 200:
                    return
            except httpx.HTTPError:
                pass
            await asyncio.sleep(0.2)
