"""`trellis`: run everything, run the parts, drive orders."""

from __future__ import annotations

import typer

from app.cli import deployment, order, serve
from app.cli.audit import audit
from app.cli.client import EXIT_CODES
from app.cli.demo import demo
from app.cli.load import load
from app.cli.reconcile import reconcile
from app.cli.run import run
from app.cli.sandbox import sandbox
from app.errors import TrellisError

app = typer.Typer(
    name="trellis",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="The life of an order - review, payment, shipping - as Temporal workflows.\n\n"
    "Settings come from TRELLIS_* environment variables; docs/configuration.md lists them.",
)
app.command()(run)
app.command()(serve.api)
app.command()(serve.worker)
app.command()(serve.run_all)
app.command()(serve.migrate)
app.command()(sandbox)
app.command()(audit)
app.command()(reconcile)
app.add_typer(order.app, name="order")
app.add_typer(deployment.app, name="deployment")
app.command(epilog=EXIT_CODES)(demo)
app.command(epilog=EXIT_CODES)(load)


def main() -> None:
    """The console script. What went wrong is one line on standard error, never a stack trace."""
    try:
        app()
    except TrellisError as error:
        typer.echo(f"trellis: {error}", err=True)
        raise SystemExit(1) from None
