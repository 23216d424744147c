"""Migrations: up, down, at once, half-way, and with a schema that is newer than the code."""

from __future__ import annotations

import asyncio
import os
import sys
import uuid
from collections.abc import AsyncIterator, MutableMapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import asyncpg
import httpx
import pytest
import sqlalchemy.exc
from alembic import command
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from structlog.testing import capture_logs

from app import db
from app.local.processes import free_port
from app.order.models import OrderInput, StartOrder
from app.order.repository import OrderRepository
from app.settings import Settings

if TYPE_CHECKING:
    from conftest import Servers

#: Everything in the schema that the product relies on, a line each.
SCHEMA = """
SELECT 'column ' || table_name || '.' || column_name || ' ' || data_type || ' null:' || is_nullable || ' '
       || coalesce(column_default, '') AS line
FROM information_schema.columns WHERE table_schema = 'public' AND table_name <> 'alembic_version'
UNION ALL
SELECT 'constraint ' || conrelid::regclass || ' ' || conname || ' ' || pg_get_constraintdef(oid)
FROM pg_constraint
WHERE connamespace = 'public'::regnamespace AND conrelid <> coalesce(to_regclass('alembic_version'), 0)
UNION ALL
SELECT indexdef FROM pg_indexes WHERE schemaname = 'public' AND tablename <> 'alembic_version'
UNION ALL
SELECT pg_get_triggerdef(oid) FROM pg_trigger WHERE NOT tgisinternal
UNION ALL
SELECT 'function ' || proname || ' ' || prosrc FROM pg_proc WHERE pronamespace = 'public'::regnamespace
"""


def revisions() -> list[str]:
    """All revisions, oldest first."""
    scripts = ScriptDirectory.from_config(db._alembic_config("postgresql://"))
    return [script.revision for script in scripts.walk_revisions()][::-1]


def upgrade_to(url: str, revision: str) -> None:
    command.upgrade(db._alembic_config(url), revision)


@asynccontextmanager
async def connected(url: str) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(url)
    try:
        await db._prepare_connection(connection)
        yield connection
    finally:
        await connection.close()


async def schema_of(url: str) -> set[str]:
    async with connected(url) as connection:
        return {row["line"] for row in await connection.fetch(SCHEMA)}


@asynccontextmanager
async def pool_of(url: str) -> AsyncIterator[asyncpg.Pool]:
    async with db.create_pool(Settings(database_url=url)) as pool:
        yield pool


async def fill(url: str) -> None:
    """One order that is through, in columns that were there from the beginning."""
    async with connected(url) as connection:
        await connection.execute("""
            INSERT INTO orders (id, state, payment_id, total, address_json)
            VALUES ('o-1', 'shipped', 'pay-1', 50, '{"line1": "1 Main St"}');
            INSERT INTO payments (payment_id, order_id, status, amount, asked)
            VALUES ('pay-1', 'o-1', 'CHARGED', 50, 50);
            INSERT INTO events (order_id, type) VALUES ('o-1', 'received'), ('o-1', 'shipped');
        """)


async def rows_of(url: str) -> list[tuple[object, ...]]:
    """What `fill` wrote."""
    async with connected(url) as connection:
        rows = await connection.fetch("""
            SELECT orders.id, state, total, address_json, payments.status, amount, array_agg(type ORDER BY events.id)
            FROM orders JOIN payments ON order_id = orders.id JOIN events ON events.order_id = orders.id
            GROUP BY orders.id, payments.payment_id
        """)
        return [tuple(row) for row in rows]


# --- the chain ----------------------------------------------------------------------------------------------


def test_code_needs_the_newest_revision() -> None:
    scripts = ScriptDirectory.from_config(db._alembic_config("postgresql://"))
    assert scripts.get_heads() == [db.SCHEMA_VERSION]
    assert revisions()[-1] == db.SCHEMA_VERSION


def test_revisions_are_ordered_as_text() -> None:
    """A release compares what it finds with what it needs, also a revision that it has never heard of."""
    assert revisions() == sorted(revisions())
    assert len({len(revision) for revision in revisions()}) == 1


# --- up and down --------------------------------------------------------------------------------------------


