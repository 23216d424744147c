"""Live timelines for many watchers with one reader: a query every interval, whatever the number of watchers."""

from __future__ import annotations

import asyncio
import ipaddress
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import structlog
from opentelemetry.instrumentation.utils import suppress_instrumentation

from app.db.pool import UNAVAILABLE
from app.domain.steps import FINAL_STEPS
from app.errors import TooManyStreams
from app.order.models import Event
from app.telemetry import metrics, supervision

if TYPE_CHECKING:
    from app.order.repository import OrderRepository

#: Seconds between two looks at the tables, while somebody watches.
INTERVAL: Final = 0.25
#: Seconds for which an order that has closed is still watched: its last note may follow its last step.
AFTER_CLOSE: Final = 1.0
#: Seconds of silence after which a watcher gets a sign of life; proxies cut connections idle for a minute.
HEARTBEAT: Final = 15.0
#: Events that wait for a watcher who does not take them; with more, its stream ends, and it can come back for the rest.
MOST_WAITING: Final = 1000
#: A stream ends after this share of its longest time, or more: those that began together do not all come back at once.
LEAST_SHARE: Final = 0.8

log = structlog.get_logger(__name__)


@dataclass(eq=False)
class _Watcher:
    order_id: str
    seen: int
    closed: bool = False
    over: bool = False
    #: None is the end of the stream.
    queue: asyncio.Queue[Event | None] = field(default_factory=asyncio.Queue)

    def give(self, event: Event) -> None:
        if self.queue.qsize() >= MOST_WAITING:
            self.end()
        if event.id > self.seen and not self.over:
            self.seen = event.id
            self.queue.put_nowait(event)

    def end(self) -> None:
        if not self.over:
            self.over = True
            self.queue.put_nowait(None)

    async def next(self, patience: float) -> Event | None:
        """The next event, None at the end.

        Raises:
            TimeoutError: there was none.
        """
        event = await asyncio.wait_for(self.queue.get(), patience)
        self.closed = self.closed or (event is not None and event.type in FINAL_STEPS)
        return event


