"""A Temporal that is not there for a while: which of its errors mean "later", and workers that outlast them."""

from __future__ import annotations

import asyncio
from collections.abc import MutableMapping
from typing import Any

import pytest
from structlog.testing import capture_logs
from temporalio.client import Client
from temporalio.contrib.pydantic import pydantic_data_converter
from temporalio.service import RPCError, RPCStatusCode

from app import workers
from app.local.process import free_port
from app.services import open_services
from app.settings import Settings
from app.temporal.client import is_unavailable
from app.workers import order_worker, shipping_worker
from tests.faults.proxy import Proxy
from tests.support import until


@pytest.mark.parametrize(
    ("status", "message", "later"),
    [
        (RPCStatusCode.UNAVAILABLE, "", True),
        (RPCStatusCode.DEADLINE_EXCEEDED, "Timeout expired", True),
        (RPCStatusCode.UNKNOWN, "transport error", True),
        (RPCStatusCode.FAILED_PRECONDITION, "Unable to perform workflow execution update", True),
        (RPCStatusCode.UNKNOWN, "something of the server's own", False),
        (RPCStatusCode.INVALID_ARGUMENT, "", False),
        (RPCStatusCode.PERMISSION_DENIED, "", False),
    ],
)
def test_later_or_no(status: RPCStatusCode, message: str, later: bool) -> None:
    assert is_unavailable(RPCError(message, status, b"")) is later


@pytest.mark.parametrize(
    ("message", "later"),
    [
        ("Failed client connect: Server connection error: tcp connect error", True),
        ('Worker validation failed: Namespace x could not be described: Status { code: Cancelled, message: "" }', True),
        ("Worker validation failed: Namespace x could not be described: Status { code: Unavailable }", True),
        ('Worker validation failed: Namespace x was not found: Status { code: NotFound, message: "x" }', False),
        ("Already started", False),
    ],
)
def test_later_or_no_without_a_status(message: str, later: bool) -> None:
    assert is_unavailable(RuntimeError(message)) is later


# --- workers


@pytest.mark.parametrize("lost", ["before it connects", "before its first call"])
async def test_a_worker_that_loses_temporal_while_it_starts_waits_for_it(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    """Temporal answered the first look, and is gone when the worker asks for its namespace."""
    port = int(settings.temporal_address.rpartition(":")[2])
    proxy = Proxy("temporal", port, host=settings.temporal_address.rpartition(":")[0])
    connects = 0

    async def connect(_: Settings, *, lazy: bool) -> Client:
        nonlocal connects
        assert not lazy
        connects += 1
        if connects == 1 and lost == "before it connects":
            _lose(proxy)
        client = await Client.connect(f"127.0.0.1:{proxy.port}", data_converter=pydantic_data_converter)
        if connects == 1 and lost == "before its first call":
            _lose(proxy)
        return client

    stop = asyncio.Event()
    with capture_logs() as logs:
        async with (
            proxy.listening(),
            open_services(settings.model_copy(update={"temporal_address": f"127.0.0.1:{proxy.port}"})) as services,
        ):
            monkeypatch.setattr("app.temporal.worker.connect", connect)
            parts = [order_worker(services), shipping_worker(services)]
            running = asyncio.create_task(workers.run(services, parts, stop))
            await until(lambda: _said(logs, "Temporal was lost while the workers started", running), "the loss", 60)
            assert "ok" not in (await services.readiness.states()).values()
            proxy.target = port
            await until(lambda: _all_ok(services.readiness, running), "workers that poll")
            stop.set()
            await running
    assert connects >= 2


def _lose(proxy: Proxy) -> None:
    proxy.target = free_port()
    proxy.cut()


async def _said(logs: list[MutableMapping[str, Any]], event: str, running: asyncio.Task[None]) -> bool:
    if running.done():
        await running
    return any(line["event"] == event for line in logs)


async def _all_ok(readiness: Any, running: asyncio.Task[None]) -> bool:
    if running.done():
        await running
    states = await readiness.states()
    return len(states) == 4 and set(states.values()) == {"ok"}
