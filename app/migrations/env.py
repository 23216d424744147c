"""Alembic's entry: one connection, one lock, one transaction per migration."""

from __future__ import annotations

from alembic import context
from sqlalchemy import create_engine, pool, text

# Any constant will do; it keeps two migrating processes apart in one database.
LOCK = 7_217_001

config = context.config


def migrate_online() -> None:
    engine = create_engine(config.attributes["url"], poolclass=pool.NullPool)
    with engine.connect() as connection:
        connection.execute(text("SELECT pg_advisory_lock(:lock)"), {"lock": LOCK})
        connection.commit()
        context.configure(connection=connection, transaction_per_migration=True)
        with context.begin_transaction():
            context.run_migrations()
        # The lock ends with the connection.


migrate_online()
