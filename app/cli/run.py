"""`trellis run`: everything, for real, in the foreground."""

from __future__ import annotations

import asyncio
import atexit
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table
from rich.text import Text

from app.errors import TrellisError
from app.local.api import ApiServer
from app.local.processes import LocalError, PortTaken, ServerDied, listen
from app.local.stack import LocalStack
from app.settings import Settings

T = TypeVar("T")

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
    postgres_port: int
    temporal_port: int
    ui_port: int | None


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
    postgres_port: Annotated[int, typer.Option(help="Port of PostgreSQL.", min=1, max=65535)] = 5432,
    temporal_port: Annotated[int, typer.Option(help="Port of Temporal.", min=1, max=65535)] = 7233,
    ui_port: Annotated[int, typer.Option(help="Port of the Temporal UI.", min=1, max=65535)] = 8233,
    no_ui: Annotated[bool, typer.Option("--no-ui", help="Run without the Temporal UI.")] = False,
) -> None:
    """Run PostgreSQL, Temporal, the API and both workers, until Ctrl-C.

    Everything it starts is real, needs no Docker, and ends with it. Orders survive in --data.
    """
    options = Options(
        data=None if ephemeral else data,
        host=host,
        port=port,
        postgres_port=postgres_port,
        temporal_port=temporal_port,
        ui_port=None if no_ui else ui_port,
    )
    this_run = _Run(options)
    try:
        _check_ports(options)
        code = asyncio.run(this_run.to_the_end())
    except TrellisError as error:
        typer.echo(f"trellis: {error}", err=True)
        code = 1
    if this_run.started:
        _leave(code)
    raise typer.Exit(code)


class _Run:
    """One run, from the first check to the last process."""

    def __init__(self, options: Options) -> None:
        self.started = False
        self._options = options
        self._console = Console(highlight=False)
        self._signals = _Signals(self._say)

    async def to_the_end(self) -> int:
        """Run until somebody stops it; the exit code.

        Raises:
            LocalError: something did not start, or ended by itself. Everything is stopped then.
        """
        stack = self._stack(_settings())
        with self._signals:
            self._signals.when_forced(stack.hurry)
            try:
                await self._signals.or_stop(stack.prepare())
                with listen(self._options.host, self._options.port, "the API", "--port") as bound:
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

    def _stack(self, settings: Settings) -> LocalStack:
        return LocalStack(
            self._options.data,
            postgres_port=self._options.postgres_port,
            temporal_port=self._options.temporal_port,
            ui_port=self._options.ui_port,
            namespaces=[settings.temporal_namespace],
            report=self._say,
        )

    async def _serve(self, stack: LocalStack, bound: socket.socket) -> int:
        # Late: they import the whole product, and a taken port should be told before that.
        from app.db import migrate
        from app.main import create
        from app.telemetry import configure_logging

        await self._timed("Migrations", asyncio.to_thread(migrate, stack.database_url))
        overrides = {"api_host": self._options.host, "api_port": self._options.port, **stack.settings_overrides()}
        settings = _settings(**overrides)
        configure_logging(settings)
        api = ApiServer(create(settings), bound)
        self._signals.when_forced(api.hurry)
        drain = settings.graceful_shutdown_timeout + DRAIN_MARGIN
        try:
            await self._timed("API and workers", api.start())
            _announce(self._console, api.url, stack)
            await self._until_over(api, stack)
        except ServerDied as error:
            self._say(f"\n{error}\n")
            drain = 0.0  # what the workers would finish cannot be recorded any more
            raise
        finally:
            self._say("Stopping the API and the workers …")
            drained = await api.stop(drain)
        return 0 if drained else FORCED

    async def _until_over(self, api: ApiServer, stack: LocalStack) -> None:
        """Wait for a signal, for the end of the application or of a server; the last two are errors."""
        await self._signals.or_stop(_first_of(api.wait(), stack.watch()))

    async def _timed(self, name: str, work: Coroutine[Any, Any, T]) -> T:
        self._say(f"{name} …")
        started = time.monotonic()
        result = await self._signals.or_stop(work)
        self._say(f"{name} ready in {time.monotonic() - started:.1f} s")
        return result

    def _say(self, line: str) -> None:
        self._console.print(Text(line), soft_wrap=True)


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
            asyncio.get_running_loop().add_signal_handler(number, self._received)

    def __exit__(self, *_: object) -> None:
        for number in self.NUMBERS:
            asyncio.get_running_loop().remove_signal_handler(number)

    def when_forced(self, action: Callable[[], None]) -> None:
        """Call `action` at the second signal."""
        self._forced.append(action)

    async def or_stop(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of `work`; at the first signal it is cancelled and awaited.

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
        return task.result()

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


async def _first_of(*works: Coroutine[Any, Any, None]) -> None:
    """Wait for the first to end or fail, and cancel the others."""
    tasks = [asyncio.create_task(work) for work in works]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()


def _check_ports(options: Options) -> None:
    wanted = {
        "--port": options.port,
        "--postgres-port": options.postgres_port,
        "--temporal-port": options.temporal_port,
        "--ui-port": options.ui_port,
    }
    users: dict[int, str] = {}
    for option, port in wanted.items():
        if port is not None and port in users:
            raise PortTaken(f"{port}, for {users[port]} and {option} at once; give each its own")
        if port is not None:
            users[port] = option


def _settings(**overrides: Any) -> Settings:
    try:
        return Settings(**overrides)
    except ValidationError as error:
        first = error.errors()[0]
        name = "_".join(("TRELLIS", *map(str, first["loc"]))).upper()
        raise LocalError(f"the environment variable {name} is wrong: {first['msg']}") from error


def _announce(console: Console, api: str, stack: LocalStack) -> None:
    """Where everything is, and what to try; nothing here is wrapped, so that it can be copied."""
    rows = {
        "API": api,
        "API docs": f"{api}/docs",
        "Temporal UI": f"http://127.0.0.1:{stack.temporal.ui_port}" if stack.temporal.ui_port else "off",
        "Temporal": stack.temporal_address,
        "Temporal metrics": f"http://127.0.0.1:{stack.temporal.metrics_port}/metrics",
        "PostgreSQL": stack.database_url,
        "Data": str(stack.data),
        "Logs": f"{stack.postgres.log}, {stack.temporal.log.name}",
    }
    table = Table.grid(padding=(0, 2))
    for name, value in rows.items():
        table.add_row(Text(name, style="bold"), Text(value, no_wrap=True, overflow="ignore"))
    console.print()
    console.print(table, crop=False, width=max(console.width, 20 + max(map(len, rows.values()))))
    console.print(Text(_CURL.replace("API", api)), soft_wrap=True)


def _leave(code: int) -> None:
    """End the process without taking the interpreter apart.

    Threads of the Temporal SDK may still call into Python then, which now and then ends in a crash instead of `code`
    (temporalio/sdk-python issue 300).
    """
    atexit._run_exitfuncs()  # noqa: SLF001 - all of normal exit that matters here
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
