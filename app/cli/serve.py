"""`trellis api`, `worker`, `migrate`, `run-all`: the parts, as processes against configured servers.

What a command needs is imported when it runs: Temporal's SDK and FastAPI take more than a second, which `--help` and
tab completion need not wait for.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from app.cli.client import ExitCode

if TYPE_CHECKING:
    from collections.abc import Iterator

    import uvicorn

    from app.settings import Settings


class Queue(StrEnum):
    """Which worker."""

    DEFAULT = "default"
    SHIPPING = "shipping"


def api(
    host: Annotated[str | None, typer.Option(help="Address to listen on. [default: TRELLIS_API_HOST]")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on. [default: TRELLIS_API_PORT]")] = None,
) -> None:
    """Serve the HTTP API, without workers.

    Exit codes: 0 stopped; 2 wrong usage; 4 the port is taken, or a setting is wrong.
    """
    _end_on_sigterm()
    settings = _settings(host, port, partners=True)
    from app.api import create_app

    serve(create_app(settings), settings)


def run_all(
    host: Annotated[str | None, typer.Option(help="Address to listen on. [default: TRELLIS_API_HOST]")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on. [default: TRELLIS_API_PORT]")] = None,
) -> None:
    """Migrate if needed, then serve the API and work on both task queues, all in this process.

    Exit codes: 0 stopped; 1 the workers failed; 2 wrong usage; 4 PostgreSQL refuses, the port is taken, or a setting
    is wrong.
    """
    _end_on_sigterm()
    settings = _settings(host, port, partners=True)
    from app.db import pool as db
    from app.main import create

    # A schema that is new enough is left alone, even where it is newer: a release that was rolled back still starts.
    version = asyncio.run(_reach_database(settings, wait=True))
    if version is None or version < db.SCHEMA_VERSION:
        db.migrate(settings.database_url.get_secret_value(), password_file=settings.database_password_file)
    application = create(settings)
    try:
        serve(application, settings)
    finally:
        if application.state.workers_failed:
            sys.exit(1)


def _settings(host: str | None = None, port: int | None = None, *, partners: bool = False) -> Settings:
    """The settings of this process, with logging set up. Where it works with partners, they must have been chosen."""
    from app.settings import load
    from app.telemetry.logs import configure_logging

    given = {"api_host": host, "api_port": port}
    settings = load(**{name: value for name, value in given.items() if value is not None})
    configure_logging(settings)
    if partners:
        # First what needs no imports, as it is what most often ends here.
        settings.require_partners()
        from app.partners.clients import check

        check(settings)
    return settings


def _end_on_sigterm(code: int = 0) -> None:
    """End with `code` at SIGTERM as long as nobody else listens to it, and when uvicorn repeats it after the drain.

    Without this, process 1 of a container does not end in the first case, as the kernel drops its unhandled signals;
    and any other process ends in the second as if it had been killed.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(code))


def serve(application: object, settings: Settings) -> None:
    """Run an ASGI application where the settings say, until SIGINT or SIGTERM."""
    import uvicorn

    from app.http import serving

    config = uvicorn.Config(
        application,  # type: ignore[arg-type]
        host=settings.api_host,
        port=settings.api_port,
        http=serving.protocol(settings),
        log_config=None,
        access_log=False,
        timeout_keep_alive=settings.api_keep_alive_timeout,
        timeout_graceful_shutdown=serving.GRACE,
    )
    run_server(config)


def run_server(config: uvicorn.Config) -> None:
    """Run uvicorn until a signal ends it; where the host is `::`, on both families, for uvicorn takes it for one."""
    import uvicorn

    from app.domain import hosts

    sockets = None
    if config.host == "::":
        # A port that is taken is for uvicorn to tell, as for every other host.
        with contextlib.suppress(OSError):
            sockets = [hosts.bind(config.host, config.port)]
    server = uvicorn.Server(config)
    with contextlib.suppress(KeyboardInterrupt), not_started_is_unavailable():
        server.run(sockets)
    if not server.started:
        sys.exit(ExitCode.UNAVAILABLE)


@contextlib.contextmanager
def not_started_is_unavailable() -> Iterator[None]:
    """End with our code for it when uvicorn does not start; its own is what we say of an order that refuses."""
    from uvicorn.config import STARTUP_FAILURE

    try:
        yield
    except SystemExit as exit_:
        if exit_.code == STARTUP_FAILURE:
            raise SystemExit(ExitCode.UNAVAILABLE) from None
        raise


def worker(
    queue: Annotated[Queue, typer.Argument(help="`default`: orders and payments; `shipping`: parcels.")],
) -> None:
    """Work on one task queue. SIGTERM lets running attempts finish.

    Exit codes: 0 stopped; 2 wrong usage; 4 PostgreSQL or Temporal refuses, or a setting is wrong.
    """
    _end_on_sigterm()
    import uvloop

    uvloop.run(_work(_settings(partners=True), queue))


async def _work(settings: Settings, queue: Queue) -> None:
    from app import workers
    from app.services import open_services
    from app.workers import order_worker, shipping_worker

    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    part = order_worker if queue is Queue.DEFAULT else shipping_worker
    async with open_services(settings) as services:
        await workers.run(services, [part(services)], stop)


def migrate(
    wait: Annotated[bool, typer.Option(help="Wait for PostgreSQL to answer; otherwise fail at once.")] = True,
) -> None:
    """Bring the database's schema to this release's. Repeating it is harmless.

    Exit codes: 0 it is there; 2 wrong usage; 4 PostgreSQL did not answer or refuses, or a setting is wrong; 143 ended
    by SIGTERM.
    """
    _end_on_sigterm(128 + signal.SIGTERM)  # not 0: whoever waits for the migration must not take it for done
    from app.db import pool as db

    settings = _settings()
    asyncio.run(_reach_database(settings, wait=wait))
    revision = db.migrate(settings.database_url.get_secret_value(), password_file=settings.database_password_file)
    newer = f", newer than this release's {db.SCHEMA_VERSION}: left alone" if revision > db.SCHEMA_VERSION else ""
    typer.echo(f"the schema is at {revision}{newer}")


async def _reach_database(settings: Settings, *, wait: bool) -> str | None:
    from app.db import pool as db

    async with db.create_pool(settings) as pool:
        # Whoever is refused is told so at once: unlike an outage, that does not pass by itself.
        return await (db.wait_until_answering(pool, through_refusals=False) if wait else db.schema_version(pool))
