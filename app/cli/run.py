"""`trellis run`: everything, for real, in the foreground."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from app.cli.client import ExitCode
from app.errors import SettingsError, TrellisError
from app.local.process import LocalError, PortTaken, ServerDied, check_port, collecting_taken, free_port, listen
from app.local.stack import LocalStack, UsualPorts

DRAIN_MARGIN = 10.0
"""Seconds the workers get beyond their own graceful time-out."""

TOGETHER = 0.5
"""Seconds within which two signals are one Ctrl-C: `make` and `uv` pass on what the terminal sends us as well."""

_CURL = """
Try this; the second one within the review window:

curl -X POST API/orders/o-1/start -H 'content-type: application/json' -d '{"payment_id":"pay-1"}'
curl -X POST API/orders/o-1/signals/approve
curl API/orders/o-1/status

Before approving, or instead:

curl -X POST API/orders/o-1/signals/address -H 'content-type: application/json' \\
  -d '{"line1":"1 Main St","city":"Springfield","state":"IL","zip":"62701"}'
curl -X POST API/orders/o-1/signals/cancel

Ctrl-C stops everything.
"""

FORCED = 130
"""Exit code when the workers were not waited for."""


class Interrupted(Exception):
    """Somebody pressed Ctrl-C or sent SIGTERM."""


@dataclass(frozen=True)
class Options:
    """What the command line said."""

    data: Path | None
    host: str
    port: int
    postgres_port: int = 0
    """0: the usual one if it is free, or another. So are the other ports but that of the API, which people type."""
    temporal_port: int = 0
    ui_port: int | None = 0
    """None: no UI."""
    trace: str | None = None

    @property
    def usual_ports(self) -> UsualPorts:
        """Where to look first for what was not asked for, and not where something else was."""
        asked = {self.port, self.postgres_port, self.temporal_port, self.ui_port}
        return UsualPorts(*(0 if port in asked else port for port in (5432, 7233, 8233)))


def run(
    data: Annotated[
        Path, typer.Option(help="Directory of databases and logs; kept for the next run.", file_okay=False)
    ] = Path(".trellis"),
    ephemeral: Annotated[
        bool, typer.Option("--ephemeral", help="Use a temporary directory, removed at the end, instead of --data.")
    ] = False,
    host: Annotated[
        str, typer.Option(help="Address of the API. PostgreSQL and Temporal are on 127.0.0.1 always.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port of the API.", min=1, max=65535)] = 8000,
    postgres_port: Annotated[
        int | None, typer.Option(help="Port of PostgreSQL. [default: 5432, or a free one]", min=1, max=65535)
    ] = None,
    temporal_port: Annotated[
        int | None, typer.Option(help="Port of Temporal. [default: 7233, or a free one]", min=1, max=65535)
    ] = None,
    ui_port: Annotated[
        int | None, typer.Option(help="Port of the Temporal UI. [default: 8233, or a free one]", min=1, max=65535)
    ] = None,
    no_ui: Annotated[bool, typer.Option("--no-ui", help="Run without the Temporal UI.")] = False,
    trace: Annotated[
        str | None, typer.Option(help="Add traces, a line per span, to this file; `-` is the terminal.", metavar="FILE")
    ] = None,
) -> None:
    """Run PostgreSQL, Temporal, the API and both workers, until Ctrl-C.

    Everything it starts is real, needs no Docker, and ends with it. Orders survive in --data.

    Exit codes: 0 stopped; 1 something did not start, or ended by itself; 2 wrong usage; 4 a setting is wrong; 130
    stopped by force.
    """
    options = Options(
        data=None if ephemeral else data,
        host=host,
        port=port,
        postgres_port=postgres_port or 0,
        temporal_port=temporal_port or 0,
        ui_port=None if no_ui else ui_port or 0,
        trace=trace,
    )
    raise typer.Exit(asyncio.run(_run(options)))


async def _run(options: Options) -> int:
    _forget_other_servers()
    this_run = _Run(options)
    try:
        _check_ports(options)
        code = await this_run.to_the_end()
    except TrellisError as error:
        typer.echo(f"trellis: {error}", err=True)
        code = ExitCode.UNAVAILABLE if isinstance(error, SettingsError) else ExitCode.ENDED_OTHERWISE
    if this_run.started:
        # Inside the event loop: its end would wait again for what was not drained, and print what that says.
        _leave(code)
    return code


def _forget_other_servers() -> None:
    """libpq's variables mean a database that somebody works with in this shell, and what is started here is ours."""
    for name in [name for name in os.environ if name.startswith("PG")]:
        del os.environ[name]


