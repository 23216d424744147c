"""PgBouncer in front of PostgreSQL, in both of its modes: orders, migrations, gauges, and what it refuses."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import uuid
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import asyncpg
import httpx
import pytest
from pydantic import SecretStr
from structlog.testing import capture_logs

from app.api import create_app
from app.db.pool import SCHEMA_VERSION, create_pool, downgrade, migrate, reason
from app.domain.steps import Step
from app.errors import DatabaseUnavailable
from app.order import gauges
from app.settings import Settings
from app.telemetry import metrics
from tests import databases
from tests import test_workflows_integration as orders
from tests.poolers import MODES, PgBouncer, pgbouncer
from tests.shop import Shop, fresh_settings, open_shop
from tests.support import serving, until, until_step
from tests.telemetry import environment, free_port, started, until_ready

if TYPE_CHECKING:
    from conftest import Servers


@pytest.fixture(scope="module", params=MODES)
async def pooler(servers: Servers, request: pytest.FixtureRequest) -> AsyncIterator[PgBouncer]:
    """PgBouncer with few sessions, so that they are shared."""
    async with pgbouncer(servers.admin_url, request.param, size=30 if request.param == "session" else 4) as running:
        yield running


@pytest.fixture(scope="module")
async def transactions(servers: Servers) -> AsyncIterator[PgBouncer]:
    """PgBouncer in transaction mode, of two sessions."""
    async with pgbouncer(servers.admin_url, "transaction", size=2) as running:
        yield running


@pytest.fixture(scope="module")
async def shop(servers: Servers, template: str, pooler: PgBouncer) -> AsyncIterator[Shop]:
    """A shop whose every connection goes through it; its orders must have come to a right end."""
    async with fresh_settings(servers, template) as settings, open_shop(through(pooler, settings)) as opened:
        yield opened
        await opened.audit()


def through(pooler: PgBouncer, settings: Settings, **more: Any) -> Settings:
    url = pooler.url(settings.database_url.get_secret_value())
    return settings.model_copy(update={"database_url": SecretStr(url), **more})


# --- orders: the cases of the workflow, once more through a pooler

test_shipped = orders.test_an_approved_order_takes_every_step_once_and_tells_each
test_rejected = orders.test_a_rejected_order_is_not_charged_and_keeps_the_note
test_expired = orders.test_an_order_expires_in_real_time
test_decided_once = orders.test_only_the_first_decision_counts_and_every_other_is_told
test_reviewed = orders.test_a_review_is_answered_once_and_refused_afterwards
test_cancelled_in_review = orders.test_an_order_cancelled_in_review_is_not_charged
test_cancelled_in_charge = orders.test_an_order_cancelled_during_the_charge_is_refunded_when_the_charge_is_known
test_recalled = orders.test_an_order_cancelled_while_no_carrier_takes_it_is_recalled_and_refunded
test_cancelled_too_late = orders.test_a_cancellation_after_the_end_is_refused
test_declined = orders.test_a_declined_payment_ends_the_order_without_a_second_try
test_one_payment = orders.test_of_two_orders_with_one_payment_one_is_charged_and_the_other_ends_unpaid
test_lost_reply = orders.test_a_lost_reply_does_not_charge_twice
test_refunded = orders.test_a_parcel_that_no_carrier_takes_is_refunded
test_addresses = orders.test_an_address_may_be_changed_before_the_review_during_it_and_during_the_charge
test_handed_over = orders.test_a_step_that_fails_where_the_workflow_runs_goes_on_from_its_task_queue


async def test_many_orders_at_once_share_few_sessions(shop: Shop) -> None:
    many = await asyncio.gather(*(shop.approved() for _ in range(30)))
    assert {await order.ends() for order in many} == {Step.SHIPPED}


async def test_the_product_as_it_is_started_serves_through_a_pooler(
    settings: Settings, pooler: PgBouncer, tmp_path: Path
) -> None:
    """`trellis run-all` migrates, and `uvicorn app.main:app` serves; an order is reviewed, paid for and shipped."""
    given = through(pooler, settings)
    for number, command in enumerate((("app", "run-all"), ("uvicorn", "app.main:app"))):
        port, log = free_port(), tmp_path / f"{number}.log"
        env, more = environment(given), ("--port", str(port))
        url = f"http://127.0.0.1:{port}"
        async with started(log, env, *command, *more) as process, httpx.AsyncClient(base_url=url, timeout=30) as api:
            await until_ready(url, process)
            order_id = f"o-{uuid.uuid4().hex[:12]}"
            body = {"payment_id": f"pay-{order_id}", "review_timeout_seconds": 60}
            assert (await api.post(f"/orders/{order_id}/start", json=body)).is_success
            await until_step(api, order_id, "awaiting_review")
            review = await api.post(f"/orders/{order_id}/review", json={"decision": "approve"})
            assert review.is_success, review.text
            await until_step(api, order_id, "shipped")
        assert "Traceback" not in read(log)


def read(file: Path) -> str:
    return file.read_text()


async def test_the_audit_and_reconcile_read_through_a_pooler(shop: Shop) -> None:
    """What they print is theirs alone: that a pooler was seen is a line of the log."""
    for command in (("audit", "--no-temporal", "--json"), ("reconcile", "--json")):
        code, printed, logged = await trellis(environment(shop.settings, TRELLIS_LOG_LEVEL="info"), *command)
        # 1: orders of other tests, which may be on their way still, are left to `--apply`.
        assert code == 0 or (code == 1 and command[0] == "reconcile"), (printed, logged)
        assert json.loads(printed)
        assert "TRELLIS_DATABASE_POOLER" in logged


async def trellis(env: Mapping[str, str], *command: str) -> tuple[int | None, str, str]:
    """A command's exit code, and what it wrote on both of its streams."""
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "app", *command), env=env, stdout=pipe, stderr=pipe
    )
    printed, logged = await asyncio.wait_for(process.communicate(), 100)
    return process.returncode, printed.decode(), logged.decode()


