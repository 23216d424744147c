"""`trellis sandbox`: the payment provider and the carrier as a process of their own."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Annotated

import typer

from app.cli.serve import not_started_is_unavailable

if TYPE_CHECKING:
    from app.settings import Settings


def sandbox(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")] = 8090,
    database_url: Annotated[
        str | None,
        typer.Option(
            envvar="TRELLIS_SANDBOX_DATABASE_URL",
            help="PostgreSQL of the ledger; unset: TRELLIS_DATABASE_URL, in a schema of its own.",
            show_envvar=True,
        ),
    ] = None,
) -> None:
    """Serve the sandbox payment provider (/payments) and carrier (/carrier).

    Exit codes: 0 stopped; 2 wrong usage; 4 the port is taken, or a setting is wrong.
    """
    from app.settings import load

    # By way of the settings, which say what is wrong with a URL.
    settings = load(**({"sandbox_database_url": database_url} if database_url else {}))
    with not_started_is_unavailable():
        asyncio.run(_serve(host, port, settings))


async def _serve(host: str, port: int, settings: Settings) -> None:
    import uvicorn

    from app.domain import hosts
    from app.sandbox.app import create_sandbox, ledger_of

    # The ledger opens at the first request, so that this may start before its database does.
    async with ledger_of(settings) as ledger:
        # Without an access log: it would say nothing that the ledger does not say better.
        # Connections stay longer than any client keeps them, as the API's do.
        config = uvicorn.Config(
            create_sandbox(ledger), host=host, port=port, access_log=False, lifespan="off", timeout_keep_alive=75
        )
        # After Config, which sets up logging.
        logging.getLogger("uvicorn.error").addFilter(_lost_on_purpose)
        sockets = [hosts.bind(host, port)] if host == "::" else None
        await uvicorn.Server(config).serve(sockets)


def _lost_on_purpose(record: logging.LogRecord) -> bool:
    """Keeps replies that were meant to be lost out of the log, where each would be a stack of forty lines."""
    from app.sandbox.protocol import ReplyLost

    return not (record.exc_info and isinstance(record.exc_info[1], ReplyLost))
