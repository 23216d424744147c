"""A pooler between us and PostgreSQL, such as PgBouncer, and what a connection through one has to do without.

In transaction mode each transaction may reach another session of the server. Whatever belongs to a session is then
lost, or met by somebody else: a prepared statement, a setting, an advisory lock.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Literal

import asyncpg
import structlog
from opentelemetry.instrumentation.utils import suppress_instrumentation

if TYPE_CHECKING:
    import psycopg

Mode = Literal["auto", "session", "transaction"]

#: Of asyncpg: what is prepared is forgotten at once.
_NO_CACHE: Final = {"statement_cache_size": 0}

#: What PostgreSQL says about prepared statements where one session's are met in another.
_MIXED_UP: Final = (asyncpg.DuplicatePreparedStatementError, asyncpg.InvalidSQLStatementNameError)

#: A pooler tells its clients a process id of its own making. Without parameters, as those take a prepared statement;
#: the answer is in the number of rows.
_SAME_PROCESS: Final = "SELECT 1 WHERE pg_backend_pid() = {pid}"

log = structlog.get_logger(__name__)


class Pooler:
    """What is known of the way to one database. Every connection to it is made here.

    `session` and `transaction` are believed. With `auto` each new connection is looked at, until a pooler is seen; in
    which mode that one works cannot be seen, so the harder one is assumed.
    """

    def __init__(self, mode: Mode = "auto") -> None:
        self._mode = mode
        self._shares_sessions = mode == "transaction"

    @property
    def shares_sessions(self) -> bool:
        """Whether the next statement may reach another session of PostgreSQL."""
        return self._shares_sessions

    async def connect(self, *arguments: Any, **options: Any) -> asyncpg.Connection:
        """`asyncpg.connect`, without a cache of prepared statements where sessions are shared."""
        if self._shares_sessions:
            return await asyncpg.connect(*arguments, **options | _NO_CACHE)
        connection: asyncpg.Connection = await asyncpg.connect(*arguments, **options)
        if self._mode == "session" or await _is_direct(connection):
            return connection
        self._seen("its process id is not PostgreSQL's")
        connection.terminate()
        return await asyncpg.connect(*arguments, **options | _NO_CACHE)

    def betrayed_by(self, error: BaseException | None) -> bool:
        """Whether `error` shows for the first time that sessions are shared: connections made before are to go."""
        if self._mode != "auto" or self._shares_sessions or not isinstance(error, _MIXED_UP):
            return False
        self._seen(type(error).__name__)
        return True

    def _seen(self, sign: str) -> None:
        self._shares_sessions = True
        log.info(
            "a pooler is in front of PostgreSQL: statements are not kept prepared; TRELLIS_DATABASE_POOLER=session "
            "keeps them where it pools sessions",
            sign=sign,
        )


async def _is_direct(connection: asyncpg.Connection) -> bool:
    try:
        with suppress_instrumentation():  # whose trace it would be in, chance decides
            found: str = await connection.execute(_SAME_PROCESS.format(pid=connection.get_server_pid()))
    except BaseException:
        connection.terminate()
        raise
    return found == "SELECT 1"


def is_between(connection: psycopg.Connection) -> bool:
    """The same of a connection of libpq's."""
    found = connection.execute(_SAME_PROCESS.format(pid=connection.info.backend_pid).encode())
    return found.rowcount == 0


def advice(error: BaseException) -> str:
    """What to do about an error that only a pooler makes; nothing for any other."""
    if isinstance(error, _MIXED_UP):
        return "a pooler in transaction mode is in between: set TRELLIS_DATABASE_POOLER=transaction"
    if is_refusal(error):
        return (
            "the pooler refuses `options` of the URL: take them out, and set them at the role (ALTER ROLE ... SET ...)"
        )
    return ""


def is_refusal(error: BaseException | None) -> bool:
    """Whether a pooler will not take a connection because of what the URL asks for."""
    return isinstance(error, asyncpg.ProtocolViolationError) and "unsupported startup parameter" in str(error)
