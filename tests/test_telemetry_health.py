"""Liveness, readiness, and the gauges that one process of all reads."""

from __future__ import annotations

import asyncio
import uuid
from datetime import timedelta
from pathlib import Path

import asyncpg
import httpx
import pytest

from app.db.pool import create_pool
from app.order import gauges
from app.settings import Settings
from app.telemetry import metrics, probes
from app.telemetry.probes import Readiness
from tests import databases
from tests.telemetry import environment, eventually, free_port, started, until_ready


async def _ask(port: int, page: str) -> httpx.Response:
    async with httpx.AsyncClient() as client:
        return await client.get(f"http://127.0.0.1:{port}/{page}")


async def _until_live(port: int) -> None:
    async with asyncio.timeout(40):
        while True:
            try:
                await _ask(port, "healthz")
            except httpx.HTTPError:
                await asyncio.sleep(0.1)
            else:
                return


async def test_a_worker_is_live_at_once_and_ready_when_it_polls(settings: Settings, tmp_path: Path) -> None:
    port = free_port()
    env = environment(settings, TRELLIS_METRICS_PORT=str(port))
    async with started(tmp_path / "log", env, "app", "worker", "shipping") as worker:
        await until_ready(f"http://127.0.0.1:{port}", worker)
        queue = settings.shipping_task_queue
        assert (await _ask(port, "readyz")).json() == {
            "status": "ready",
            "checks": {f"workflow tasks on {queue}": "ok", f"activity tasks on {queue}": "ok"},
        }
        assert (await _ask(port, "healthz")).json() == {"status": "ok"}
        assert await worker.stop() == 0


async def test_a_worker_without_its_servers_is_live_and_says_what_it_waits_for(
    settings: Settings, tmp_path: Path
) -> None:
    port = free_port()
    nowhere = f"127.0.0.1:{free_port()}"
    env = environment(settings, TRELLIS_METRICS_PORT=str(port), TRELLIS_TEMPORAL_ADDRESS=nowhere)
    async with started(tmp_path / "log", env, "app", "worker", "default") as worker:
        await _until_live(port)
        assert (await _ask(port, "healthz")).status_code == 200
        answer = await _ask(port, "readyz")
        assert answer.status_code == 503
        assert answer.json() == {
            "status": "not ready",
            "checks": {"workers": "waiting for PostgreSQL, its migration, or Temporal"},
        }
        assert (await _ask(port, "metrics")).status_code == 200
        assert await worker.stop() == 0


async def test_a_taken_port_is_named(settings: Settings) -> None:
    async with await asyncio.start_server(lambda *_: None, "127.0.0.1", 0) as server:
        taken = settings.model_copy(update={"metrics_port": server.sockets[0].getsockname()[1]})
        serving = probes.serving(taken, Readiness(), None)
        with pytest.raises(probes.MetricsPortTaken, match="TRELLIS_METRICS_PORT"):
            await serving.__aenter__()


async def test_a_check_that_hangs_is_a_reason() -> None:
    async def never() -> None:
        await asyncio.Event().wait()

    readiness = Readiness()
    readiness.require("something", never)
    probes._CHECK_SECONDS, before = 0.05, probes._CHECK_SECONDS  # type: ignore[misc]
    try:
        assert await readiness.states() == {"something": "TimeoutError: no answer in time"}
    finally:
        probes._CHECK_SECONDS = before  # type: ignore[misc]


# --- the SDK's page in the newer format


def test_the_sdks_page_is_translated() -> None:
    page = (
        "# HELP temporal_request_total Calls\n# TYPE temporal_request_total counter\n"
        'temporal_request_total{operation="x"} 3\n\n'
        '# TYPE temporal_num_pollers gauge\ntemporal_num_pollers{a="b"} 5\n'
    )
    assert probes.as_openmetrics(page) == (
        "# HELP temporal_request Calls\n# TYPE temporal_request counter\n"
        'temporal_request_total{operation="x"} 3\n'
        '# TYPE temporal_num_pollers gauge\ntemporal_num_pollers{a="b"} 5\n'
    )


# --- gauges


def _published() -> dict[str, float]:
    samples = [sample for family in metrics.ORDER_GAUGES.collect() for sample in family.samples]
    return {sample.labels["step"]: sample.value for sample in samples if sample.name == "trellis_orders_open"}


