"""`python -m tests.alerts.careless_worker`: the worker of a release that should not have been made."""

from __future__ import annotations

import asyncio
import signal
from dataclasses import replace

from app import workers
from app.services import open_services
from app.settings import Settings
from app.telemetry.logs import configure_logging
from app.workers import order_worker
from tests.alerts.careless import ValidatedTwice


async def _serve() -> None:
    settings, stop = Settings(), asyncio.Event()
    configure_logging(settings)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    async with open_services(settings) as services:
        await workers.run(services, [replace(order_worker(services), workflows=[ValidatedTwice])], stop)


asyncio.run(_serve())
