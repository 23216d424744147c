"""What tests share besides fixtures: running the product's parts, and waiting for an order."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import pytest
import uvicorn

from app import worker
from app.order.worker import order_worker
from app.shipping.worker import shipping_worker
from app.wiring import Services


@asynccontextmanager
async def running_workers(services: Services) -> AsyncIterator[None]:
    """Both workers, while the block runs."""
    stop = asyncio.Event()
    running = asyncio.create_task(worker.run(services, [order_worker(services), shipping_worker(services)], stop))
    try:
        yield
    finally:
        stop.set()
        await running


@asynccontextmanager
async def serving(app: object) -> AsyncIterator[str]:
    """An ASGI application on a free loopback port; yields its URL."""
    server = uvicorn.Server(
        uvicorn.Config(app, port=0, log_config=None, access_log=False, timeout_graceful_shutdown=1)  # type: ignore[arg-type]
    )
    server.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
    running = asyncio.create_task(server.serve())
    try:
        while not server.started:
            if running.done():
                await running
            await asyncio.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        await running


async def until_step(client: httpx.AsyncClient, order_id: str, *steps: str, timeout: float = 20.0) -> str:
    """Wait until the order is at one of `steps`; fails with where it was instead."""
    step = "nowhere"
    async with asyncio.timeout(timeout) as limit:
        try:
            while True:
                answer = await client.get(f"/orders/{order_id}/status")
                step = answer.json().get("step", answer.text)
                if step in steps:
                    return step
                await asyncio.sleep(0.05)
        except asyncio.CancelledError:
            if limit.expired():
                pytest.fail(f"{order_id} is {step}, not {' or '.join(steps)}, after {timeout} s")
            raise
