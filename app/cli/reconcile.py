"""`trellis reconcile`: settle what was left behind."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import TYPE_CHECKING, Annotated

import typer

from app.cli import output
from app.cli.client import AsJson, ExitCode

if TYPE_CHECKING:
    from app.reconcile.models import ReconcileReport, ReconcileRequest, Repair
    from app.settings import Settings


def reconcile(
    apply: Annotated[bool, typer.Option("--apply", help="Settle; without it, only say what would be done.")] = False,
    grace: Annotated[
        float,
        typer.Option(help="Seconds an order must have been at its step and its workflow gone.", min=0),
    ] = 120,
    settle: Annotated[
        float, typer.Option(help="Seconds after which the payment of a closed order is settled for good.", min=0)
    ] = 600,
    every: Annotated[
        float | None, typer.Option(help="Keep a Temporal schedule that does this every so many seconds; 0 removes it.")
    ] = None,
    accept_unknown: Annotated[
        bool,
        typer.Option(
            "--accept-unknown",
            help="Settle although Temporal does not know more than a small share of the open orders: their workflows "
            "are lost, and it is not the wrong Temporal.",
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Bring orders whose workflow is gone to a correct end: refund, cancel, or shipped if the carrier has the parcel.

    A dry run by default. An order with a running workflow is never touched. Every repair writes an event
    `reconciled`; docs/reliability.md says what is done from which step.

    Exit codes: 0 nothing is left to do; 1 something is (in a dry run: would be done); 2 wrong usage, or a Temporal
    that knows too few of the orders; 3 something unexpected stands in the way of an order, which is for a person; 4
    PostgreSQL or Temporal did not answer or refuses, or a setting is wrong.
    """
    from app.reconcile.models import ReconcileRequest
    from app.settings import load

    if every is not None and accept_unknown:
        raise typer.BadParameter("--accept-unknown is for one pass, not for every pass of a schedule")
    request = ReconcileRequest(
        apply=apply or every is not None, grace_seconds=grace, settle_seconds=settle, accept_unknown=accept_unknown
    )
    # Beside a process that serves metrics, as in its container, the port is taken.
    settings = load(metrics_port=0)
    output.log_to_stderr(settings)
    if every is not None:
        asyncio.run(_schedule(settings, request, every))
        raise typer.Exit(ExitCode.OK)
    report = asyncio.run(_reconcile(settings, request))
    if as_json:
        output.as_json(report.model_dump(mode="json"))
    else:
        _print(report, apply=apply)
    raise typer.Exit(_exit_code(report))


async def _reconcile(settings: Settings, request: ReconcileRequest) -> ReconcileReport:
    from app.services import open_services
    from app.workers import reconciler

    async with open_services(settings) as services:
        return await reconciler(services, request).run()


async def _schedule(settings: Settings, request: ReconcileRequest, every: float) -> None:
    from app.reconcile.schedule import drop_schedule, keep_schedule
    from app.temporal.client import connect

    client = await connect(settings)
    if every:
        await keep_schedule(client, settings.order_task_queue, timedelta(seconds=every), request)
        output.remark(f"reconciling every {every:g} s")
    else:
        await drop_schedule(client)
        output.remark("no longer reconciling by schedule")


def _print(report: ReconcileReport, *, apply: bool) -> None:
    if report.repairs:
        rows = [(repair.order_id, repair.found, repair.action, _outcome(repair)) for repair in report.repairs]
        output.table(("ORDER", "FOUND", "ACTION", "OUTCOME"), rows)
    summary = f"{report.looked_at} orders looked at, {report.settled} settled, {report.left} left"
    summary += f", {report.defects} of them for a person" if report.defects else ""
    output.remark(summary if apply else f"{summary} (a dry run: repeat with --apply)")


def _told(error: Exception) -> str:
    from temporalio.service import RPCError

    from app.temporal.client import is_namespace_missing

    missing = isinstance(error, RPCError) and is_namespace_missing(error)
    return "there is no such namespace" if missing else type(error).__name__


def _outcome(repair: Repair) -> str:
    if repair.defect:
        return f"DEFECT: {repair.detail}"
    return "done" if repair.done else repair.detail or "would be done"


def _exit_code(report: ReconcileReport) -> ExitCode:
    if report.defects:
        return ExitCode.REFUSED
    return ExitCode.ENDED_OTHERWISE if report.left else ExitCode.OK
