"""The product as one process, with telemetry or without any; `python -m bench.product <port> <on|off>`."""

from __future__ import annotations

import sys

import asyncpg
import uvicorn

from app import metrics
from app.main import create
from app.settings import Settings
from app.telemetry import configure_logging


def _switch_metrics_off() -> None:
    """The product has no such switch: counting is not optional. Here it shows what counting costs."""

    def nothing(*_: object, **__: object) -> None:
        pass

    for name in (
        *("order_received", "entered", "payment_entered", "signalled", "expect_activities", "attempt_ended"),
        *("attempt_repeated", "request_ended", "query_ended", "watch_pool"),
    ):
        setattr(metrics, name, nothing)
    asyncpg.Connection.add_query_logger = nothing


def main() -> None:
    """Serve until SIGTERM."""
    port, telemetry = int(sys.argv[1]), sys.argv[2] == "on"
    if not telemetry:
        _switch_metrics_off()
    settings = Settings()
    configure_logging(settings)
    uvicorn.run(create(settings), port=port, log_config=None, access_log=False)


if __name__ == "__main__":
    main()
