"""Alembic's entry: one connection that works, one that holds the lock, one transaction per migration."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import structlog
from alembic import context
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Connection, Engine, create_engine, pool, text
from sqlalchemy.exc import DBAPIError

from app.db.pool import libpq_connection
from app.errors import DatabaseUnavailable

# Any constant will do; it keeps two migrating processes apart in one database.
LOCK = 7_217_001

#: Seconds between two tries to be the one that migrates, and tries between two lines about it.
WAIT_SECONDS = 0.5
SAY_EVERY = 20

HOLDER = text("""
    SELECT pid, coalesce(nullif(application_name, ''), 'an unnamed program'), backend_start
    FROM pg_locks JOIN pg_stat_activity USING (pid)
    WHERE locktype = 'advisory' AND granted AND pg_locks.database = (SELECT oid FROM pg_database
        WHERE datname = current_database()) AND classid = 0 AND objid = :lock
""")

#: The transaction that holds the lock is idle while the other one works. PostgreSQL 16 has only the first of them.
NO_LIMITS = text("""
    SELECT set_config(name, '0', true) FROM pg_settings
    WHERE name IN ('idle_in_transaction_session_timeout', 'transaction_timeout')
""")

log = structlog.get_logger("trellis.migrate")

config = context.config


def migrate_online() -> None:
    # SQLAlchemy's own reading of a URL knows no list of hosts and no `postgres://`.
    connecting = partial(libpq_connection, config.attributes["url"], config.attributes.get("password_file"))
    engine = create_engine("postgresql+psycopg://", creator=connecting, poolclass=pool.NullPool)
    with _the_one(engine) as keeper, engine.connect() as connection:
        newer = _is_newer(connection)
        connection.commit()
        if not newer:
            context.configure(
                connection=connection, transaction_per_migration=True, on_version_apply=partial(_still_the_one, keeper)
            )
            with context.begin_transaction():
                context.run_migrations()
        # For whoever asked for it.
        config.attributes["revision"] = _revision(connection)


@contextmanager
def _the_one(engine: Engine) -> Iterator[Connection]:
    """A connection whose open transaction holds the lock. Waits for another process that migrates, for so long as one
    may take; saying so, and who it is.

    A transaction on a connection of its own, as a pooler may give the next one another session: a session's lock would
    stay behind there. By asking again, with nothing open in between: an index that is built concurrently waits for who
    has a snapshot, as those do who wait for a lock, and a pooler has only so many connections.

    Raises:
        DatabaseUnavailable: somebody holds the lock for good.
    """
    for waits_left in range(int(config.attributes.get("lock_wait", 600) / WAIT_SECONDS), -1, -1):
        # Not as the role may have it: a snapshot for as long as the lock would keep an index waiting for ever.
        with engine.connect().execution_options(isolation_level="READ COMMITTED") as connection:
            if connection.execute(text("SELECT pg_try_advisory_xact_lock(:lock)"), {"lock": LOCK}).scalar():
                connection.execute(NO_LIMITS)
                yield connection
                return
            if waits_left % SAY_EVERY == 0:
                holder = _holder(connection)
                log.warning("another process migrates, or holds its lock", process=holder)
        if waits_left:
            time.sleep(WAIT_SECONDS)
    raise DatabaseUnavailable(f"the lock of the migration is held by {holder}")


def _still_the_one(keeper: Connection, **_: object) -> None:
    """Ask before a migration is written down as done.

    Raises:
        DatabaseUnavailable: the lock's connection was closed in between; the migration can be run again.
    """
    try:
        keeper.execute(text("SELECT 1"))
    except DBAPIError:
        raise DatabaseUnavailable(
            "the connection that held the lock of the migration was closed, as by a pooler's idle_transaction_timeout; "
            "run it again"
        ) from None


def _holder(connection: Connection) -> str:
    """Who that is, as an operator finds it."""
    found = connection.execute(HOLDER, {"lock": LOCK}).first()
    return f"pid {found[0]}, {found[1]}, since {found[2]:%Y-%m-%d %H:%M:%S %Z}" if found else "gone by now"


def _is_newer(connection: Connection) -> bool:
    """Whether the way up leads down. A release that was rolled back finds the schema of the one after it: that
    serves it as well (`db.SCHEMA_VERSION`), and only the newer one knows the way back."""
    found, head = _revision(connection), context.get_head_revision()
    return found is not None and context.get_revision_argument() == head and found > str(head)


def _revision(connection: Connection) -> str | None:
    return MigrationContext.configure(connection).get_current_revision()


migrate_online()
