"""The edge of the API: how it stops, what strangers and slow clients may do, and what it says about itself."""

from __future__ import annotations

import asyncio
import itertools
import signal
import uuid
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import asyncpg
import httpx
import pytest

from app import db, gauges, metrics
from app.order.feed import EventFeed
from app.order.models import Event
from app.order.repository import OrderRepository
from app.settings import Settings
from app.wiring import Services
from tests.support import running_workers, until, until_step
from tests.telemetry import environment, free_port, started, until_ready

LIVE = {"Accept": "text/event-stream"}


async def _in_review(client: httpx.AsyncClient, payment: str = "pay") -> str:
    """An order that waits for its review; its id."""
    unique = uuid.uuid4().hex[:12]
    body = {"payment_id": f"{payment}-{unique}", "review_timeout_seconds": 600}
    answer = await client.post(f"/orders/o-{unique}/start", json=body)
    assert answer.status_code == 202, answer.text
    await until_step(client, f"o-{unique}", "awaiting_review")
    return f"o-{unique}"


# --- stopping


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_the_published_line_drains_while_a_timeline_is_watched(
    settings: Settings, pool: asyncpg.Pool, tmp_path: Path, number: signal.Signals
) -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = ("uvicorn", "app.main:app", "--port", str(port), "--no-access-log")
    async with started(tmp_path / "log", environment(settings), *command) as server:
        await until_ready(url, server)
        async with httpx.AsyncClient(base_url=url, timeout=30) as client:
            watched, charged = await _in_review(client), await _in_review(client, "pay-slow")
            async with client.stream("GET", f"/orders/{watched}/events", headers=LIVE) as watching:
                lines = watching.aiter_lines()
                assert await anext(lines)
                await client.post(f"/orders/{charged}/signals/approve")

                async def at_the_provider() -> bool:
                    return await pool.fetchval("SELECT status = 'INIT' FROM payments") is True

                await until(at_the_provider, "the charge to be under way")
                server.running.send_signal(number)
                async with asyncio.timeout(15):
                    assert [line async for line in lines]  # to its end, which is no broken connection
                    code = await server.running.wait()
        # uvicorn repeats the signal after the drain, so that its parent sees why it ended.
        assert code in {0, -number}, server.log.read_text()
    log = server.log.read_text()
    assert "workers stopped" in log
    assert "Finished server process" in log
    # The attempt that ran was not cut off.
    assert await pool.fetchval("SELECT status FROM payments") == "CHARGED"


# --- background tasks


class Broken(OrderRepository):
    """A repository that chokes on the timelines of some orders, or of all."""

    def __init__(self, pool: asyncpg.Pool, *poisoned: str) -> None:
        super().__init__(pool)
        self.poisoned = set(poisoned)

    async def events_of_many(self, seen: dict[str, int]) -> Any:
        if self.poisoned & {"*", *seen}:
            raise KeyError("payload_json")  # any error that is not one of a database that is away
        return await super().events_of_many(seen)


def _failures(task: str) -> float:
    return metrics.REGISTRY.get_sample_value("trellis_background_failures_total", {"task": task}) or 0.0


async def _all_of(watching: AsyncIterator[Event | None]) -> list[str]:
    return [event.type async for event in watching if event]


async def _written(pool: asyncpg.Pool, order_id: str, step: str = "received") -> None:
    await pool.execute("INSERT INTO orders (id, state) VALUES ($1, $2)", order_id, step)
    await pool.execute("INSERT INTO events (order_id, type, payload_json) VALUES ($1, $2, '{}')", order_id, step)


async def test_one_timeline_that_cannot_be_read_ends_and_the_others_go_on(pool: asyncpg.Pool) -> None:
    for order_id in ("good", "bad"):
        await _written(pool, order_id)
    feed, failures = EventFeed(Broken(pool, "bad")), _failures("timelines")
    async with asyncio.timeout(20):
        good = feed.watch("good")
        assert await anext(good)
        assert await _all_of(feed.watch("bad")) == []
        await pool.execute("INSERT INTO events (order_id, type, payload_json) VALUES ('good', 'note', '{}')")
        event = await anext(good)
        assert event
        assert event.type == "note"
    assert _failures("timelines") > failures
    await good.aclose()
    await feed.close()


async def test_watchers_are_told_when_the_reader_fails_and_it_runs_again(
    pool: asyncpg.Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    await _written(pool, "o-1")
    feed, failures = EventFeed(OrderRepository(pool)), _failures("timelines")
    look = feed._look

    async def fail_once() -> None:
        monkeypatch.setattr(feed, "_look", look)
        raise AssertionError

    monkeypatch.setattr(feed, "_look", fail_once)
    async with asyncio.timeout(20):
        assert await _all_of(feed.watch("o-1")) == []
        again = feed.watch("o-1")
        assert await anext(again)
    assert _failures("timelines") == failures + 1
    await again.aclose()
    await feed.close()


async def test_the_gauges_are_read_again_after_any_error(services: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    tries = 0

    async def fail(_: object) -> None:
        nonlocal tries
        tries += 1
        raise KeyError("state")

    monkeypatch.setattr(gauges, "read", fail)
    monkeypatch.setattr(db, "pauses", lambda: itertools.repeat(0.01))
    failures = _failures("gauges")
    settings = services.settings.model_copy(update={"metrics_port": free_port()})
    async with running_workers(replace(services, settings=settings)):

        async def again() -> bool:
            return tries > 1

        await until(again, "the gauges to be read again")
    assert _failures("gauges") > failures
