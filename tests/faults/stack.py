"""The real stack as separate processes, each behind proxies, each free to be killed and started again."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import httpx

from app import failpoints
from app.cli.client import ExitCode
from app.local.postgres import LocalPostgres
from app.local.process import Launch, LocalError, ServerProcess, free_port
from app.local.temporal import LocalTemporal
from tests.faults.failpoint_plan import FailpointPlan
from tests.faults.proxy import Proxy

ROOT = Path(__file__).parent.parent.parent

#: Seconds a worker may take to finish its attempts after SIGTERM.
GRACE = 10.0

#: Seconds after which a worker has most likely met every failpoint it has.
PATIENCE_WITH_A_WORKER = 30.0

#: Ends that a process of the product may have: told to stop, killed by us, killed by a failpoint.
_EXPECTED_ENDS = {0, -signal.SIGKILL, -signal.SIGTERM, failpoints.EXIT_CODE}

#: A worker that loses Temporal between its first look and its first poll ends, for its supervisor to start it again.
_GAVE_UP_AT_START = ("Worker validation failed", "Failed client connect")


@dataclass
class Member:
    """One process of the product: how it is started, and how often it came to an end."""

    name: str
    args: list[str]
    env: dict[str, str]
    queue: str | None = None
    process: ServerProcess | None = None
    ends: list[int] = field(default_factory=list)
    #: When it began to serve; 0 while it starts.
    ready: float = 0.0
    spec: str = ""
    #: Held down on purpose, or stopped in its tracks: nobody else is to touch it.
    down: bool = False


class Stack:
    """PostgreSQL, Temporal, the sandbox, two APIs with settings of their own, and two workers on each queue."""

    def __init__(self, data: Path, dice: Random, say: Callable[[str], None], *, arm: bool = True) -> None:
        self.data = data
        self.plan = FailpointPlan(data / "failpoints.log", dice)
        self.armed = arm
        self.deaths = 0
        self.surprises: list[str] = []
        self.postgres = LocalPostgres(data / "postgres", log=data / "postgres.log")
        # Killing a process loses nothing that it gave to the operating system: only PostgreSQL, which holds commits
        # back in its own memory otherwise, has to wait for the disk.
        self.temporal = LocalTemporal(data, log=data / "temporal.log", durable=False)
        self.proxies: dict[str, Proxy] = {}
        self.members: dict[str, Member] = {}
        self.api_port = free_port()
        self.reviewing_port = free_port()
        self.sandbox_port = free_port()
        self._dice = dice
        self._say = say
        self._watch: asyncio.Task[None] | None = None

    @property
    def api_url(self) -> str:
        """The API, without a proxy: whether it answers is for its clients to find out."""
        return f"http://127.0.0.1:{self.api_port}"

    @property
    def reviewing_url(self) -> str:
        """The API that asks for another review of an address that changes after the approval."""
        return f"http://127.0.0.1:{self.reviewing_port}"

    @property
    def database_url(self) -> str:
        """The product's database, without a proxy."""
        return self.postgres.url("trellis")

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Stack]:
        """Start everything, and watch over it while the block runs."""
        async with AsyncExitStack() as stack:
            stack.push_async_callback(self._stop)
            await asyncio.gather(self.postgres.start(), self.temporal.start())
            for database in ("trellis", "ledger"):
                await self.postgres.ensure_database(database)
            for proxy in self._make_proxies():
                await stack.enter_async_context(proxy.listening())
            self._make_members()
            await self._migrate()
            for member in self.members.values():
                self.start(member)
            await self._ready()
            self._watch = asyncio.create_task(self._restart_the_dead())
            yield self

    def env(self, *, queue: str | None = None, direct: bool = False) -> dict[str, str]:
        """Environment of a process of the product. `direct`: past the proxies."""
        side = "api" if queue is None else "workers"
        database, temporal = self.proxies[f"postgres-{side}"].port, self.proxies[f"temporal-{side}"].port
        partners = self.sandbox_port if direct else self.proxies["partners"].port
        url = self.database_url
        return {key: value for key, value in os.environ.items() if not key.startswith("TRELLIS_")} | {
            "PYTHONPATH": str(ROOT),
            "TRELLIS_DATABASE_URL": url if direct else url.replace(f":{self.postgres.port}/", f":{database}/"),
            "TRELLIS_TEMPORAL_ADDRESS": self.temporal.address if direct else f"127.0.0.1:{temporal}",
            "TRELLIS_PAYMENT_URL": f"http://127.0.0.1:{partners}/payments",
            "TRELLIS_CARRIER_URL": f"http://127.0.0.1:{partners}/carrier",
            "TRELLIS_DEMO_PRICE": "50.00",
            "TRELLIS_SANDBOX_DATABASE_URL": self.postgres.url("ledger"),
            "TRELLIS_GRACEFUL_SHUTDOWN_TIMEOUT": str(GRACE),
            "TRELLIS_DATABASE_POOL_SIZE": "8",
            "TRELLIS_LOG_FORMAT": "json",
        }

    # --- one process

    def start(self, member: Member) -> None:
        """Start a process, with the failpoints that are still to be hit."""
        env = dict(member.env)
        if member.queue and self.armed:
            member.spec = self.plan.spec(member.queue)
            env |= {
                "TRELLIS_FAILPOINTS": member.spec,
                "TRELLIS_FAILPOINTS_ALLOWED": "true",
                "TRELLIS_FAILPOINTS_SEED": str(self._dice.randrange(2**31)),
                "TRELLIS_FAILPOINTS_LOG": str(self.plan.log),
            }
        args = [sys.executable, "-m", "app", *member.args]
        log = self.data / f"{member.name}.log"
        member.process = ServerProcess(member.name, Launch(args, log, env, cwd=ROOT))
        member.process.spawn()
        member.ready = 0.0
        member.down = False

    def kill(self, name: str) -> None:
        """`kill -9`. The watch starts it again."""
        member = self.members[name]
        if member.process:
            member.process.kill()

    def renew_stale(self) -> None:
        """Kill the workers whose failpoints are all hit, or that have had time for them, while others are missing."""
        for member in self.members.values():
            if not member.queue or member.down or not member.ready:
                continue
            missing, served = self.plan.missing_on(member.queue), time.monotonic() - member.ready
            own = [pair for pair in missing if f"{pair[0]}={pair[1]}:" in member.spec]
            if missing and served > (PATIENCE_WITH_A_WORKER if own else 0):
                self.kill(member.name)

    async def terminate(self, name: str) -> None:
        """SIGTERM, as a rollout does, and start a successor once it has ended."""
        member = self.members[name]
        if member.process:
            member.down = True
            began = time.monotonic()
            await member.process.stop([(signal.SIGTERM, GRACE + 15)])
            self._note_end(member)
            if time.monotonic() - began > GRACE + 14:
                self.surprises.append(f"{name} did not end within {GRACE + 15:.0f} s of SIGTERM")
        self.start(member)

    def _note_end(self, member: Member) -> None:
        code = member.process._process.returncode if member.process and member.process._process else 0
        code = code if code is not None else -signal.SIGKILL
        member.ends.append(code)
        self.deaths += code == failpoints.EXIT_CODE
        tail = member.process.tail() if member.process else ""
        gave_up = code == ExitCode.UNAVAILABLE and any(words in tail for words in _GAVE_UP_AT_START)
        if code not in _EXPECTED_ENDS and not gave_up:
            self.surprises.append(f"{member.name} ended by itself with code {code}:\n{tail}")

    async def _restart_the_dead(self) -> None:
        while True:
            for member in self.members.values():
                if member.process and not member.process.running and not member.down:
                    try:
                        self._note_end(member)
                        self.start(member)
                    except LocalError as error:
                        self.surprises.append(str(error))
                elif member.process and not member.ready and "workers started" in member.process.tail(40):
                    member.ready = time.monotonic()
            await asyncio.sleep(0.25)

    # --- all of them

    def kill_everything(self) -> None:
        """`kill -9` of every process there is, servers included; nothing is started again."""
        for member in self.members.values():
            member.down = True
            if member.process:
                member.process.kill()
        self.postgres.process.kill()
        self.temporal.process.kill()

    async def start_everything(self) -> None:
        """Start everything after `kill_everything`."""
        await asyncio.gather(self.postgres.start(), self.temporal.start())
        for member in self.members.values():
            self.start(member)

    async def disarm(self) -> None:
        """Restart the workers without failpoints, one of each queue after the other, as a rollout would."""
        self.armed = False
        for number in ("-1", "-2"):
            await asyncio.gather(*(self.terminate(name) for name in self.members if name.endswith(number)))

    async def command(self, *args: str, timeout: float = 300) -> tuple[int, str]:
        """Run a `trellis` command beside the stack, past the proxies; exit code and output."""
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "app", *args,
            cwd=ROOT, env=self.env(direct=True),
            stdout=asyncio.subprocess.PIPE, stderr=(self.data / "commands.log").open("ab"),
        )  # fmt: skip
        try:
            output, _ = await asyncio.wait_for(process.communicate(), timeout)
        except TimeoutError:
            return -1, f"`trellis {' '.join(args)}` did not end within {timeout:.0f} s"
        finally:
            if process.returncode is None:
                process.kill()
        return process.returncode or 0, output.decode()

    # --- putting it together

    def _make_proxies(self) -> list[Proxy]:
        targets = {
            "postgres-api": self.postgres.port,
            "postgres-workers": self.postgres.port,
            "temporal-api": self.temporal.port,
            "temporal-workers": self.temporal.port,
            "partners": self.sandbox_port,
        }
        for name, target in targets.items():
            self.proxies[name] = Proxy(name, target, postgres=name.startswith("postgres"))
        return list(self.proxies.values())

    def _make_members(self) -> None:
        self._add("sandbox", ["sandbox", "--port", str(self.sandbox_port)], self.env(direct=True))
        self._add("api", ["api", "--port", str(self.api_port)], self.env())
        reviewing = self.env() | {"TRELLIS_ADDRESS_AFTER_REVIEW": "review"}
        self._add("api-reviewing", ["api", "--port", str(self.reviewing_port)], reviewing)
        for number in (1, 2):
            self._add(f"orders-{number}", ["worker", "default"], self.env(queue="default"), "default")
            self._add(f"shipping-{number}", ["worker", "shipping"], self.env(queue="shipping"), "shipping")

    def _add(self, name: str, args: list[str], env: dict[str, str], queue: str | None = None) -> None:
        self.members[name] = Member(name, args, env, queue)

    async def _migrate(self) -> None:
        code, output = await self.command("migrate")
        if code:
            raise RuntimeError(f"the schema could not be made; see {self.data / 'commands.log'}\n{output}")

    async def _ready(self) -> None:
        async def answers() -> bool:
            async with httpx.AsyncClient(base_url=self.api_url) as client:
                try:
                    return (await client.get("/readyz")).status_code == 200
                except httpx.HTTPError:
                    return False

        await eventually(answers, 60, "the API is not ready")

    async def _stop(self) -> None:
        if self._watch:
            self._watch.cancel()
        for member in self.members.values():
            if member.process:
                member.process.kill()
        await self.temporal.stop()
        await self.postgres.stop()


async def eventually(condition: Callable[[], Awaitable[bool]], seconds: float, otherwise: str) -> None:
    """Wait for a condition of the outside world.

    Raises:
        TimeoutError: it did not come.
    """
    deadline = time.monotonic() + seconds
    while not await condition():
        if time.monotonic() > deadline:
            raise TimeoutError(otherwise)
        await asyncio.sleep(0.2)
