"""Alembic's entry: one connection, one lock, one transaction per migration."""

from __future__ import annotations

import time
from functools import partial

import structlog
from alembic import context
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Connection, create_engine, pool, text

from app.db import libpq_connection
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

log = structlog.get_logger("trellis.migrate")

config = context.config


def migrate_online() -> None:
    # SQLAlchemy's own reading of a URL knows no list of hosts and no `postgres://`.
    url = config.attributes["url"]
    engine = create_engine("postgresql+psycopg://", creator=partial(libpq_connection, url), poolclass=pool.NullPool)
    with engine.connect() as connection:
        _become_the_one(connection)
        newer = _is_newer(connection)
        connection.commit()
        if not newer:
            context.configure(connection=connection, transaction_per_migration=True)
            with context.begin_transaction():
                context.run_migrations()
        # For whoever asked for it.
        config.attributes["revision"] = _revision(connection)
        # The lock ends with the connection.


def _become_the_one(connection: Connection) -> None:
    """Wait for another process that migrates, for so long as one may take; saying so, and who it is.

    By asking again: a session that waits in PostgreSQL has a snapshot, and an index that the other one builds
    concurrently waits for that to end.

    Raises:
        DatabaseUnavailable: somebody holds the lock for good.
    """
    for waits_left in range(int(config.attributes.get("lock_wait", 600) / WAIT_SECONDS), -1, -1):
        taken = connection.execute(text("SELECT pg_try_advisory_lock(:lock)"), {"lock": LOCK}).scalar()
        connection.commit()
        if taken:
            return
        if waits_left % SAY_EVERY == 0:
            log.warning("another process migrates, or holds its lock", process=_holder(connection))
        time.sleep(WAIT_SECONDS)
    raise DatabaseUnavailable(f"the lock of the migration is held by {_holder(connection)}")


def _holder(connection: Connection) -> str:
    """Who that is, as an operator finds it."""
    found = connection.execute(HOLDER, {"lock": LOCK}).first()
    connection.rollback()
    return f"pid {found[0]}, {found[1]}, since {found[2]:%Y-%m-%d %H:%M:%S %Z}" if found else "gone by now"


def _is_newer(connection: Connection) -> bool:
    """Whether the way up leads down. A release that was rolled back finds the schema of the one after it: that
    serves it as well (`db.SCHEMA_VERSION`), and only the newer one knows the way back."""
    found, head = _revision(connection), context.get_head_revision()
    return found is not None and context.get_revision_argument() == head and found > str(head)


def _revision(connection: Connection) -> str | None:
    return MigrationContext.configure(connection).get_current_revision()


migrate_online()