class _Run:
    """One run, from the first check to the last process."""

    def __init__(self, options: Options) -> None:
        self.started = False
        self._options = options
        self._signals = _Signals(self._say)

    async def to_the_end(self) -> int:
        """Run until somebody stops it; the exit code.

        Raises:
            LocalError: something did not start, or ended by itself. Everything is stopped then.
        """
        with self._signals:
            stack = self._stack()
            self._signals.when_forced(stack.hurry)
            try:
                with await self._claim_ports(stack) as bound:
                    self.started = True
                    await self._signals.or_stop(stack.start())
                    return await self._serve(stack, bound)
            except Interrupted:
                return 0
            finally:
                if self.started:
                    self._say("Stopping Temporal and PostgreSQL …")
                await stack.stop()
                if self.started:
                    self._say("Everything is stopped.")

    async def _claim_ports(self, stack: LocalStack) -> socket.socket:
        """Prepare the servers; the socket of the API.

        Raises:
            PortTaken: one or more ports are; the message names them all.
        """
        from app.settings import load

        with contextlib.ExitStack() as bound:
            with collecting_taken() as claim:
                with claim():
                    api = bound.enter_context(listen(self._options.host, self._options.port, "the API", "--port"))
                with claim():
                    if port := load().metrics_port:
                        check_port(port, "the metrics", "TRELLIS_METRICS_PORT")
                with claim():
                    await self._signals.or_stop(stack.prepare())
            bound.pop_all()
            return api

    def _stack(self) -> LocalStack:
        from app.settings import load

        return LocalStack(
            self._options.data,
            postgres_port=self._options.postgres_port,
            temporal_port=self._options.temporal_port,
            ui_port=self._options.ui_port,
            usual=self._options.usual_ports,
            namespaces=[load().temporal_namespace],
            report=self._say,
        )

    async def _serve(self, stack: LocalStack, bound: socket.socket) -> int:
        self._say("The application …")
        # Late: they import the whole product, which takes a second or two; until the signal handlers are there
        # Ctrl-C is answered with a stack trace.
        from app.db.pool import migrate
        from app.local.server import ApiServer, local_url
        from app.main import create
        from app.settings import load
        from app.telemetry.logs import configure_logging

        await self._timed("Migrations", asyncio.to_thread(migrate, stack.database_url), stack)
        settings = load(
            api_host=self._options.host,
            api_port=self._options.port,
            metrics_port=load().metrics_port or free_port(),
            sandbox=True,
            **stack.settings_overrides(),
        )
        configure_logging(settings)
        if self._options.trace is not None:
            _write_traces(self._options.trace)
        application = create(settings)
        api = ApiServer(application, bound, settings)
        self._signals.when_forced(api.hurry)
        drain = settings.graceful_shutdown_timeout + DRAIN_MARGIN
        metrics = local_url(settings.metrics_host, settings.metrics_port)
        try:
            await self._timed("API and workers", api.start(f"{metrics}/readyz"), stack)
            environment = stack.write_env(
                TRELLIS_URL=api.url, TRELLIS_SANDBOX="true", TEMPORAL_ADDRESS=stack.temporal_address
            )
            self._say(_announcement(api.url, f"{metrics}/metrics", stack, environment))
            await self._signals.or_stop(_first_of(api.wait(), stack.watch()))
        except Interrupted:
            pass
        except ServerDied as error:
            self._say(f"\n{str(error).partition(';')[0]}")
            drain = 0.0  # what the workers would finish cannot be recorded any more
            raise
        finally:
            self._say("Stopping the API and the workers …")
            drained = await api.stop(drain)
        if application.state.workers_failed:
            return 1
        return 0 if drained else FORCED

    async def _timed(self, name: str, work: Coroutine[Any, Any, object], stack: LocalStack) -> None:
        self._say(f"{name} …")
        started = time.monotonic()
        await self._signals.or_stop(_first_of(work, stack.watch()))
        self._say(f"{name} ready in {time.monotonic() - started:.1f} s")

    def _say(self, line: str) -> None:
        with contextlib.suppress(OSError):  # the terminal may be gone, and that is no reason not to stop in order
            typer.echo(line)