@pytest.fixture
async def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gauges, "INTERVAL", 0.05)
    metrics.ORDER_GAUGES.clear()


async def _until(expected: dict[str, float]) -> None:
    await eventually(lambda: {step: count for step, count in _published().items() if count} == expected)


async def _order(pool: asyncpg.Pool) -> None:
    await pool.execute("INSERT INTO orders (id, state) VALUES ($1, 'received')", uuid.uuid4().hex)


async def test_one_process_reads_for_all(settings: Settings, pool: asyncpg.Pool, quick: None) -> None:
    await _order(pool)
    another = (gauges._KEY, "another", timedelta(seconds=1))
    assert await pool.fetchval(gauges._CLAIM, *another)
    reading = asyncio.create_task(gauges.keep_reading(settings))
    for _ in range(10):
        await asyncio.sleep(0.05)
        assert await pool.fetchval(gauges._CLAIM, *another), "the claim is renewed by who has it"
        assert _published() == {}, "the other one reads"
    # It is not heard of any more, as after a crash.
    await _until({"received": 1})
    assert not await pool.fetchval(gauges._CLAIM, *another)
    reading.cancel()
    await asyncio.gather(reading, return_exceptions=True)
    assert await pool.fetchval(gauges._CLAIM, *another), "who leaves in order lets the next one begin at once"


async def test_the_gauges_outlive_an_outage(
    settings: Settings, pool: asyncpg.Pool, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    await _order(pool)
    reading = asyncio.create_task(gauges.keep_reading(settings))
    await _until({"received": 1})
    url = settings.database_url.get_secret_value()
    await databases.as_owner(url, "ALTER TABLE orders RENAME TO gone")
    await pool.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'trellis-gauges' "
        "AND datname = current_database()"
    )
    await asyncio.sleep(0.5)
    assert _published()["received"] == 1, "the last reading is shown for a while"
    monkeypatch.setattr(metrics, "STALE_AFTER", 0.1)
    await asyncio.sleep(0.2)
    assert _published() == {}, "then it would mislead"
    await databases.as_owner(url, "ALTER TABLE gone RENAME TO orders")
    await _order(pool)
    monkeypatch.setattr(metrics, "STALE_AFTER", 60.0)
    await _until({"received": 2})
    reading.cancel()


async def test_a_review_is_due_in_its_last_quarter(pool: asyncpg.Pool) -> None:
    metrics.ORDER_GAUGES.clear()
    insert = """
    INSERT INTO orders (id, state, state_since, review_deadline)
    VALUES ($1, 'awaiting_review', clock_timestamp() - $2::interval, clock_timestamp() + $3::interval)
    """
    minutes = {"just begun": (0, 60), "half over": (30, 30), "not yet": (70, 30), "due": (80, 20), "overdue": (60, -1)}
    for name, (waited, left) in minutes.items():
        await pool.execute(insert, name.replace(" ", "-"), timedelta(minutes=waited), timedelta(minutes=left))
    async with pool.acquire() as connection:
        await gauges.read(connection)
    samples = {sample.name: sample.value for family in metrics.ORDER_GAUGES.collect() for sample in family.samples}
    assert samples["trellis_reviews_due"] == 2
    metrics.ORDER_GAUGES.clear()


async def test_the_gauges_walk_indexes(pool: asyncpg.Pool) -> None:
    async with pool.acquire() as connection, connection.transaction():
        await connection.execute("SET LOCAL enable_seqscan = off")
        for query, arguments in ((gauges._OPEN, [["received"]]), (gauges._UNSETTLED, [])):
            plan = await connection.fetch(f"EXPLAIN {query}", *arguments)
            assert "Seq Scan" not in "\n".join(line[0] for line in plan)


async def test_waiting_for_a_connection_shows(settings: Settings) -> None:
    def waiters() -> float:
        return next(
            sample.value for family in metrics._pools.collect() for sample in family.samples if "wait" in sample.name
        )

    async with create_pool(settings.model_copy(update={"database_pool_size": 1})) as small:
        async with small.acquire():
            waiting = asyncio.create_task(small.fetchval("SELECT 1"))
            await asyncio.sleep(0.1)
            assert waiters() == 1
        assert await waiting == 1
        assert waiters() == 0