# --- what is seen, and what is set


async def test_a_pooler_is_seen_and_what_is_prepared_is_not_kept(settings: Settings, pooler: PgBouncer) -> None:
    async with create_pool(settings) as direct:
        assert await prepared(direct) > 0
    with capture_logs() as logs:
        async with create_pool(through(pooler, settings)) as pool:
            assert await prepared(pool) == 0
            assert await pool.fetchval("SELECT setting::int FROM pg_settings WHERE name = 'lock_timeout'") == 0
            seen = [line["event"] for line in logs]
    assert len(seen) == 1, "once, however many connections there are"
    assert "TRELLIS_DATABASE_POOLER" in seen[0]
    for mode, kept in (("session", True), ("transaction", False)):
        async with create_pool(settings.model_copy(update={"database_pooler": mode})) as pool:
            assert (await prepared(pool) > 0) is kept, mode


async def prepared(pool: asyncpg.Pool) -> int:
    """What a connection that was used has prepared in its session."""
    async with pool.acquire() as connection:
        for _ in range(3):
            await connection.fetch("SELECT id FROM orders WHERE id = $1", "o-1")
        found: int = await connection.fetchval("SELECT count(*) FROM pg_prepared_statements WHERE name <> ''")
        return found


async def test_what_was_set_wrongly_is_said_and_is_no_fault(settings: Settings, transactions: PgBouncer) -> None:
    """`session` for a pooler in transaction mode: calls are answered 503 and may be repeated, and it is said why."""
    given = through(transactions, settings, database_pooler="session")
    async with create_pool(given) as pool:
        raised: list[BaseException] = []
        for _ in range(10):
            answers = await asyncio.gather(*(mixed(pool) for _ in range(8)), return_exceptions=True)
            raised += [answer for answer in answers if isinstance(answer, BaseException)]
        assert raised
        assert {type(error) for error in raised} == {DatabaseUnavailable}
        assert "set TRELLIS_DATABASE_POOLER=transaction" in reason(raised[0])


async def mixed(pool: asyncpg.Pool) -> None:
    for number in range(5):
        await pool.fetchval(f"SELECT $1::int + {number}", 1)


async def test_a_pooler_that_hides_is_found_by_what_it_mixes_up(
    settings: Settings, transactions: PgBouncer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def always(_: object) -> bool:
        return True

    monkeypatch.setattr("app.db.pooler._is_direct", always)
    async with create_pool(through(transactions, settings)) as pool:
        await asyncio.gather(*(mixed(pool) for _ in range(8)), return_exceptions=True)
        for _ in range(20):
            failed = [
                answer
                for answer in await asyncio.gather(*(mixed(pool) for _ in range(8)), return_exceptions=True)
                if isinstance(answer, BaseException)
            ]
        assert failed == []


async def test_what_the_pooler_refuses_of_the_url_is_said(
    settings: Settings, pooler: PgBouncer, tmp_path: Path
) -> None:
    url = pooler.url(settings.database_url.get_secret_value()) + "?options=-csearch_path%3Dpublic"
    given = settings.model_copy(update={"database_url": SecretStr(url)})
    code, _, logged = await trellis(environment(given), "migrate")
    last = logged.strip().splitlines()[-1]
    assert (code, "take them out" in last) == (4, True), last
    async with serving(create_app(given)) as served, httpx.AsyncClient(base_url=served) as api:
        assert (await api.get("/orders")).status_code == 503


# --- migrations


async def test_ten_migrations_at_once_end(servers: Servers, pooler: PgBouncer) -> None:
    async with databases.database(servers.admin_url) as url:
        env = {**os.environ, "TRELLIS_DATABASE_URL": pooler.url(url)}
        ends = await asyncio.gather(*(trellis(env, "migrate") for _ in range(10)))
        assert [(code, printed) for code, printed, _ in ends] == [(0, f"the schema is at {SCHEMA_VERSION}\n")] * 10
        assert await advisory_locks(url) == 0


async def test_a_migration_that_was_killed_leaves_no_lock(servers: Servers, pooler: PgBouncer) -> None:
    async with databases.database(servers.admin_url) as url:
        holder = await asyncpg.connect(url)
        try:
            await asyncio.to_thread(migrate, url)
            await asyncio.to_thread(downgrade, url, "0002")
            async with holder.transaction():
                # What the migration waits for, with its lock taken.
                await holder.execute("LOCK TABLE orders IN SHARE MODE")
                process = await asyncio.create_subprocess_exec(
                    *(sys.executable, "-m", "app", "migrate"),
                    env={**os.environ, "TRELLIS_DATABASE_URL": pooler.url(url)},
                )
                await until(lambda: advisory_locks(url), "the migration to begin")
                process.kill()
                await process.wait()

                async def free() -> bool:
                    return await advisory_locks(url) == 0

                await until(free, "the lock to be free")
        finally:
            await holder.close()
        assert await asyncio.to_thread(migrate, pooler.url(url), lock_wait=20) == SCHEMA_VERSION


async def advisory_locks(url: str) -> int:
    connection = await asyncpg.connect(url)
    try:
        found: int = await connection.fetchval(
            "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND database = "
            "(SELECT oid FROM pg_database WHERE datname = current_database())"
        )
        return found
    finally:
        await connection.close()


async def test_who_holds_the_lock_is_said_through_a_pooler(servers: Servers, pooler: PgBouncer) -> None:
    from tests.test_migrations import lock_of_migrations

    async with databases.database(servers.admin_url) as url:
        holder = await asyncpg.connect(url, server_settings={"application_name": "somebody"})
        try:
            await holder.execute("SELECT pg_advisory_lock($1)", lock_of_migrations())
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-c"),
                "from app.cli import edge, main; import app.db.pool as d, functools; "
                "d.migrate = functools.partial(d.migrate, lock_wait=1); main.main()",
                "migrate",
                env={**os.environ, "TRELLIS_DATABASE_URL": pooler.url(url)},
                stderr=asyncio.subprocess.PIPE,
            )
            _, said = await asyncio.wait_for(process.communicate(), 60)
            assert process.returncode == 4
            assert f"held by pid {holder.get_server_pid()}, somebody" in said.decode().strip().splitlines()[-1]
        finally:
            await holder.close()


