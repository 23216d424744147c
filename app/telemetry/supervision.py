"""Background tasks that others depend on: a failure is logged, counted and followed by another attempt.

An asyncio task that fails does so in silence, and whoever waits for what it delivers waits forever.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Final

import structlog

from app.telemetry import metrics

#: Seconds after which a task that fails counts as having worked before, and is attempted again soon.
STABLE_AFTER: Final = 60.0

log = structlog.get_logger(__name__)


async def keep_running(
    name: str, work: Callable[[], Awaitable[None]], failed: Callable[[], None] | None = None
) -> None:
    """Run `work` until it returns. After each failure call `failed`, wait, longer each time, and run it again.

    Args:
        name: what the log and the metric call the task; one of `metrics.BACKGROUND_TASKS`.
        work: starts the task anew.
        failed: tells those who wait for what the task delivers.
    """
    between = pauses()
    while True:
        began = time.monotonic()
        try:
            await work()
        except Exception:
            if time.monotonic() - began > STABLE_AFTER:
                between = pauses()
            pause = next(between)
            metrics.background_failed(name)
            log.exception("a background task failed", task=name, retry_in_seconds=pause)
            if failed is not None:
                failed()
            await asyncio.sleep(pause)
        else:
            return


def pauses() -> Iterator[float]:
    """Seconds between two tries: soon at first, then every five seconds."""
    yield from (0.2, 0.4, 0.8, 1.6, 3.2)
    yield from itertools.repeat(5.0)
