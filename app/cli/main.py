"""`trellis`: run everything, run the parts, drive orders."""

from __future__ import annotations

import atexit
import os
import sys
from contextlib import suppress
from importlib import metadata
from typing import Annotated, Final, NoReturn

import typer

from app.cli import deployment, edge, namespace, order, serve
from app.cli.audit import audit
from app.cli.client import EXIT_CODES
from app.cli.demo import demo
from app.cli.load import load
from app.cli.reconcile import reconcile
from app.cli.run import run
from app.cli.sandbox import sandbox
from app.cli.watch import watch


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"trellis {metadata.version('trellis')}")
        raise typer.Exit


app = typer.Typer(
    name="trellis",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="The life of an order - review, payment, shipping - as Temporal workflows.\n\n"
    "Settings come from TRELLIS_* environment variables; docs/configuration.md lists them.",
)


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    pass


app.command()(run)
app.command()(serve.api)
app.command()(serve.worker)
app.command()(serve.run_all)
app.command()(serve.migrate)
app.command()(sandbox)
app.command()(audit)
app.command()(reconcile)
app.add_typer(order.app, name="order")
app.command(epilog=EXIT_CODES)(watch)
app.add_typer(deployment.app, name="deployment")
app.add_typer(namespace.app, name="namespace")
app.command(epilog=EXIT_CODES)(demo)
app.command(epilog=EXIT_CODES)(load)


#: The SDK's native part. Its threads run for as long as the process does.
_CORE: Final = "temporalio.bridge.temporal_sdk_bridge"


def main() -> NoReturn:
    """The console script."""
    code = run_command()
    if _CORE in sys.modules:
        _end_beside_the_core(code)
    sys.exit(code)


def run_command() -> int:
    """Do what the command line says; the exit code. What went wrong is one line on standard error, never a stack."""
    try:
        app()
    except SystemExit as exit_:
        if exit_.code is None or isinstance(exit_.code, int):
            return exit_.code or 0
        typer.echo(exit_.code, err=True)
        return 1
    except Exception as error:  # noqa: BLE001 - the edge: there is nobody behind it
        end = edge.end_of(error)
        edge.tell(end, error)
        return end.code
    return 0


def _end_beside_the_core(code: int) -> NoReturn:
    """Do what the interpreter does at its end but for taking itself apart.

    A thread of the core that lets go of a Python object meanwhile aborts the process ("PyGILState_Release: thread
    state must be current when releasing", CPython 3.11), after the command has done all its work: its caller would
    take that for a failure.
    """
    atexit._run_exitfuncs()  # noqa: SLF001 - the interpreter's own way, which has no public name
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # nobody reads it any more
            stream.flush()
    os._exit(code)
