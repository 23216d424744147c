"""The product, with telemetry or without any: `python -m bench.programs.trellis <role> <port> <on|off>`.

The role `all` is what `uvicorn app.main:app` serves, `api` is the API without workers, `workers` are both workers
without the API, in one process.
"""

from __future__ import annotations

import asyncio
import signal
import sys

import asyncpg
import uvicorn
import uvloop

from app import workers
from app.api import create_app
from app.main import create
from app.services import open_services
from app.settings import Settings
from app.telemetry import metrics
from app.telemetry.logs import configure_logging
from app.workers import order_worker, shipping_worker


def _switch_metrics_off() -> None:
    """The product has no such switch: counting is not optional. Here it shows what counting costs."""

    def nothing(*_: object, **__: object) -> None:
        pass

    for name in (
        *("order_received", "entered", "payment_entered", "signalled", "expect_activities", "attempt_ended"),
        *("attempt_repeated", "request_ended", "query_ended", "watch_pool"),
    ):
        if not callable(getattr(metrics, name, None)):
            sys.exit(
                f"app.telemetry.metrics has no {name}() any more; "
                "bench/programs/trellis.py does not know what to switch off"
            )
        setattr(metrics, name, nothing)
    asyncpg.Connection.add_query_logger = nothing  # type: ignore[method-assign]


async def _work(settings: Settings) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with open_services(settings) as services:
        await workers.run(services, [order_worker(services), shipping_worker(services)], stop)


def main() -> None:
    """Serve until SIGTERM."""
    role, port, telemetry = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "on"
    if not telemetry:
        _switch_metrics_off()
    settings = Settings()
    configure_logging(settings)
    if role == "workers":
        uvloop.run(_work(settings))  # as `trellis worker` does
    else:
        app = create(settings) if role == "all" else create_app(settings)
        uvicorn.run(app, port=port, log_config=None, access_log=False)


if __name__ == "__main__":
    main()