async def test_a_migration_whose_lock_was_lost_is_not_written_down(servers: Servers, transactions: PgBouncer) -> None:
    """A pooler that ends idle transactions, while the migration waits for a table."""
    async with databases.database(servers.admin_url) as url:
        await asyncio.to_thread(migrate, url)
        await asyncio.to_thread(downgrade, url, "0002")
        holder, admin = await asyncpg.connect(url), await asyncpg.connect(url)
        try:
            async with holder.transaction():
                await holder.execute("LOCK TABLE orders IN SHARE MODE")
                migrating = asyncio.create_task(asyncio.to_thread(migrate, transactions.url(url)))
                await until(lambda: advisory_locks(url), "the migration to begin")
                await admin.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory' AND database = "
                    "(SELECT oid FROM pg_database WHERE datname = current_database())"
                )
            with pytest.raises(DatabaseUnavailable, match="run it again"):
                await asyncio.wait_for(migrating, 60)
            assert await admin.fetchval("SELECT version_num FROM alembic_version") == "0002"
        finally:
            await holder.close()
            await admin.close()
        assert await asyncio.to_thread(migrate, transactions.url(url)) == SCHEMA_VERSION


async def test_a_migration_leaves_nothing_behind_in_a_session(servers: Servers, transactions: PgBouncer) -> None:
    """Sessions of the pooler go to others afterwards."""
    async with databases.database(servers.admin_url) as url:
        await asyncio.to_thread(migrate, transactions.url(url))
        connections = [await asyncpg.connect(transactions.url(url), statement_cache_size=0) for _ in range(2)]
        try:
            for connection in connections:
                await connection.execute("BEGIN")
            # Both are open at once, so these are both sessions there are.
            for connection in connections:
                assert await connection.fetchval("SHOW lock_timeout") == "0"
                assert await connection.fetchval("SELECT count(*) FROM pg_prepared_statements WHERE name <> ''") == 0
        finally:
            for connection in connections:
                await connection.close()


# --- gauges


async def test_one_process_reads_the_gauges_through_a_pooler(
    settings: Settings, pooler: PgBouncer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also after the one before was broken off: a lock of its session would stay in the pooler for good."""
    monkeypatch.setattr(gauges, "INTERVAL", 0.05)
    given = through(pooler, settings)
    for orders_in_all in (1, 2):
        async with create_pool(settings) as pool:
            await pool.execute("INSERT INTO orders (id, state) VALUES ($1, 'received')", uuid.uuid4().hex)
        metrics.ORDER_GAUGES.clear()
        reading = asyncio.create_task(gauges._read_as(uuid.uuid4().hex, given))

        async def published(expected: int = orders_in_all) -> bool:
            samples = [sample for family in metrics.ORDER_GAUGES.collect() for sample in family.samples]
            return any(s.name == "trellis_orders_open" and s.value == expected for s in samples)

        await until(published, "the gauges to be read")
        with monkeypatch.context() as gone:
            gone.setattr(gauges, "_leave", broken_off)
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)


async def broken_off(*_: object) -> None:
    """As by `kill -9`."""
