"""The one place where an error becomes the end of a command: one line on standard error, and an exit code."""

from __future__ import annotations

import json
import os
import sys
import traceback
from typing import Final, NamedTuple

import typer

from app.cli.client import CallFailed, ExitCode
from app.errors import DatabaseUnavailable, InvalidRequest, TrellisError, WrongNamespace


class End(NamedTuple):
    """How a command ends."""

    message: str
    code: int


def end_of(error: Exception) -> End:
    """What an error means to whoever ran the command.

    Exit code 4 is for what is not available, refuses us, or is misconfigured; 70 for a defect of ours. Never 1, which
    is a result: the audit found something, or there is something left to do.
    """
    if isinstance(error, CallFailed):
        return End(str(error), error.code)
    if isinstance(error, (InvalidRequest, WrongNamespace)):
        return End(str(error), ExitCode.USAGE)
    return _of_the_servers(error) or _of_ours(error)


def _of_ours(error: Exception) -> End:
    if isinstance(error, TrellisError):
        return End(str(error), ExitCode.UNAVAILABLE)
    if _is_of_telemetry(error):
        return End(f"an OTEL_* variable is wrong: {error}", ExitCode.UNAVAILABLE)
    if isinstance(error, OSError):
        return End(f"{error.strerror or error}: {error.filename or type(error).__name__}", ExitCode.UNAVAILABLE)
    kind = type(error).__name__
    return End(f"unexpected {kind}: a defect of this program; TRELLIS_LOG_LEVEL=debug shows where", ExitCode.DEFECT)


def _is_of_telemetry(error: BaseException) -> bool:
    """OpenTelemetry reads its variables while it is imported, and raises whatever comes to hand."""
    stack, names = error.__traceback__, set()
    while stack is not None:
        names.add(stack.tb_frame.f_globals.get("__name__", "").partition(".")[0])
        stack = stack.tb_next
    return "opentelemetry" in names


def _of_the_servers(error: Exception) -> End | None:
    """For errors of their drivers, which are here only if a command has loaded these."""
    origin = type(error).__module__.partition(".")[0]
    if origin in {"sqlalchemy", "psycopg", "alembic"}:
        cause = getattr(error, "orig", None) or error
        return End(f"the migration failed: {_first_line(cause)}", ExitCode.UNAVAILABLE)
    if origin == "asyncpg" or isinstance(error, DatabaseUnavailable):
        from app.db.pool import reason

        return End(f"PostgreSQL at TRELLIS_DATABASE_URL: {reason(error)}", ExitCode.UNAVAILABLE)
    if origin == "temporalio" or (isinstance(error, RuntimeError) and str(error).startswith(_OF_TEMPORAL)):
        status = getattr(getattr(error, "status", None), "name", "")
        words = ": ".join(filter(None, (status, _first_line(error))))
        return End(f"Temporal at TRELLIS_TEMPORAL_ADDRESS: {words}", ExitCode.UNAVAILABLE)
    return None


#: How the SDK begins to say that there is no Temporal, or not what a worker needs; its class says nothing.
_OF_TEMPORAL: Final = ("Failed client connect", "Worker validation failed")


def _first_line(error: object) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def tell(end: End, error: Exception | None = None) -> None:
    """The line. As JSON where the command was to print JSON; behind the stack of `error` where that was asked for."""
    if error is not None and os.environ.get("TRELLIS_LOG_LEVEL") == "debug":
        traceback.print_exception(error)
    if "--json" in sys.argv[1:]:
        typer.echo(json.dumps({"error": end.message, "exit_code": int(end.code)}), err=True)
    else:
        typer.echo(f"trellis: {end.message}", err=True)