def _client(address: str) -> str:
    """Whose streams are counted together. With IPv6, everybody has a /64 of addresses."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return address
    if isinstance(parsed, ipaddress.IPv6Address) and parsed.ipv4_mapped is None:
        return str(ipaddress.ip_network((parsed, 64), strict=False))
    return str(getattr(parsed, "ipv4_mapped", None) or parsed)


class EventFeed:
    """Reads what is new for everybody who watches an order. Runs while there is a watcher.

    Args:
        orders: where the events are.
        max_streams: watchers there may be at once.
        max_streams_per_client: those of one client; None: half of all, so that nobody alone can keep out the rest.
        max_seconds: how long one of them may stay; then its stream ends, and it can come back where it left off.
    """

    def __init__(
        self,
        orders: OrderRepository,
        *,
        max_streams: int = 500,
        max_streams_per_client: int | None = None,
        max_seconds: float = 900.0,
    ) -> None:
        self._orders = orders
        self._max_streams = max_streams
        self._max_of_client = max_streams_per_client or max(1, max_streams // 2)
        self._max_seconds = max_seconds
        self._streams = 0
        self._of_client: Counter[str] = Counter()
        self._watchers: set[_Watcher] = set()
        self._reader: asyncio.Task[None] | None = None
        self._asked_for_ended = time.monotonic()
        self._leaving = False

    @contextmanager
    def place(self, address: str = "") -> Iterator[None]:
        """A place among the streams that are served at once, for a client at this address, while the block runs.

        Raises:
            TooManyStreams: all are taken, or as many as one client may have are taken by this one.
        """
        client = _client(address)
        if self._streams >= self._max_streams:
            raise self._refused("process", f"{self._max_streams} at most")
        if self._of_client[client] >= self._max_of_client:
            raise self._refused("client", f"{self._max_of_client} at most for one client")
        self._count(client, 1)
        try:
            yield
        finally:
            self._count(client, -1)

    def _refused(self, limit: str, detail: str) -> TooManyStreams:
        metrics.STREAMS_REFUSED.labels(limit).inc()
        return TooManyStreams(detail)

    def _count(self, client: str, change: int) -> None:
        self._streams += change
        self._of_client[client] += change
        if not self._of_client[client]:
            del self._of_client[client]  # strangers choose how many there have been
        metrics.STREAMS.set(self._streams)

    async def watch(self, order_id: str, after: int = 0) -> AsyncIterator[Event | None]:
        """The order's events past `after`, old ones at once and new ones as they come; ends when the order has, when
        it has lasted `max_seconds`, when the process stops, and when the order cannot be read.

        None, every `HEARTBEAT` seconds without an event, lets the caller keep its connection open.
        """
        watcher = _Watcher(order_id, after)
        if not self._leaving:
            self._watchers.add(watcher)
            self._ensure_reader()
        # Not for secrets.
        ends = time.monotonic() + self._max_seconds * random.uniform(LEAST_SHARE, 1)  # noqa: S311
        try:
            while not self._leaving and (left := ends - time.monotonic()) > 0:
                try:
                    event = await watcher.next(AFTER_CLOSE if watcher.closed else min(HEARTBEAT, left))
                except TimeoutError:
                    if watcher.closed:
                        return
                    yield None
                    continue
                if event is None:
                    return
                yield event
        finally:
            self._watchers.discard(watcher)

    def leave(self) -> None:
        """End all streams, and those to come: the process stops, and waits for them."""
        self._leaving = True
        self._end_streams()

    async def close(self) -> None:
        """Stop reading."""
        if self._reader:
            self._reader.cancel()
            with suppress(asyncio.CancelledError):
                await self._reader

    def _end_streams(self) -> None:
        for watcher in self._watchers:
            watcher.end()

    def _ensure_reader(self) -> None:
        if self._reader is None or self._reader.done():
            # Watchers do not wait for what may never come: their streams end, and they come back.
            reading = supervision.keep_running("timelines", self._read, self._end_streams)
            self._reader = asyncio.create_task(reading)

    async def _read(self) -> None:
        # It would be traced as a part of the request that happened to be the first to watch.
        with suppress_instrumentation():
            while self._watchers:
                try:
                    await self._look()
                except UNAVAILABLE as error:
                    log.warning("timelines cannot be read", error=type(error).__name__)
                await asyncio.sleep(INTERVAL)

    async def _look(self) -> None:
        # Whoever joins while the tables are read may lack older events than were asked for: it waits for the next look.
        by_order: dict[str, list[_Watcher]] = {}
        for watcher in self._watchers:
            by_order.setdefault(watcher.order_id, []).append(watcher)
        ended = await self._ended(by_order)
        await self._hand_out(by_order)
        for order_id in ended:
            for watcher in by_order[order_id]:
                # It has seen more than there is: a `Last-Event-ID` from before the database was restored.
                if not watcher.closed and watcher.queue.empty():
                    watcher.end()

    async def _ended(self, order_ids: Collection[str]) -> list[str]:
        """Those that have ended, asked now and then: nearly always their last event says so."""
        if time.monotonic() - self._asked_for_ended < HEARTBEAT:
            return []
        self._asked_for_ended = time.monotonic()
        return await self._orders.ended_of(list(order_ids))

    async def _hand_out(self, by_order: dict[str, list[_Watcher]]) -> None:
        try:
            await self._hand_out_to(by_order)
        except UNAVAILABLE:
            raise
        except Exception as error:  # noqa: BLE001 - one order that cannot be read is not the others' concern
            log.warning("timelines cannot be read together", error=type(error).__name__)
            for order_id, watchers in by_order.items():
                await self._hand_out_one(order_id, watchers)

    async def _hand_out_one(self, order_id: str, watchers: list[_Watcher]) -> None:
        try:
            await self._hand_out_to({order_id: watchers})
        except UNAVAILABLE:
            raise
        except Exception:
            metrics.background_failed("timelines")
            log.exception("a timeline cannot be read", order_id=order_id)
            for watcher in watchers:
                watcher.end()

    async def _hand_out_to(self, by_order: dict[str, list[_Watcher]]) -> None:
        oldest = {order_id: min(each.seen for each in watchers) for order_id, watchers in by_order.items()}
        for order_id, event in await self._orders.events_of_many(oldest):
            for watcher in by_order.get(order_id, ()):
                watcher.give(event)
