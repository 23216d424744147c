"""`trellis deployment`: which version of the workers gets the orders."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from app.cli import output
from app.cli.client import AsJson, ExitCode

if TYPE_CHECKING:
    from app.settings import Settings
    from app.temporal.versions import Promotion, Version

app = typer.Typer(
    no_args_is_help=True,
    help="Versions of the workers, for a deployment with worker versioning (docs/decisions/0030-worker-versioning.md).",
)

Name = Annotated[str | None, typer.Option("--name", help="The worker deployment. [default: TEMPORAL_DEPLOYMENT_NAME]")]


@app.command()
def promote(
    name: Name = None,
    build_id: Annotated[str | None, typer.Option(help="The version. [default: TEMPORAL_WORKER_BUILD_ID]")] = None,
    unversioned: Annotated[
        bool, typer.Option("--unversioned", help="Give the orders back to workers without a version.")
    ] = False,
    timeout: Annotated[float, typer.Option(help="Seconds to wait for the version's workers.", min=1)] = 300,
) -> None:
    """Wait until the version's workers poll both task queues, then make it the current one.

    The current version gets the orders that begin, and those on their way that are not pinned to another. Repeating
    this is harmless, and promoting an older version is how one goes back.

    Exit codes: 0 it is current; 2 wrong usage; 4 it could not be made so in time, Temporal did not answer or refuses,
    or a setting is wrong.
    """
    from app.settings import load
    from app.temporal.versions import Promotion

    settings = load()
    output.log_to_stderr(settings)
    if unversioned and build_id:
        _wrong("--unversioned and --build-id exclude each other")
    build = None if unversioned else build_id or settings.temporal_worker_build_id
    if build is None and not unversioned:
        _wrong("which version? Give --build-id or set TEMPORAL_WORKER_BUILD_ID")
    promotion = Promotion(_name(name, settings), build, (settings.order_task_queue, settings.shipping_task_queue))
    asyncio.run(_carry_out(settings, promotion, timeout))


@app.command()
def show(name: Name = None, as_json: AsJson = False) -> None:
    """The versions that Temporal knows, newest first, and which one is current.

    `draining`: no longer current, and orders are still pinned to it; once `drained`, its workers may go.

    Exit codes: 0 ok; 1 there is no such deployment; 2 wrong usage; 4 Temporal did not answer, or a
    setting is wrong.
    """
    from app.settings import load

    settings = load()
    output.log_to_stderr(settings)
    found = asyncio.run(_versions(settings, _name(name, settings)))
    if as_json:
        output.as_json([version.as_dict() for version in found])
        return
    rows = [
        (version.build, version.state, output.moment(version.since), output.moment(version.created))
        for version in found
    ]
    output.table(("BUILD ID", "STATE", "SINCE", "CREATED"), rows)
    if not any(version.state == "current" for version in found):
        output.remark("no version is current: orders go to unversioned workers")


async def _carry_out(settings: Settings, promotion: Promotion, timeout: float) -> None:
    from app.temporal.client import connect

    client = await connect(settings)
    await promotion.carry_out(client, timeout=timeout, say=output.remark)


async def _versions(settings: Settings, name: str) -> list[Version]:
    from temporalio.service import RPCError, RPCStatusCode

    from app.temporal.client import connect
    from app.temporal.versions import versions

    client = await connect(settings)
    try:
        return await versions(client, name)
    except RPCError as error:
        if error.status is not RPCStatusCode.NOT_FOUND:
            raise
        typer.echo(f"trellis: {error}", err=True)
        raise typer.Exit(ExitCode.ENDED_OTHERWISE) from None


def _name(given: str | None, settings: Settings) -> str:
    return (
        given
        or settings.temporal_deployment_name
        or _wrong("which deployment? Give --name or set TEMPORAL_DEPLOYMENT_NAME")
    )


def _wrong(what: str) -> NoReturn:
    typer.echo(f"trellis: {what}", err=True)
    raise typer.Exit(ExitCode.USAGE)
