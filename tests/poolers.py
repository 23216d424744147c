"""PgBouncer, as Debian has it, between a test and its PostgreSQL."""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import unquote, urlsplit, urlunsplit

import pytest

from app.local.privileges import account_for
from app.local.process import free_port, listens
from tests.support import until

Mode = Literal["session", "transaction"]

MODES: tuple[Mode, ...] = ("session", "transaction")

#: `auth_type = any`: whoever asks comes in as the role below. What it is about is sessions, not passwords.
CONFIGURATION = """
[databases]
* = host={host} port={port} user={user} password={password}
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {listen}
unix_socket_dir =
auth_type = any
pool_mode = {mode}
default_pool_size = {size}
max_client_conn = 500
{more}
"""


@dataclass(frozen=True)
class PgBouncer:
    """One that runs."""

    port: int
    log: Path

    def url(self, direct: str) -> str:
        """The URL of the same database, through this one."""
        parts = urlsplit(direct)
        return urlunsplit(parts._replace(netloc=f"{parts.username}:{parts.password}@127.0.0.1:{self.port}"))


def program() -> str:
    """Where it is; without it, the test that asks is skipped, and says what to install."""
    found = shutil.which(
        "pgbouncer", path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"])
    )
    if found is None:
        if os.environ.get("TRELLIS_TEST_NEEDS_PGBOUNCER"):
            pytest.fail("there is no pgbouncer, and TRELLIS_TEST_NEEDS_PGBOUNCER says that there is to be one")
        pytest.skip("there is no pgbouncer on this machine: apt-get install pgbouncer")
    return found


@asynccontextmanager
async def pgbouncer(admin_url: str, mode: Mode, *, size: int = 30, more: str = "") -> AsyncIterator[PgBouncer]:
    """A PgBouncer in front of the server of `admin_url`, while the block runs.

    Args:
        size: sessions of PostgreSQL for each database and role.
        more: further lines of its configuration.
    """
    server, folder = urlsplit(admin_url), Path(tempfile.mkdtemp(prefix="trellis-pgbouncer-"))
    found = PgBouncer(free_port(), folder / "log")
    (folder / "pgbouncer.ini").write_text(
        CONFIGURATION.format(
            host=server.hostname,
            port=server.port,
            user=unquote(server.username or ""),
            password=unquote(server.password or ""),
            listen=found.port,
            mode=mode,
            size=size,
            more=more,
        )
    )
    account = account_for(folder / "none")  # it refuses to be root
    user = ["-u", account.name] if account else []
    with found.log.open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            *(program(), *user, str(folder / "pgbouncer.ini")), stdout=log, stderr=log
        )
    try:

        async def there() -> bool:
            assert process.returncode is None, "PgBouncer ended"
            return await listens(found.port)

        await until(there, lambda: f"PgBouncer to listen: {found.log.read_text()}")
        yield found
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
        shutil.rmtree(folder, ignore_errors=True)