async def test_up_down_and_up_again(empty_database_url: str) -> None:
    before = await schema_of(empty_database_url)
    async with pool_of(empty_database_url) as pool:
        assert await db.schema_version(pool) is None
        await asyncio.to_thread(db.migrate, empty_database_url)
        assert await db.schema_version(pool) == db.SCHEMA_VERSION
        migrated = await schema_of(empty_database_url)
        assert migrated - before
        await asyncio.to_thread(db.downgrade, empty_database_url, "base")
        assert await db.schema_version(pool) is None
        assert await schema_of(empty_database_url) == before
        await asyncio.to_thread(db.migrate, empty_database_url)
        assert await schema_of(empty_database_url) == migrated


async def test_every_revision_goes_up_and_down_with_orders_in_the_tables(empty_database_url: str) -> None:
    first, *later = revisions()
    await asyncio.to_thread(upgrade_to, empty_database_url, first)
    await fill(empty_database_url)
    filled = await rows_of(empty_database_url)
    assert len(filled) == 1
    schemas = [(first, await schema_of(empty_database_url))]
    for revision in later:
        await asyncio.to_thread(upgrade_to, empty_database_url, revision)
        assert await rows_of(empty_database_url) == filled
        schemas.append((revision, await schema_of(empty_database_url)))
    for revision, schema in schemas[-2::-1]:
        await asyncio.to_thread(db.downgrade, empty_database_url, revision)
        assert await rows_of(empty_database_url) == filled
        assert await schema_of(empty_database_url) == schema
    await asyncio.to_thread(db.migrate, empty_database_url)
    assert await rows_of(empty_database_url) == filled
    # Down to nothing is possible with orders in the tables, and takes them along.
    await asyncio.to_thread(db.downgrade, empty_database_url, "base")
    await asyncio.to_thread(db.migrate, empty_database_url)
    assert await rows_of(empty_database_url) == []
    await fill(empty_database_url)
    assert await rows_of(empty_database_url) == filled


async def test_migrating_again_changes_nothing(database_url: str) -> None:
    await fill(database_url)
    filled, schema = await rows_of(database_url), await schema_of(database_url)
    await asyncio.to_thread(db.migrate, database_url)
    assert await rows_of(database_url) == filled
    assert await schema_of(database_url) == schema


def test_a_database_that_is_not_there_is_said_so() -> None:
    with pytest.raises(sqlalchemy.exc.OperationalError):
        db.migrate(f"postgresql://trellis:trellis@127.0.0.1:{free_port()}/trellis")


# --- at once ------------------------------------------------------------------------------------------------


async def test_two_processes_that_migrate_at_once_both_succeed(empty_database_url: str, database_url: str) -> None:
    env = {**os.environ, "TRELLIS_DATABASE_URL": empty_database_url}
    processes = [
        await asyncio.create_subprocess_exec(
            sys.executable, "-m", "app", "migrate", env=env, stderr=asyncio.subprocess.PIPE
        )
        for _ in range(2)
    ]
    for process in processes:
        _, errors = await process.communicate()
        assert process.returncode == 0, errors.decode()
    assert await schema_of(empty_database_url) == await schema_of(database_url)


async def test_a_second_migration_waits_for_the_first(empty_database_url: str) -> None:
    from app.migrations import __path__ as migrations

    # Not imported: as a script of Alembic it migrates at once.
    source = (Path(migrations[0]) / "env.py").read_text()
    lock = next(int(line.split("=")[1]) for line in source.splitlines() if line.startswith("LOCK ="))
    async with connected(empty_database_url) as connection:
        await connection.execute("SELECT pg_advisory_lock($1)", lock)
        migrating = asyncio.create_task(asyncio.to_thread(db.migrate, empty_database_url))
        waits = "SELECT EXISTS (SELECT FROM pg_locks WHERE locktype = 'advisory' AND NOT granted)"
        async with asyncio.timeout(20):
            while True:
                if await connection.fetchval(waits):
                    break
                await asyncio.sleep(0.01)
        assert await connection.fetchval("SELECT to_regclass('orders') IS NULL")
        assert not migrating.done()
        await connection.execute("SELECT pg_advisory_unlock($1)", lock)
        await asyncio.wait_for(migrating, 20)
        assert await connection.fetchval("SELECT to_regclass('orders') IS NOT NULL")


# --- waiting ------------------------------------------------------------------------------------------------


async def until_said(logs: list[MutableMapping[str, Any]]) -> None:
    """Until there is a line in the log."""
    async with asyncio.timeout(20):
        while True:
            if logs:
                return
            await asyncio.sleep(0.01)


