"""What all contestants share: PostgreSQL, a Temporal server, the world outside, and a meter on them."""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Final, Literal

import asyncpg
import httpx
from temporalio.client import Client

from app.db.pool import migrate
from app.local.postgres import MAINTENANCE, LocalPostgres
from app.local.process import Launch, ServerProcess, free_port, listens
from app.local.temporal import LocalTemporal
from bench.meter import Meter
from bench.plan import Plan
from bench.temporal_on_postgres import TemporalOnPostgres, find_programs

ROOT = Path(__file__).parent.parent

Backend = Literal["dev server", "temporal-server"]

_METER: Final = "meter"


class Stage:
    """The servers of one run, and programs on them."""

    def __init__(
        self, data: Path, plan: Plan, say: Callable[[str], None], dynamic_config: Mapping[str, object]
    ) -> None:
        self.dynamic_config = dynamic_config
        self.data = data
        self.plan = plan
        self.say = say
        self.postgres = LocalPostgres(data / "postgres", log=data / "postgres.log")
        self._password = secrets.token_hex(16)
        self._world = 0
        self._world_url = ""

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Stage]:
        """PostgreSQL and the world outside, while the block runs."""
        self.say("PostgreSQL")
        try:
            await self._start_postgres()
            async with self._outside():
                yield self
        finally:
            await self.postgres.stop()

    @asynccontextmanager
    async def temporal(self, backend: Backend) -> AsyncIterator[Ground]:
        """A Temporal server beside them, fresh, while the block runs."""
        self.say(backend)
        server: LocalTemporal | TemporalOnPostgres
        if backend == "temporal-server":
            programs = find_programs()
            assert programs
            server = TemporalOnPostgres(programs, self.postgres, self.data, self.dynamic_config)
        else:
            folder = Path(tempfile.mkdtemp(prefix="dev-server-", dir=self.data))
            server = LocalTemporal(folder, log=self.data / "dev-server.log", dynamic_config=self.dynamic_config)
        async with AsyncExitStack() as stack:
            stack.push_async_callback(server.stop)
            await server.start()
            connection = await stack.enter_async_context(self.looking_at(MAINTENANCE))
            pids = {"temporal": _pid(server.process), "postgres": _pid(self.postgres.process), "world": self._world}
            yield Ground(self, backend, server.address, await Client.connect(server.address), Meter(connection, pids))

    async def database(self, name: str, *, migrated: bool = True) -> str:
        """The URL of a database, made if it is not there; with the product's schema, or empty."""
        await self.postgres.ensure_database(name)
        url = self.postgres.url(name)
        if migrated:
            await asyncio.to_thread(migrate, url)
        return url

    @asynccontextmanager
    async def looking_at(self, database: str) -> AsyncIterator[asyncpg.Connection]:
        """A connection that may read all, and is not counted."""
        url = f"postgresql://{_METER}:{self._password}@127.0.0.1:{self.postgres.port}/{database}"
        connection = await asyncpg.connect(url, ssl=False)
        try:
            yield connection
        finally:
            await connection.close()

    def env(self, database_url: str, temporal_address: str, *, telemetry: bool) -> dict[str, str]:
        """Environment of a program on these servers."""
        return {
            **{name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ},
            "BENCH_DATABASE_URL": database_url,
            "BENCH_TEMPORAL_ADDRESS": temporal_address,
            "BENCH_PARTNERS_URL": self._world_url,
            "TRELLIS_DATABASE_URL": database_url,
            "TRELLIS_TEMPORAL_ADDRESS": temporal_address,
            "TRELLIS_PAYMENT_URL": f"{self._world_url}/payments",
            "TRELLIS_CARRIER_URL": f"{self._world_url}/carrier",
            "TRELLIS_DEMO_PRICE": "50.00",
            "TRELLIS_LOG_FORMAT": "json",
            **(
                {"TRELLIS_METRICS_PORT": str(free_port()), "OTEL_EXPORTER_OTLP_ENDPOINT": self._world_url}
                if telemetry
                else {"TRELLIS_LOG_LEVEL": "error"}
            ),
        }

    async def _start_postgres(self) -> None:
        """With `pg_stat_statements`, and a role that may read what it counts."""
        await self.postgres.start()
        await self.postgres.stop()
        folder = self.postgres.data
        with (folder / "postgresql.conf").open("a") as settings:
            settings.write("shared_preload_libraries = 'pg_stat_statements'\n")
        # The superuser has no password, and so no way in. For this moment there is one.
        rules = folder / "pg_hba.conf"
        locked = rules.read_text()
        rules.write_text(f"{locked}host all postgres 127.0.0.1/32 trust\n")
        await self.postgres.start()
        admin = await asyncpg.connect(f"postgresql://postgres@127.0.0.1:{self.postgres.port}/{MAINTENANCE}", ssl=False)
        await admin.execute(
            f"CREATE EXTENSION pg_stat_statements; CREATE ROLE {_METER} LOGIN PASSWORD '{self._password}' "
            "IN ROLE pg_monitor, pg_checkpoint, pg_read_all_data"
        )
        await admin.close()
        await self.postgres.stop()
        rules.write_text(f"{locked}host all {_METER} 127.0.0.1/32 scram-sha-256\n")
        await self.postgres.start()

    @asynccontextmanager
    async def _outside(self) -> AsyncIterator[None]:
        port = free_port()
        command = [sys.executable, "-m", "bench.programs.world", str(port)]
        process = ServerProcess("world", Launch(command, self.data / "world.log", cwd=ROOT))
        process.spawn()
        try:
            await process.ready(lambda: listens(port))
            self._world, self._world_url = _pid(process), f"http://127.0.0.1:{port}"
            yield
        finally:
            process.kill()


