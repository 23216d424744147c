"""PostgreSQL: the pool, the schema, and waiting for both."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import ssl
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final

import asyncpg
import structlog
from opentelemetry.instrumentation.utils import suppress_instrumentation
from pydantic_core import to_json

from app.db import pooler
from app.db.pooler import Pooler
from app.domain import database_url
from app.errors import DatabaseUnavailable, TrellisError
from app.telemetry import metrics
from app.telemetry.supervision import pauses

if TYPE_CHECKING:
    import psycopg
    from alembic.config import Config

    from app.settings import Settings

#: The migration this code needs. Revisions are ordered as text, so a newer schema serves an older release.
SCHEMA_VERSION: Final = "0007"

#: What may be better in a moment, for an `except`: what `Pool` and `connect` raise, and what a driver alone does.
UNAVAILABLE: Final = (
    DatabaseUnavailable,
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


# --- what may be better in a moment

#: Classes of SQLSTATE that say "not now": connection lost, authorization refused (a password is being changed), a
#: transaction that another one stood in the way of, resources used up, an operator's intervention.
_LATER_CLASSES: Final = frozenset({"08", "28", "40", "53", "57"})

#: The same of single states.
_LATER: Final = frozenset(
    {
        "25006",  # read-only: a standby that is being promoted
        "25P03",  # idle in transaction for too long: we were stopped in the middle
        "25P04",  # the whole transaction took too long
        "26000",  # no such prepared statement: a pooler has led to another session,
        "3D000",  # no such database yet
        "42P05",  # or to one that has it from somebody else
        "42P01",  # no such table yet: it waits for the migration,
        "42703",  # or for the next one
        "55006",  # in use
        "55P03",  # locked
    }
)


def is_unavailable(error: BaseException) -> bool:
    """Whether the same may well succeed in a moment, whatever in the database stands in its way now."""
    if isinstance(error, asyncpg.PostgresError):
        state = error.sqlstate or ""
        return (
            state[:2] in _LATER_CLASSES
            or state in _LATER
            # A plan of before a migration; the next use makes another.
            or isinstance(error, asyncpg.InvalidCachedStatementError)
        )
    if isinstance(error, ValueError):
        return False  # the driver's word for arguments that cannot be sent, which are an `InterfaceError` as well
    return isinstance(
        error, (DatabaseUnavailable, asyncpg.InterfaceError, asyncpg.InternalClientError, OSError, TimeoutError)
    )


def is_refusal(error: BaseException) -> bool:
    """Whether the server has answered, and will not have us: a wrong password, or TLS that it lacks or that does not
    prove who it is; or a pooler that does not take what the URL asks for. A process that runs waits for a better day; a
    command ends, as somebody has to do something."""
    cause = error.__cause__ if isinstance(error, DatabaseUnavailable) else error
    if pooler.is_refusal(cause):
        return True
    if isinstance(cause, asyncpg.PostgresError):
        return (cause.sqlstate or "").startswith("28")
    # asyncpg raises the bare one when the server has no TLS, the system only its subclasses.
    return isinstance(cause, ssl.SSLError) or type(cause) is ConnectionError


@contextmanager
def translated(*, connecting: bool = False) -> Generator[None]:
    """Raises `DatabaseUnavailable` for what the driver raises inside, if that means "not now".

    Args:
        connecting: then whatever goes wrong means that, for a process that runs.
    """
    try:
        yield
    except TrellisError:
        raise
    except Exception as error:
        if connecting or is_unavailable(error):
            raise DatabaseUnavailable(_kind(error)) from error
        raise


def _kind(error: BaseException) -> str:
    return type(error).__name__


def reason(error: BaseException) -> str:
    """Why the database is not available, for the log and for an operator: the server's words where it has let nobody
    in, as there is no row yet that they could quote."""
    cause = error.__cause__ if isinstance(error, DatabaseUnavailable) and error.__cause__ else error
    words = "; ".join(filter(None, (str(cause).partition("\n")[0][:200], pooler.advice(cause))))
    if words:
        return f"{_kind(cause)}: {words}"
    return (error.detail if isinstance(error, DatabaseUnavailable) else "") or _kind(cause)


# --- connections

#: Seconds that a process which has nothing else to do waits for its first answer.
_FIRST_ANSWER: Final = 10.0

_patience: ContextVar[float | None] = ContextVar("patience", default=None)


@contextmanager
def patience(seconds: float | None) -> Iterator[None]:
    """Whoever needs a connection inside waits for it as long as this, in place of the setting; None: the setting."""
    token = _patience.set(seconds)
    try:
        yield
    finally:
        _patience.reset(token)


#: The limit of the wait that this task is in.
_waiting: ContextVar[asyncio.Timeout | None] = ContextVar("waiting", default=None)


async def _connect(*arguments: Any, way: Pooler, timeout: float, **options: Any) -> asyncpg.Connection:
    """The pool's, within a wait for a connection: the pool has had room, and its limit is over. What is waited for from
    here on is PostgreSQL. To give that up as early would mean, on a slow machine, to begin again without end."""
    limit, ends = _waiting.get(), asyncio.get_running_loop().time() + timeout
    if limit is not None and (limit.when() or 0.0) < ends:
        limit.reschedule(ends)
    return await way.connect(*arguments, timeout=timeout, **options)


class Pool(asyncpg.Pool):
    """asyncpg's, with a limit to every wait for a connection, and what is not available raised as one kind of error.

    The limit is that of the wait for one that is free; where there is room for another, it has its own time to connect.
    `fetch`, `execute` and their like take their connection by `acquire` as well, so that no caller can forget either.

    Raises:
        DatabaseUnavailable: from every method. Nothing that is raised while connecting says more than "not now".
    """

    def __init__(self, *arguments: Any, acquire_timeout: float, way: Pooler, **options: Any) -> None:
        super().__init__(*arguments, connect=partial(_connect, way=way), **options)
        self._acquire_timeout = acquire_timeout
        self._way = way

    def acquire(self, *, timeout: float | None = None) -> _Acquired:  # type: ignore[override] # it does what that does
        return _Acquired(super().acquire(), timeout or _patience.get() or self._acquire_timeout, self._learn)

    async def _learn(self, error: BaseException | None) -> None:
        """Give up connections that lead to where no further one is to lead: into a mixed-up session, or to a server
        that is a standby by now, where each would answer but write nothing."""
        if self._way.betrayed_by(error) or isinstance(error, asyncpg.ReadOnlySQLTransactionError):
            await self.expire_connections()

    async def release(self, connection: Any, *, timeout: float | None = None) -> None:
        """With a limit to the wait for what was broken off on it."""
        await super().release(connection, timeout=timeout or _patience.get() or self._acquire_timeout)


class _Acquired:
    def __init__(
        self, acquiring: Any, seconds: float, learn: Callable[[BaseException | None], Awaitable[None]]
    ) -> None:
        self._acquiring, self._seconds, self._learn = acquiring, seconds, learn

    async def __aenter__(self) -> Connection:
        async with self._limited():
            connection: Connection = await self._acquiring.__aenter__()
            return connection

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, stack: TracebackType | None
    ) -> None:
        await self._learn(error)
        with translated():
            await self._acquiring.__aexit__(kind, error, stack)
        if error is not None and not isinstance(error, TrellisError) and is_unavailable(error):
            raise DatabaseUnavailable(_kind(error)) from error

    def __await__(self) -> Generator[Any, None, Connection]:
        return self._connection().__await__()

    async def _connection(self) -> Connection:
        async with self._limited():
            connection: Connection = await self._acquiring
            return connection

    @asynccontextmanager
    async def _limited(self) -> AsyncGenerator[None]:
        with translated(connecting=True):
            async with asyncio.timeout(self._seconds) as limit:
                token = _waiting.set(limit)
                try:
                    yield
                finally:
                    _waiting.reset(token)


def create_pool(settings: Settings) -> Pool:
    """A pool that connects when it is first used, so that a process can start before its database does.

    Raises:
        InvalidDatabaseUrl: the URL cannot be read. `Settings` have checked it.
    """
    way = Pooler(settings.database_pooler)
    pool = Pool(
        **_options(settings, "trellis"),
        acquire_timeout=settings.database_acquire_timeout,
        way=way,
        min_size=0,
        max_size=settings.database_pool_size,
        init=partial(_initialize, settings=settings, way=way),
        reset=_keep_session,
        # As `asyncpg.create_pool` has them, which makes no other class than its own.
        max_queries=50_000,
        max_inactive_connection_lifetime=300.0,
        connection_class=asyncpg.Connection,
        record_class=asyncpg.Record,
        loop=None,
    )
    metrics.watch_pool(pool)
    return pool


async def connect(settings: Settings, application_name: str) -> asyncpg.Connection:
    """A connection of its own, beside the pool, for the caller to close.

    Raises:
        DatabaseUnavailable: there is none to be had now.
    """
    with translated(connecting=True):
        return await Pooler(settings.database_pooler).connect(**_options(settings, application_name))


def _options(settings: Settings, application_name: str) -> dict[str, Any]:
    address, timeout = database_url.read(settings.database_url.get_secret_value()), settings.database_statement_timeout
    options = address.for_asyncpg(settings.database_password_file)
    options["server_settings"] = {"application_name": application_name} | options["server_settings"]
    return options | {"timeout": min(address.connect_timeout or timeout, timeout), "command_timeout": timeout}


async def _keep_session(_connection: object) -> None:
    """A connection that comes back to the pool: asyncpg has ended its transaction, and nothing here changes anything
    else of a session. Its own reset would be one more statement for every use."""


#: What waits for a lock fails after a moment rather than hold a connection that others wait for; unless the role or the
#: URL has set another time.
_LOCK_TIMEOUT: Final = "SELECT set_config('lock_timeout', $1, false) WHERE current_setting('lock_timeout') = '0'"

_SOCKET_OPTIONS: Final = {
    "keepalives": (socket.SOL_SOCKET, "SO_KEEPALIVE"),
    "keepalives_idle": (socket.IPPROTO_TCP, "TCP_KEEPIDLE"),
    "keepalives_interval": (socket.IPPROTO_TCP, "TCP_KEEPINTVL"),
    "keepalives_count": (socket.IPPROTO_TCP, "TCP_KEEPCNT"),
    "tcp_user_timeout": (socket.IPPROTO_TCP, "TCP_USER_TIMEOUT"),
}


async def _initialize(connection: asyncpg.Connection, *, settings: Settings, way: Pooler) -> None:
    if not way.shares_sessions:  # where they are, the time would be somebody else's, and the role has to have it
        with suppress_instrumentation():
            await connection.execute(_LOCK_TIMEOUT, f"{settings.database_acquire_timeout * 1000:.0f}ms")
    _keep_alive(connection, database_url.read(settings.database_url.get_secret_value()).socket_options)
    await _prepare_connection(connection)


async def _prepare_connection(connection: asyncpg.Connection) -> None:
    await connection.set_type_codec(
        "jsonb", schema="pg_catalog", encoder=lambda value: to_json(value).decode(), decoder=json.loads
    )
    connection.add_query_logger(metrics.query_ended)


def _keep_alive(connection: asyncpg.Connection, options: Mapping[str, int]) -> None:
    """libpq does it by itself; asyncpg hands out neither its socket nor an option for it."""
    used = connection._transport.get_extra_info("socket") if options else None  # type: ignore[attr-defined] # noqa: SLF001
    if used is None or used.family == socket.AF_UNIX:
        return
    for name, value in options.items():
        level, option = _SOCKET_OPTIONS[name]
        if hasattr(socket, option):  # not every system has all of them
            used.setsockopt(level, getattr(socket, option), value)


def libpq_connection(url: str, password_file: Path | None = None) -> psycopg.Connection:
    """A connection of libpq, with nothing of the environment but what `database_url` takes from it.

    Raises:
        psycopg.OperationalError: there is none to be had.
    """
    import psycopg

    given = {"connect_timeout": "10", "fallback_application_name": "trellis-migrate"}
    given |= database_url.read(url).for_libpq(password_file)
    with _no_libpq_variables():
        # Prepared by itself after five times, a statement would be met in other sessions of a pooler.
        return psycopg.connect(**given, prepare_threshold=None)  # type: ignore[arg-type] # each is a string


@contextmanager
def _no_libpq_variables() -> Iterator[None]:
    """libpq has no other way to be asked without them: what is empty counts as not given, and some lead elsewhere."""
    with _environment:
        kept = {name: os.environ.pop(name) for name in list(os.environ) if name.startswith("PG")}
        try:
            yield
        finally:
            os.environ.update(kept)


_environment: Final = threading.Lock()


def migrate(database_url: str, *, password_file: Path | None = None, lock_wait: float = 600) -> str:
    """Bring the schema to this release's, and leave a newer one alone; the revision it is at afterwards.

    Waits for another process that is migrating, `lock_wait` seconds at most; repeating it is harmless.

    Raises:
        DatabaseUnavailable: another process holds the lock of the migration for longer than that.
        sqlalchemy.exc.OperationalError: the database cannot be reached.
    """
    from alembic import command

    config = _alembic_config(database_url)
    config.attributes["password_file"] = password_file
    config.attributes["lock_wait"] = lock_wait
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


async def wait_until_answering(pool: asyncpg.Pool, *, through_refusals: bool = True) -> str | None:
    """The schema's revision, as soon as the database answers; says in the log that and why it does not yet.

    Raises:
        DatabaseUnavailable: it refuses us (`is_refusal`), and the caller does not want to wait for that.
    """
    for pause in pauses():
        try:
            with suppress_instrumentation(), patience(_FIRST_ANSWER):
                return await schema_version(pool)
        except DatabaseUnavailable as error:
            if is_refusal(error) and not through_refusals:
                raise
            log.warning("waiting for PostgreSQL", error=error.detail, reason=reason(error), retry_in_seconds=pause)
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
