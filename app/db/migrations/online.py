"""Changes of the schema beside traffic: what every migration after the first is made of.

PostgreSQL queues for locks. A change that waits for one behind a long query keeps everybody waiting who comes after
it; a check of all rows or an index that is built under such a lock does so for as long as that takes. So each
statement here is a transaction of its own, gives up after a moment and comes back later, and what takes long takes
a lock that nobody minds. A migration that was broken off is run again from its beginning: its statements say
`IF NOT EXISTS`, or are those of this module, which do.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import structlog
from alembic import op
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from app.db import pooler

if TYPE_CHECKING:
    import psycopg

#: Seconds for which a statement waits for its lock, and others behind it.
LOCK_SECONDS: Final = 1
#: Seconds between two tries: time for those who had to wait.
PAUSE: Final = 2.0
#: After this many tries something holds its lock for good, and a person has to look at it.
TRIES: Final = 300

_LOCKED: Final = "55P03"

log = structlog.get_logger(__name__)


def quickly(statement: str) -> None:
    """A change that takes no longer than its lock: a column, a constraint that is not validated, a comment, a drop."""

    def change() -> None:
        # In one transaction, as through a pooler the next one may be in another session.
        with _driver().transaction():
            op.execute(text(f"SET LOCAL lock_timeout = '{LOCK_SECONDS}s'"))
            op.execute(text(statement))

    _again_while_locked(change)


def add_check(table: str, name: str, condition: str) -> None:
    """A CHECK for new rows at once, and for all rows as soon as they have been looked through."""
    _add_constraint(table, name, f"CHECK ({condition})")


def add_foreign_key(table: str, name: str, columns: str, references: str) -> None:
    """The same for `FOREIGN KEY (columns) REFERENCES references`."""
    _add_constraint(table, name, f"FOREIGN KEY ({columns}) REFERENCES {references}")


def _add_constraint(table: str, name: str, rule: str) -> None:
    quickly(f"ALTER TABLE {table} DROP CONSTRAINT IF EXISTS {name}, ADD CONSTRAINT {name} {rule} NOT VALID")
    # Reads all rows under a lock that lets everybody read and write.
    quickly(f"ALTER TABLE {table} VALIDATE CONSTRAINT {name}")


def create_index(name: str, on: str, *, unique: bool = False) -> None:
    """An index, built while the table is read and written. `on` is what follows ON: `orders (state) WHERE …`."""
    # What an attempt that was broken off has left is not valid, and would be taken for the index.
    _concurrently(
        f"DROP INDEX CONCURRENTLY IF EXISTS {name}",
        f"CREATE {'UNIQUE ' if unique else ''}INDEX CONCURRENTLY {name} ON {on}",
    )


def drop_index(name: str) -> None:
    """Without a moment in which nobody gets at the table."""
    _concurrently(f"DROP INDEX CONCURRENTLY IF EXISTS {name}")


def _concurrently(*statements: str) -> None:
    """Statements that no transaction can have around them. Nobody waits behind them, so that the limit is for our own
    sake only; through a pooler, where it would be somebody else's, they wait for as long as the oldest transaction."""

    def change() -> None:
        if not pooler.is_between(_driver()):
            op.execute(text(f"SET lock_timeout = '{LOCK_SECONDS}s'"))
        for statement in statements:
            op.execute(text(statement))

    _again_while_locked(change)


def _driver() -> psycopg.Connection:
    """psycopg's own connection."""
    found: psycopg.Connection = op.get_bind().connection.driver_connection  # type: ignore[assignment]
    return found


def _again_while_locked(change: Callable[[], None]) -> None:
    with op.get_context().autocommit_block():
        for left in range(TRIES, 0, -1):
            try:
                change()
            except DBAPIError as error:
                if getattr(error.orig, "sqlstate", None) != _LOCKED or left == 1:
                    raise
                log.warning("a migration waits for a lock", tries_left=left - 1, retry_in_seconds=PAUSE)
                time.sleep(PAUSE)
            else:
                return
