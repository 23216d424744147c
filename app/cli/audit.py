"""`trellis audit`: are the books right?"""

from __future__ import annotations

import asyncio
import contextlib
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from app.cli import output
from app.cli.client import AsJson, ExitCode

if TYPE_CHECKING:
    from app.audit.auditor import Options, Sources
    from app.audit.models import Report
    from app.services import Services
    from app.settings import Settings


class Partners(StrEnum):
    """How the partners are asked."""

    AUTO = "auto"
    LEDGER = "ledger"
    LOOKUP = "lookup"
    NONE = "none"


def audit(
    as_json: AsJson = False,
    partners: Annotated[
        Partners,
        typer.Option(
            help="How to ask provider and carrier. `ledger`: their /v1/ledger, as the sandbox has one; `lookup`: the "
            "provider by idempotency key, the carrier not at all; `none`; `auto`: whatever those that are in use show: "
            "the built-in sandbox a ledger, others `lookup`."
        ),
    ] = Partners.AUTO,
    temporal: Annotated[bool, typer.Option("--temporal/--no-temporal", help="Ask Temporal, too.")] = True,
    since: Annotated[
        float | None, typer.Option(help="Only orders that moved in the last so many hours. [default: all]", min=0)
    ] = None,
    settle: Annotated[float, typer.Option(help="Seconds a closed order's payment may be in doubt.", min=0)] = 900,
    page: Annotated[int, typer.Option(help="Orders that are read at a time.", min=1, max=10_000)] = 500,
    timeout: Annotated[float, typer.Option(help="Seconds one read of the tables may take.", min=0.1)] = 60,
    kinds: Annotated[bool, typer.Option("--kinds", help="List the kinds of violation, and do nothing.")] = False,
) -> None:
    """Compare orders, payments, events, the partners' ledgers and Temporal; report every contradiction.

    Changes nothing, and may run beside a working system: an order that moves is looked at again before it is
    reported.

    Exit codes: 0 everything was looked at and is right; 1 violations, also those that could not be looked at a second
    time and are marked unconfirmed; 2 wrong usage, or another system's Temporal; 4 incomplete: something did not
    answer, and nothing wrong was found in the rest; or a setting is wrong.
    """
    from app.audit.auditor import Options
    from app.settings import load

    if kinds:
        _print_kinds()
        return
    began = datetime.now(UTC) - timedelta(hours=since) if since is not None else None
    options = Options(since=began, page=page, settle_seconds=settle)
    # Beside a process that serves metrics, as in its container, the port is taken.
    report = asyncio.run(_audit(load(metrics_port=0), partners, temporal, options, timeout))
    if as_json:
        output.as_json(report.model_dump(mode="json") | {"clean": report.clean})
    else:
        _print(report)
    raise typer.Exit(_exit_code(report))


async def _audit(settings: Settings, partners: Partners, temporal: bool, options: Options, timeout: float) -> Report:
    from app.audit.auditor import Auditor
    from app.audit.repository import BooksRepository
    from app.services import open_services

    output.log_to_stderr(settings)
    async with open_services(settings) as services:
        if temporal:
            await _require_own(services)
        books = BooksRepository(services.pool, timeout)
        return await Auditor(books, asked_of(services, partners, temporal=temporal), options).run()


async def _require_own(services: Services) -> None:
    from temporalio.service import RPCError

    from app.temporal.identity import Identity

    # A Temporal that does not answer makes the audit incomplete, and the report says so.
    with contextlib.suppress(RPCError, RuntimeError):
        await Identity(services.pool, services.temporal).require()


def asked_of(services: Services, partners: Partners, *, temporal: bool) -> Sources:
    """Whom to ask: the partners that are wired, whatever they are.

    Raises:
        InvalidRequest: a ledger is asked for, and a partner has none.
    """
    from app.audit.auditor import Sources
    from app.audit.executions import Executions
    from app.audit.partners import (
        CarrierLedger,
        GatewayBooks,
        ProviderLedger,
        books_of_carrier,
        books_of_provider,
        ledger_of,
    )

    executions = Executions(services.temporal) if temporal else None
    gateway, carrier = services.gateway, services.carrier
    match partners:
        case Partners.AUTO:
            return Sources(executions, books_of_provider(gateway), books_of_carrier(carrier))
        case Partners.LEDGER:
            return Sources(executions, ProviderLedger(ledger_of(gateway)), CarrierLedger(ledger_of(carrier)))
        case Partners.LOOKUP:
            return Sources(executions, GatewayBooks(gateway))
        case Partners.NONE:
            return Sources(executions)


def _print(report: Report) -> None:
    if report.violations:
        rows = [
            (violation.kind, violation.order_id, f"{'UNCONFIRMED: ' * violation.unconfirmed}{violation.detail}")
            for violation in report.violations
        ]
        output.table(("VIOLATION", "ORDER", "DETAIL"), rows)
    for reason in report.incomplete:
        output.remark(f"incomplete: {reason}")
    unconfirmed = sum(violation.unconfirmed for violation in report.violations)
    output.remark(
        f"{report.orders} orders, {report.payments} payments at the provider, {report.workflows} closed workflows: "
        f"{len(report.violations)} violations" + (f", {unconfirmed} unconfirmed" if unconfirmed else "")
    )


def _print_kinds() -> None:
    from app.audit.models import MEANING

    output.table(("VIOLATION", "MEANING"), [(kind, meaning) for kind, meaning in MEANING.items()])


def _exit_code(report: Report) -> ExitCode:
    if report.violations:
        return ExitCode.ENDED_OTHERWISE
    return ExitCode.UNAVAILABLE if report.incomplete else ExitCode.OK