async def test_waiting_ends_when_the_schema_is_there(empty_database_url: str) -> None:
    async with pool_of(empty_database_url) as pool:
        with capture_logs() as logs:
            waiting = asyncio.create_task(db.wait_until_migrated(pool))
            await until_said(logs)
            assert not waiting.done()
            await asyncio.to_thread(db.migrate, empty_database_url)
            await asyncio.wait_for(waiting, 20)
        assert {entry["event"] for entry in logs if "waiting" in entry["event"]} == {"waiting for `trellis migrate`"}
        assert (logs[0]["found"], logs[0]["needed"]) == (None, db.SCHEMA_VERSION)


async def test_waiting_goes_on_while_the_database_is_not_there(servers: Servers, template: str) -> None:
    name = f"trellis_test_{uuid.uuid4().hex[:12]}"
    async with connected(servers.admin_url) as admin:
        async with pool_of(servers.url(name)) as pool:
            with capture_logs() as logs:
                waiting = asyncio.create_task(db.wait_until_migrated(pool))
                await until_said(logs)
                assert not waiting.done()
                await admin.execute(f'CREATE DATABASE "{name}" TEMPLATE "{template}"')
                await asyncio.wait_for(waiting, 20)
        assert {entry["event"] for entry in logs} == {"waiting for PostgreSQL"}
        await admin.execute(f'DROP DATABASE "{name}"')


async def test_an_older_schema_is_not_enough(database_url: str, api_alone: httpx.AsyncClient) -> None:
    assert (await api_alone.get("/readyz")).status_code == 200
    await asyncio.to_thread(db.downgrade, database_url, [*revisions(), "base"][-3])
    answer = await api_alone.get("/readyz")
    assert answer.status_code == 503
    assert "trellis migrate" in answer.json()["checks"]["database"]
    async with pool_of(database_url) as pool:
        with capture_logs() as logs:
            waiting = asyncio.create_task(db.wait_until_migrated(pool))
            await until_said(logs)
            assert not waiting.done()
            await asyncio.to_thread(db.migrate, database_url)
            await asyncio.wait_for(waiting, 20)


# --- an older release on a newer schema ---------------------------------------------------------------------


async def test_a_release_goes_on_while_and_after_a_newer_one_migrates(
    database_url: str, pool: asyncpg.Pool, api_alone: httpx.AsyncClient
) -> None:
    orders = OrderRepository(pool)
    await orders.receive(OrderInput(order_id="o-1", request=StartOrder(payment_id="pay-1")), "run-1")
    before = (await api_alone.get("/orders/o-1")).json()
    async with connected(database_url) as newer:
        # What the next release may do: add.
        await newer.execute("""
            ALTER TABLE orders ADD COLUMN gift_note TEXT;
            ALTER TABLE payments ADD COLUMN wallet TEXT NOT NULL DEFAULT 'card';
            CREATE TABLE gifts (order_id TEXT PRIMARY KEY REFERENCES orders (id));
            UPDATE alembic_version SET version_num = '9999';
        """)
    # Connections and prepared statements are those from before.
    assert (await api_alone.get("/orders/o-1")).json() == before
    await orders.receive(OrderInput(order_id="o-2", request=StartOrder(payment_id="pay-2")), "run-2")
    listed = (await api_alone.get("/orders")).json()["orders"]
    assert [order["order_id"] for order in listed] == ["o-2", "o-1"]
    assert (await api_alone.get("/readyz")).status_code == 200
    # And a process that starts now does not wait.
    async with pool_of(database_url) as fresh:
        await asyncio.wait_for(db.wait_until_migrated(fresh), 20)


async def test_migrating_leaves_a_newer_schema_alone(database_url: str) -> None:
    """What a deployment does that is rolled back."""
    await fill(database_url)
    async with connected(database_url) as newer:
        await newer.execute(
            "ALTER TABLE orders ADD COLUMN gift_note TEXT; UPDATE alembic_version SET version_num = '9999'"
        )
    schema = await schema_of(database_url)
    await asyncio.to_thread(db.migrate, database_url)
    assert await schema_of(database_url) == schema
    async with pool_of(database_url) as pool:
        assert await db.schema_version(pool) == "9999"
    # Only the newer release knows the way back.
    with pytest.raises(CommandError, match="9999"):
        await asyncio.to_thread(db.downgrade, database_url, "base")
    assert len(await rows_of(database_url)) == 1
