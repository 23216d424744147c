"""`uvicorn app.main:app`: the API and both workers in one process, against the configured servers."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import re
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import structlog

from app.cli import edge
from app.errors import SettingsError
from app.settings import load
from app.telemetry.logs import configure_logging

if TYPE_CHECKING:
    from fastapi import FastAPI

    from app.services import Services
    from app.settings import Settings

log = structlog.get_logger(__name__)


def create(settings: Settings) -> FastAPI:
    """The API with both workers in its lifespan. It serves at once; the workers start when their servers are there.

    `app.state.workers_failed` tells whoever runs it whether the end was a failure.
    """
    # Not before: OpenTelemetry reads its variables when it is imported, and raises what is wrong with them.
    from app.api import create_app

    app = create_app(settings, beside=lambda services: _workers(app, services))
    app.state.workers_failed = False
    return app


@asynccontextmanager
async def _workers(app: FastAPI, services: Services) -> AsyncIterator[None]:
    from app import workers
    from app.workers import order_worker, shipping_worker

    stop = asyncio.Event()
    running = asyncio.create_task(workers.run(services, [order_worker(services), shipping_worker(services)], stop))
    running.add_done_callback(partial(_end_the_process_on_failure, app))
    try:
        yield
    finally:
        stop.set()
        # A failure was logged when it happened, and is the reason why we are here.
        await asyncio.gather(running, return_exceptions=True)


def _end_the_process_on_failure(app: FastAPI, running: asyncio.Task[None]) -> None:
    # An API that accepts orders which nobody works on looks healthy and is not: whoever supervises the process
    # restarts it.
    if not running.cancelled() and running.exception():
        log.critical("the workers failed, the process ends", exc_info=running.exception())
        app.state.workers_failed = True
        signal.raise_signal(signal.SIGTERM)


def _refuse_to_share_a_port(settings: Settings) -> None:
    workers = _workers_of_uvicorn()
    if settings.metrics_port and workers > 1:
        raise SettingsError(
            f"TRELLIS_METRICS_PORT is set, and {workers} workers of uvicorn cannot share that port: a process is a "
            "replica, so run several, each with a port of its own, and leave out --workers and WEB_CONCURRENCY"
        )


def _workers_of_uvicorn() -> int:
    """How many processes there are, in one that uvicorn has started beside others."""
    if multiprocessing.parent_process() is None:
        return 1
    text = " ".join(sys.argv)
    given = re.search(r"--workers[ =](\d+)", text)
    return int(given[1] if given else os.environ.get("WEB_CONCURRENCY", "1"))


def __getattr__(name: str) -> Any:
    # Built when uvicorn asks for it, so that importing `create` reads no settings.
    if name == "app":
        try:
            settings = load()
            _refuse_to_share_a_port(settings)
            from app.partners import clients

            clients.check(settings)
            configure_logging(settings)
            return create(settings)
        except Exception as error:  # noqa: BLE001 - uvicorn would print its stack
            end = edge.end_of(error)
            beside_others = _workers_of_uvicorn() > 1
            if not beside_others or multiprocessing.current_process().name.endswith("-1"):
                edge.tell(end, error)
            if beside_others:
                # It would start this process again for ever.
                os.kill(os.getppid(), signal.SIGTERM)
            sys.exit(end.code)
    raise AttributeError(name)