class Ground:
    """Stage and Temporal server: where a program can be run."""

    def __init__(self, stage: Stage, backend: Backend, address: str, client: Client, meter: Meter) -> None:
        self.stage = stage
        self.plan = stage.plan
        self.backend = backend
        self.address = address
        self.client = client
        self.meter = meter

    @asynccontextmanager
    async def program(
        self, name: str, args: Sequence[str], database_url: str, *, telemetry: bool = False, **more: str
    ) -> AsyncIterator[Program]:
        """Run `python -m bench.programs.NAME ARGS`, in which `PORT` stands for a free one, until the block ends."""
        env = self.stage.env(database_url, self.address, telemetry=telemetry) | more
        port = free_port()
        command = [sys.executable, "-m", f"bench.programs.{name}", *(arg.replace("PORT", str(port)) for arg in args)]
        process = ServerProcess(name, Launch(command, self.stage.data / f"{name}.log", env, cwd=ROOT))
        process.spawn()
        scraping = asyncio.create_task(_scrape(env.get("TRELLIS_METRICS_PORT")))
        try:
            yield Program(process, port, env)
        finally:
            scraping.cancel()
            await process.stop([(signal.SIGTERM, 30.0)])


class Program:
    """A process of a contestant."""

    def __init__(self, process: ServerProcess, port: int, env: Mapping[str, str]) -> None:
        self.process = process
        self.port = port
        self._env = env

    @property
    def pid(self) -> int:
        """Its process id."""
        return _pid(self.process)

    async def serving(self) -> None:
        """Wait until its port takes connections, and a worker of Trellis until it polls."""
        metrics = self._env.get("TRELLIS_METRICS_PORT")
        url = f"http://127.0.0.1:{metrics}/readyz" if metrics else None

        async def ready() -> bool:
            return await (_answers(url) if url else listens(self.port))

        await self.process.ready(ready, timeout=60)


async def _answers(url: str) -> bool:
    try:
        async with httpx.AsyncClient(timeout=2) as client:
            return (await client.get(url)).is_success
    except httpx.TransportError:
        return False


#: As most installations of Prometheus do.
_SCRAPE_SECONDS: Final = 15


async def _scrape(port: str | None) -> None:
    async with httpx.AsyncClient() as client:
        while port:
            await asyncio.sleep(_SCRAPE_SECONDS)
            try:
                await client.get(f"http://127.0.0.1:{port}/metrics")
            except httpx.TransportError:
                pass  # it is starting, or at its end


def _pid(process: ServerProcess) -> int:
    if process.pid is None:
        raise process.death()
    return process.pid
