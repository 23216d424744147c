"""Alembic's entry: one connection, one lock, one transaction per migration."""

from __future__ import annotations

from functools import partial

from alembic import context
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Connection, create_engine, pool, text

from app.db import libpq_connection

# Any constant will do; it keeps two migrating processes apart in one database.
LOCK = 7_217_001

config = context.config


def migrate_online() -> None:
    # SQLAlchemy's own reading of a URL knows no list of hosts and no `postgres://`.
    url = config.attributes["url"]
    engine = create_engine("postgresql+psycopg://", creator=partial(libpq_connection, url), poolclass=pool.NullPool)
    with engine.connect() as connection:
        connection.execute(text("SELECT pg_advisory_lock(:lock)"), {"lock": LOCK})
        newer = _is_newer(connection)
        connection.commit()
        if not newer:
            context.configure(connection=connection, transaction_per_migration=True)
            with context.begin_transaction():
                context.run_migrations()
        # For whoever asked for it.
        config.attributes["revision"] = _revision(connection)
        # The lock ends with the connection.


def _is_newer(connection: Connection) -> bool:
    """Whether the way up leads down. A release that was rolled back finds the schema of the one after it: that
    serves it as well (`db.SCHEMA_VERSION`), and only the newer one knows the way back."""
    found, head = _revision(connection), context.get_head_revision()
    return found is not None and context.get_revision_argument() == head and found > str(head)


def _revision(connection: Connection) -> str | None:
    return MigrationContext.configure(connection).get_current_revision()


migrate_online()
