"""`trellis namespace`: which Temporal namespace the database belongs to."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from app.cli import output
from app.cli.client import ExitCode

if TYPE_CHECKING:
    from app.settings import Settings
    from app.temporal.identity import Identity

T = TypeVar("T")

app = typer.Typer(no_args_is_help=True, help="Which Temporal namespace the database belongs to.")


@app.command()
def show() -> None:
    """Show the ids of the namespace that the database belongs to, and of the one that is configured.

    Exit codes: 0 they are the same, or no worker has started yet; 1 they differ; 2 wrong usage; 4 PostgreSQL or
    Temporal did not answer, or a setting is wrong.
    """
    bound, found = _carried_out(_both)
    output.table(("", "ID"), [("the database belongs to", bound or "none yet"), ("configured", found)])
    raise typer.Exit(ExitCode.OK if bound in {None, found} else ExitCode.ENDED_OTHERWISE)


@app.command()
def bind(
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Let the database belong to the configured namespace: after a restore, or when Temporal was moved or made anew.

    From then on every open order whose workflow this namespace does not know counts as lost: `trellis reconcile`
    cancels and refunds it, after a question (`--accept-unknown`). Workflows of these orders that still run in the other
    namespace must be ended there first, or both will act. Restart workers and API afterwards.

    Exit codes: 0 it is done, or was so before; 2 wrong usage, or not confirmed; 4 PostgreSQL or Temporal did not
    answer, or a setting is wrong.
    """
    bound, found = _carried_out(_both)
    if bound == found:
        output.remark(f"the database belongs to {found} already")
        return
    if bound and not yes:
        question = f"The database belongs to {bound}. Open orders that {found} does not know will count as lost. Bind?"
        if not typer.confirm(question, err=True):
            raise typer.Exit(ExitCode.USAGE)
    output.remark(f"the database belongs to {_carried_out(_bind)} now")


async def _both(identity: Identity) -> tuple[str | None, str]:
    return await identity.bound(), await identity.found()


async def _bind(identity: Identity) -> str:
    return await identity.bind()


def _carried_out(act: Callable[[Identity], Awaitable[T]]) -> T:
    from temporalio.service import RPCError

    from app.db.pool import UNAVAILABLE
    from app.settings import load

    async def run() -> T:
        async with _opened(load(metrics_port=0)) as identity:
            return await act(identity)

    try:
        return asyncio.run(run())
    except (RPCError, RuntimeError, *UNAVAILABLE) as error:
        typer.echo(f"trellis: PostgreSQL or Temporal did not answer ({type(error).__name__})", err=True)
        raise typer.Exit(ExitCode.UNAVAILABLE) from None


@asynccontextmanager
async def _opened(settings: Settings) -> AsyncIterator[Identity]:
    from app.services import open_services
    from app.temporal.identity import Identity

    output.log_to_stderr(settings)
    async with open_services(settings) as services:
        yield Identity(services.pool, services.temporal)