class _Signals:
    """What SIGINT, SIGTERM and SIGHUP mean: the first one stops, a second one forces."""

    NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._first = 0.0
        self._stop = asyncio.Event()
        self._forced: list[Callable[[], None]] = []

    def __enter__(self) -> None:
        for number in self.NUMBERS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup means what it says
                asyncio.get_running_loop().add_signal_handler(number, self._received)

    def __exit__(self, *_: object) -> None:
        for number in self.NUMBERS:
            asyncio.get_running_loop().remove_signal_handler(number)

    def when_forced(self, action: Callable[[], None]) -> None:
        """Call `action` at the second signal."""
        self._forced.append(action)

    async def or_stop(self, work: Coroutine[Any, Any, None]) -> None:
        """Do `work`; at the first signal it is cancelled and awaited.

        Raises:
            Interrupted: that happened.
        """
        task, stop = asyncio.create_task(work), asyncio.create_task(self._stop.wait())
        try:
            await asyncio.wait({task, stop}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            stop.cancel()
            if not task.done():
                task.cancel()
                await asyncio.wait({task})
        if task.cancelled():
            raise Interrupted
        task.result()

    def _received(self) -> None:
        now = time.monotonic()
        if not self._stop.is_set():
            self._first = now
            self._stop.set()
            self._say("\nStopping; orders in progress go on at the next run. Ctrl-C again forces.")
        elif now - self._first > TOGETHER:
            self._say("Forcing.")
            for action in self._forced:
                action()


def _write_traces(file: str) -> None:
    """From here on, to the end of the process.

    Raises:
        LocalError: the file cannot be written.
    """
    from app.telemetry.traces import configure_tracing

    try:
        # Never closed: spans come to the very end.
        configure_tracing(sys.stdout if file == "-" else Path(file).open("a", encoding="utf-8"))  # noqa: SIM115
    except OSError as error:
        raise LocalError(f"--trace: {error.strerror}: {error.filename}") from error


async def _first_of(*works: Coroutine[Any, Any, object]) -> None:
    """Wait for the first to end or fail, and cancel the others."""
    tasks = [asyncio.create_task(work) for work in works]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


def _check_ports(options: Options) -> None:
    wanted = {
        "--port": options.port,
        "--postgres-port": options.postgres_port,
        "--temporal-port": options.temporal_port,
        "--ui-port": options.ui_port,
    }
    users: dict[int, str] = {}
    for option, port in wanted.items():
        if port and port in users:
            raise PortTaken(f"{port}, for {users[port]} and {option} at once; give each its own")
        if port:
            users[port] = option


def _announcement(api: str, metrics: str, stack: LocalStack, environment: Path) -> str:
    """Where everything is, and what to try; nothing here is wrapped, so that it can be copied."""
    rows = {
        "API": api,
        "API docs": f"{api}/docs",
        "Metrics": metrics,
        "Temporal UI": f"http://127.0.0.1:{stack.temporal.ui_port}" if stack.temporal.ui_port else "off",
        "Temporal": stack.temporal_address,
        "Temporal metrics": f"http://127.0.0.1:{stack.temporal.metrics_port}/metrics",
        "PostgreSQL": stack.database_url,
        "Data": str(stack.data),
        "Environment": f". {environment}   (for trellis audit, temporal and their like in another terminal)",
        "Logs": f"{stack.postgres.log}, {stack.temporal.log.name}",
    }
    table = Table.grid(padding=(0, 2))
    for name, value in rows.items():
        table.add_row(Text(name, style="bold"), Text(value, no_wrap=True, overflow="ignore"))
    console = Console(highlight=False, width=20 + max(map(len, rows.values())))
    with console.capture() as printed:
        console.print(table)
    return f"\n{printed.get()}{_CURL.replace('API', api)}"


def _leave(code: int) -> None:
    """End the process without taking the interpreter apart.

    Threads of the Temporal SDK may still call into Python then, which now and then ends in a crash instead of `code`
    (temporalio/sdk-python issue 300).
    """
    atexit._run_exitfuncs()  # noqa: SLF001 - all of normal exit that matters here
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(code)
