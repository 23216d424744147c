"""What is measured around a batch of orders: CPU time by process, statements, transactions, bytes of WAL, memory."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

import asyncpg
import psutil  # type: ignore[import-untyped]

# Of everybody but whoever measures. A statement inside a function or a trigger is part of the one that called it.
_STATEMENTS = """
SELECT coalesce(sum(calls), 0)::bigint FROM pg_stat_statements
JOIN pg_database ON pg_database.oid = dbid WHERE datname = $1 AND userid <> current_user::regrole
"""

# Every transaction that writes takes the next number. Reading ones take none, and write nothing to wait for.
_WRITES = """
SELECT pg_snapshot_xmax(pg_current_snapshot())::text::bigint AS transactions,
       pg_wal_lsn_diff(pg_current_wal_insert_lsn(), '0/0')::bigint AS wal
"""


@dataclass(frozen=True)
class Reading:
    """All counters at one moment, or the difference between two."""

    seconds: float
    #: Seconds of CPU time by process: `temporal`, `postgres`, `python`, `world`.
    cpu: Mapping[str, float]
    statements: int
    write_transactions: int
    wal_bytes: int

    def since(self, before: Reading) -> Reading:
        """What has happened between two readings."""
        return Reading(
            self.seconds - before.seconds,
            {name: seconds - before.cpu.get(name, 0.0) for name, seconds in self.cpu.items()},
            self.statements - before.statements,
            self.write_transactions - before.write_transactions,
            self.wal_bytes - before.wal_bytes,
        )

    def per_order(self, orders: int) -> dict[str, float]:
        """The figures of the tables."""
        return {
            **{f"cpu_ms_{name}": seconds * 1000 / orders for name, seconds in self.cpu.items()},
            "sql_statements": self.statements / orders,
            "sql_write_transactions": self.write_transactions / orders,
            "wal_bytes": self.wal_bytes / orders,
        }


class Meter:
    """Reads the counters. Its connection has a role of its own, so that its statements are not counted."""

    def __init__(self, connection: asyncpg.Connection, servers: Mapping[str, int]) -> None:
        self._connection = connection
        self._servers = servers

    async def read(self, database: str, program: int) -> Reading:
        """The counters now: statements in `database`, CPU of the servers and of the process `program`."""
        statements = await self._connection.fetchval(_STATEMENTS, database)
        [writes] = await self._connection.fetch(_WRITES)
        cpu = {name: cpu_seconds(pid) for name, pid in {**self._servers, "python": program}.items()}
        return Reading(time.monotonic(), cpu, statements, writes["transactions"], writes["wal"])

    async def checkpoint(self) -> None:
        """Begin with an empty WAL: a page's first change after a checkpoint writes all of it, once."""
        await self._connection.execute("CHECKPOINT")


def cpu_seconds(pid: int) -> float:
    """CPU time of a process, of its children, and of those that have ended."""
    total = 0.0
    parent = psutil.Process(pid)
    for process in (parent, *parent.children(recursive=True)):
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue  # its parent has its time from now on
        total += times.user + times.system + times.children_user + times.children_system
    return total


def resident_bytes(pid: int) -> int:
    """Memory of one process that is in RAM."""
    resident: int = psutil.Process(pid).memory_info().rss
    return resident
