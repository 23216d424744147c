"""Live timelines for many watchers with one reader: a query every interval, whatever the number of watchers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import structlog
from opentelemetry.instrumentation.utils import suppress_instrumentation

from app.db import UNAVAILABLE
from app.order.models import Event
from app.steps import FINAL_STEPS

if TYPE_CHECKING:
    from app.order.repository import OrderRepository

#: Seconds between two looks at the tables, while somebody watches.
INTERVAL: Final = 0.25
#: Seconds for which an order that has closed is still watched: its last note may follow its last step.
AFTER_CLOSE: Final = 1.0
#: Seconds of silence after which a watcher gets a sign of life; proxies cut connections idle for a minute.
HEARTBEAT: Final = 15.0

log = structlog.get_logger(__name__)


@dataclass(eq=False)
class _Watcher:
    order_id: str
    seen: int
    queue: asyncio.Queue[Event] = field(default_factory=asyncio.Queue)


class EventFeed:
    """Reads what is new for everybody who watches an order. Runs while there is a watcher."""

    def __init__(self, orders: OrderRepository) -> None:
        self._orders = orders
        self._watchers: set[_Watcher] = set()
        self._reader: asyncio.Task[None] | None = None

    async def watch(self, order_id: str, after: int = 0) -> AsyncIterator[Event | None]:
        """The order's events past `after`, old ones at once and new ones as they come; ends when the order has.

        None, every `HEARTBEAT` seconds without an event, lets the caller keep its connection open.
        """
        watcher = _Watcher(order_id, after)
        self._watchers.add(watcher)
        self._ensure_reader()
        closed = False
        try:
            while True:
                try:
                    event = await asyncio.wait_for(watcher.queue.get(), AFTER_CLOSE if closed else HEARTBEAT)
                except TimeoutError:
                    if closed:
                        return
                    yield None
                    continue
                closed = closed or event.type in FINAL_STEPS
                yield event
        finally:
            self._watchers.discard(watcher)

    async def close(self) -> None:
        """Stop reading."""
        if self._reader:
            self._reader.cancel()
            with suppress(asyncio.CancelledError):
                await self._reader

    def _ensure_reader(self) -> None:
        if self._reader is None or self._reader.done():
            self._reader = asyncio.create_task(self._read())

    async def _read(self) -> None:
        # It would be traced as a part of the request that happened to be the first to watch.
        with suppress_instrumentation():
            while self._watchers:
                try:
                    await self._hand_out()
                except UNAVAILABLE as error:
                    log.warning("timelines cannot be read", error=type(error).__name__)
                await asyncio.sleep(INTERVAL)

    async def _hand_out(self) -> None:
        oldest: dict[str, int] = {}
        by_order: dict[str, list[_Watcher]] = {}
        # Whoever joins while the tables are read may lack older events than were asked for: it waits for the next look.
        for watcher in self._watchers:
            oldest[watcher.order_id] = min(watcher.seen, oldest.get(watcher.order_id, watcher.seen))
            by_order.setdefault(watcher.order_id, []).append(watcher)
        news = await self._orders.events_of_many(oldest)
        for order_id, event in news:
            for watcher in by_order.get(order_id, ()):
                if event.id > watcher.seen:
                    watcher.seen = event.id
                    watcher.queue.put_nowait(event)
