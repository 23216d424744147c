"""PostgreSQL and Temporal together, in one data directory, for `trellis run` and for the tests."""

from __future__ import annotations

import asyncio
import fcntl
import os
import re
import shlex
import shutil
import stat
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, NoReturn, Self

from app.local.postgres import USER, DataUnusable, LocalPostgres
from app.local.process import POLL, LocalError, Report, collecting_taken, private, silent
from app.local.temporal import LocalTemporal

_OURS = re.compile(r"lock|env|postgres(\.new)?|(postgres|temporal)\.log(\.old)?|temporal\.(db(-\w+)?|pid)")
"""What the servers and this module keep in the data directory."""


@dataclass(frozen=True)
class UsualPorts:
    """Where a server is looked for when nothing else was said. 0: nowhere."""

    postgres: int = 0
    temporal: int = 0
    ui: int = 0


class DataInUse(LocalError):
    """The data directory is in use"""


class LocalStack:
    """Both servers, started together and stopped in order; use it with `async with`.

    Args:
        data: directory for everything they write; None: a temporary one, removed at the end.
        postgres_port, temporal_port: 0 chooses free ones.
        ui_port: of the Temporal UI; None: without, 0: a free one.
        usual: of the free ports those to choose.
        namespaces, dynamic_config: see `LocalTemporal`.
        database: created if it is not there.
        durable: False is faster and may lose data when the machine crashes.
        report: is told what happens, one line at a time.
    """

    def __init__(
        self,
        data: Path | None = None,
        *,
        postgres_port: int = 0,
        temporal_port: int = 0,
        ui_port: int | None = None,
        usual: UsualPorts = UsualPorts(),
        namespaces: Sequence[str] = (),
        dynamic_config: Mapping[str, object] | None = None,
        database: str = USER,
        durable: bool = True,
        report: Report = silent,
    ) -> None:
        self._temporary = Path(tempfile.mkdtemp(prefix="trellis-")) if data is None else None
        self.data = (data or self._temporary or Path()).resolve()
        self.postgres = LocalPostgres(
            self.data / "postgres",
            postgres_port,
            log=self.data / "postgres.log",
            usual_port=usual.postgres,
            durable=durable,
            report=report,
        )
        self.temporal = LocalTemporal(
            self.data,
            temporal_port,
            ui_port,
            log=self.data / "temporal.log",
            usual_port=usual.temporal,
            usual_ui_port=usual.ui,
            namespaces=namespaces,
            dynamic_config=dynamic_config,
            durable=durable,
            report=report,
        )
        self._database = database
        self._report = report
        self._lock: IO[str] | None = None

    @property
    def database_url(self) -> str:
        """The product's database, as `Settings.database_url` takes it."""
        return self.postgres.url(self._database)

    @property
    def temporal_address(self) -> str:
        """Temporal's frontend, as `Settings.temporal_address` takes it."""
        return self.temporal.address

    def settings_overrides(self) -> dict[str, object]:
        """Keyword arguments for `Settings`: these servers, and no credentials meant for other ones."""
        return {
            "database_url": self.database_url,
            "temporal_address": self.temporal_address,
            "temporal_tls": False,
            "temporal_api_key": None,
            "temporal_tls_ca": None,
            "temporal_tls_cert": None,
            "temporal_tls_key": None,
        }

    def env(self) -> dict[str, str]:
        """Environment variables that lead another process of the product to these servers."""
        return {"TRELLIS_DATABASE_URL": self.database_url, "TRELLIS_TEMPORAL_ADDRESS": self.temporal_address}

    def write_env(self, **more: str) -> Path:
        """Write `env`, and what is in `more`, to a file that a shell can read; its path."""
        file = self.data / "env"
        lines = [f"export {name}={shlex.quote(value)}\n" for name, value in {**self.env(), **more}.items()]
        with open(file, "w", opener=private) as written:
            written.writelines(lines)
        return file

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def prepare(self) -> None:
        """Take the data directory and make sure that nothing stands in the way of a start. `stop` undoes it.

        Raises:
            DataInUse: another run works in the same directory.
            PortTaken: somebody else listens on a port; all such ports are named.
            LocalError: any other reason; the message says it.
        """
        if self._lock is None:
            self._lock = _locked(self.data)
        with collecting_taken() as claim:
            for server in (self.postgres, self.temporal):
                with claim():
                    await server.prepare()

    async def start(self) -> None:
        """Start both; if one fails, or the caller is cancelled, both are stopped again.

        Raises:
            LocalError: see `prepare`, or a server does not start; the message says why.
        """
        try:
            await self.prepare()
            await _together(self._start_postgres(), self._timed("Temporal", self.temporal.start))
        except BaseException:
            await self.stop()
            raise

    async def _start_postgres(self) -> None:
        await self._timed("PostgreSQL", self.postgres.start)
        await self.postgres.ensure_database(self._database)

    async def stop(self) -> None:
        """Stop Temporal, then PostgreSQL; whoever used them must have ended before."""
        try:
            await self.temporal.stop()
        finally:
            await self.postgres.stop()
            if self._lock is not None:
                self._lock.close()
                self._lock = None
            if self._temporary is not None:
                shutil.rmtree(self._temporary, ignore_errors=True)

    def hurry(self) -> None:
        """Give the servers a second each to stop, now or later."""
        self.temporal.hurry()
        self.postgres.hurry()

    async def watch(self) -> NoReturn:
        """Wait until one of the servers ends by itself.

        Raises:
            ServerDied: always, some day; it says which server, how, and what it logged last.
        """
        while True:
            for server in (self.postgres.process, self.temporal.process):
                if not server.running:
                    raise server.death()
            await asyncio.sleep(POLL)

    async def _timed(self, name: str, start: Callable[[], Awaitable[None]]) -> None:
        self._report(f"{name} …")
        started = time.monotonic()
        await start()
        self._report(f"{name} ready in {time.monotonic() - started:.1f} s")


async def _together(*coroutines: Awaitable[None]) -> None:
    """Run all; at the first error the others are cancelled and awaited, and that error is raised as it is."""
    tasks = [asyncio.ensure_future(each) for each in coroutines]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _locked(data: Path) -> IO[str]:
    """The open lock file of `data`: the lock lasts as long as it is open, and ends with us however we end."""
    try:
        data.mkdir(mode=0o700, parents=True, exist_ok=True)
        file = open(data / "lock", "a+", opener=private)  # noqa: SIM115 - Path.open takes no opener; see above
    except OSError as error:
        raise DataUnusable(f"{error.strerror}: {error.filename}; choose another with --data") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.seek(0)
        holder = file.read().strip() or "unknown"
        file.close()
        raise DataInUse(f"{data}, by process {holder}; stop that one or choose another with --data") from error
    except OSError as error:
        file.close()
        raise DataUnusable(f"{data} is on a file system without locks ({error.strerror})") from error
    file.truncate(0)
    file.write(f"{os.getpid()}\n")
    file.flush()
    _make_private(data)
    return file


def _make_private(data: Path) -> None:
    """Close what an earlier release, or the umask, left open to others.

    The directory itself only if there is nothing else in it: whoever says `--data /srv` wants to go on using that.
    """
    ours = {path for path in data.iterdir() if _OURS.fullmatch(path.name) and not path.is_symlink()}
    if ours == set(data.iterdir()):
        ours.add(data)
    for path in ours:
        status = path.stat()
        if status.st_mode & 0o077 and status.st_uid == os.geteuid():
            path.chmod(stat.S_IMODE(status.st_mode) & 0o700)
