"""PostgreSQL: the pool, the schema, and waiting for both."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final

import asyncpg
import structlog
from opentelemetry.instrumentation.utils import suppress_instrumentation
from pydantic_core import to_json

from app import metrics

if TYPE_CHECKING:
    from alembic.config import Config

    from app.settings import Settings

#: The migration this code needs. Revisions are ordered as text, so a newer schema serves an older release.
SCHEMA_VERSION: Final = "0005"

#: What asyncpg raises when the database is not there, is going away, or is not migrated yet.
UNAVAILABLE: Final = (
    asyncpg.PostgresConnectionError,
    asyncpg.CannotConnectNowError,
    asyncpg.AdminShutdownError,
    asyncpg.CrashShutdownError,
    asyncpg.TooManyConnectionsError,
    asyncpg.QueryCanceledError,
    asyncpg.UndefinedTableError,
    asyncpg.InvalidCatalogNameError,
    asyncpg.ReadOnlySQLTransactionError,
    asyncpg.InternalClientError,
    asyncpg.InterfaceError,
    OSError,
    TimeoutError,
)

Connection = asyncpg.Connection | asyncpg.pool.PoolConnectionProxy

log = structlog.get_logger(__name__)


def create_pool(settings: Settings) -> asyncpg.Pool:
    """A pool that connects when it is first used, so that a process can start before its database does."""
    pool = asyncpg.create_pool(
        settings.database_url.get_secret_value(),
        min_size=0,
        max_size=settings.database_pool_size,
        command_timeout=settings.database_statement_timeout,
        timeout=settings.database_statement_timeout,
        init=_prepare_connection,
        reset=_keep_session,
        server_settings={"application_name": "trellis"},
    )
    metrics.watch_pool(pool)
    return pool


async def _keep_session(_connection: object) -> None:
    """A connection that comes back to the pool: asyncpg has ended its transaction, and nothing here changes anything
    else of a session. Its own reset would be one more statement for every use."""


async def _prepare_connection(connection: asyncpg.Connection) -> None:
    await connection.set_type_codec(
        "jsonb", schema="pg_catalog", encoder=lambda value: to_json(value).decode(), decoder=json.loads
    )
    connection.add_query_logger(metrics.query_ended)


def migrate(database_url: str) -> str:
    """Bring the schema to this release's, and leave a newer one alone; the revision it is at afterwards.

    Waits for another process that is migrating; repeating it is harmless.

    Raises:
        sqlalchemy.exc.OperationalError: the database cannot be reached.
    """
    from alembic import command

    config = _alembic_config(database_url)
    command.upgrade(config, "head")
    revision: str = config.attributes["revision"]
    return revision


def downgrade(database_url: str, revision: str) -> None:
    """Take the schema back to `revision`, `base` being the empty database. Data of dropped tables are lost."""
    from alembic import command

    command.downgrade(_alembic_config(database_url), revision)


def _alembic_config(database_url: str) -> Config:
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    config.attributes["url"] = database_url
    return config


async def schema_version(pool: asyncpg.Pool) -> str | None:
    """The revision the database is at; None before the first migration."""
    if await pool.fetchval("SELECT to_regclass('alembic_version') IS NULL"):
        return None
    version: str | None = await pool.fetchval("SELECT version_num FROM alembic_version")
    return version


async def wait_until_answering(pool: asyncpg.Pool) -> str | None:
    """The schema's revision, as soon as the database answers; says in the log that and why it does not yet."""
    for pause in pauses():
        try:
            with suppress_instrumentation():
                return await schema_version(pool)
        except UNAVAILABLE as error:
            log.warning("waiting for PostgreSQL", error=type(error).__name__, retry_in_seconds=pause)
        await asyncio.sleep(pause)
    raise AssertionError("unreachable: the pauses never end")


async def wait_until_migrated(pool: asyncpg.Pool) -> None:
    """Return when the database answers and its schema is new enough; says in the log what it waits for."""
    for pause in pauses():
        version = await wait_until_answering(pool)
        if version is not None and version >= SCHEMA_VERSION:
            return
        log.warning("waiting for `trellis migrate`", found=version, needed=SCHEMA_VERSION, retry_in_seconds=pause)
        await asyncio.sleep(pause)


def pauses() -> Iterator[float]:
    """Seconds between two tries: soon at first, then every five seconds."""
    yield from (0.2, 0.4, 0.8, 1.6, 3.2)
    yield from itertools.repeat(5.0)
