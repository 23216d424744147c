"""What commands print: tables for people on a terminal, aligned text for pipes, JSON for programs."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final

import typer

from app.domain.steps import FINAL_STEPS, Step
from app.domain.text import printable

if TYPE_CHECKING:
    from app.settings import Settings

Row = Sequence[str]

#: Colours of steps and other events on a terminal.
_COLOURS: Final[dict[str, str]] = {
    **dict.fromkeys(FINAL_STEPS, "red"),
    Step.SHIPPED: "green",
    Step.AWAITING_REVIEW: "yellow",
    "attempt_failed": "yellow",
}


def as_json(answer: Any, *, lines: bool = False) -> None:
    """One JSON document, or with `lines` one of the lines of a stream."""
    typer.echo(json.dumps(answer, indent=None if lines else 2))


def log_to_stderr(settings: Settings) -> None:
    """Let log lines of a command go where they do not mix with what it prints; below an error only those that were
    asked for by TRELLIS_LOG_LEVEL, as what goes wrong is one line."""
    import structlog

    least = settings.log_level if "log_level" in settings.model_fields_set else "error"
    levels = ("debug", "info", "warning", "error", "critical")

    def drop_the_rest(_logger: object, method: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
        if method in levels and levels.index(method) < levels.index(least):
            raise structlog.DropEvent
        return event

    structlog.configure(
        processors=[
            drop_the_rest,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty()),
        ],
        # Asked for with each line: a stream may have been replaced meanwhile.
        logger_factory=lambda *_: structlog.PrintLogger(sys.stderr),
    )


def table(columns: Row, rows: Sequence[Row]) -> None:
    """Rows under headings. A cell that is a `Step` gets its colour on a terminal."""
    if sys.stdout.isatty():
        _rich_table(columns, rows)
    else:
        _aligned([columns, *([printable(cell) for cell in row] for row in rows)])


def facts(pairs: Sequence[tuple[str, str]]) -> None:
    """One thing: names and values. What has no value is left out."""
    known = [(name, value) for name, value in pairs if value]
    if sys.stdout.isatty():
        _rich_table(None, known)
    else:
        _aligned([(name, printable(value)) for name, value in known])


def line(text: str, *, like: str = "") -> None:
    """A line, on a terminal in the colour of the event `like`."""
    typer.secho(printable(text), fg=_COLOURS.get(like))


def remark(text: str) -> None:
    """Something for the reader that is not the answer."""
    typer.echo(printable(text), err=True)


def clear() -> None:
    """An empty screen, on a terminal."""
    from rich.console import Console

    Console().clear()


def moment(time: datetime | None) -> str:
    """Local time with its offset from UTC, and with the date unless it is today's."""
    if time is None:
        return ""
    local = time.astimezone()
    offset = f"{local:%z}" if local.utcoffset() else "Z"
    clock = f"{local:%H:%M:%S}.{local.microsecond // 1000:03}{offset}"
    return clock if local.date() == datetime.now(local.tzinfo).date() else f"{local:%Y-%m-%d} {clock}"


def _aligned(rows: Sequence[Row]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        typer.echo("  ".join(map(str.ljust, row, widths)).rstrip())


def _rich_table(columns: Row | None, rows: Sequence[Row]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    drawn = Table(*(columns or ()), box=box.SIMPLE_HEAD, show_header=columns is not None, header_style="bold")
    for row in rows:
        drawn.add_row(
            *(Text(printable(cell), _COLOURS.get(cell, "") if isinstance(cell, Step) else "") for cell in row)
        )
    Console().print(drawn)
