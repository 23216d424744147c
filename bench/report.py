"""From measured turns to tables: medians, ratios, and the targets they are held against."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from rich.console import Console
from rich.table import Table as RichTable

Results = dict[str, Any]


@dataclass(frozen=True)
class Table:
    """A table for the terminal and for the documents."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""

    def print(self, console: Console) -> None:
        """To the terminal."""
        table = RichTable(*self.columns)
        for column in table.columns[1:]:
            column.justify = "right"
        for row in self.rows:
            table.add_row(*(cell.replace("**", "") for cell in row))
        # Title and note outside: inside they are folded to the table's width.
        console.print("", f"[bold]{self.title}[/]", table, *([self.note] if self.note else []), sep="\n")

    def markdown(self) -> str:
        """To the documents."""
        lines = [f"### {self.title}", "", _row(self.columns), "|---|" + "---:|" * (len(self.columns) - 1)]
        lines += [_row(row) for row in self.rows]
        return "\n".join([*lines, *(["", self.note] if self.note else [])])


def tables(results: Results) -> list[Table]:
    """Everything that was measured."""
    return [
        *(_orders(results, backend) for backend in _backends(results)),
        *(table(results[part]) for part, table in _PARTS.items() if part in results),
        _targets(results),
    ]


def markdown(results: Results, plots: Iterable[str]) -> str:
    """The generated block of docs/performance.md."""
    images = [f"![{name.removesuffix('.svg')}]({name})" for name in plots]
    return "\n\n".join([machine(results), *images, *(table.markdown() for table in tables(results))])


def machine(results: Results) -> str:
    """One paragraph: where, when, of what, and whether to believe it."""
    where, plan = results["machine"], results["plan"]
    size = "a quick run: good enough to see that it works" if plan["quick"] else "a full run"
    load = where["load_before"]
    busy = f" **The machine was busy: load {load:.1f} before the run.**" if load > where["cores"] / 2 else ""
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    dynamic = results.get("dynamic_config", {})  # measurements of before have none
    settings = "".join(f" Temporal with `{key}={json.dumps(value)}`." for key, value in dynamic.items())
    return (
        f"{results['at']}, {size}: {where['cpu']}, {where['cores']} cores, {where['memory_gb']:.0f} GB, "
        f"{where['system']}; {versions}. {plan['rounds']} turns of {plan['orders']} orders, median of the turns."
        f"{settings}{busy}"
    )


def median(turns: Iterable[dict[str, Any]], figure: str) -> float | None:
    """The median of one figure over turns; None if none has it."""
    found = [turn[figure] for turn in turns if turn.get(figure) is not None]
    return statistics.median(found) if found else None


def usual_turns(results: Results, backend: str, contestant: str) -> list[dict[str, Any]]:
    """The turns at the concurrency of the tables."""
    return [
        turn
        for turn in results.get("orders", [])
        if (turn["backend"], turn["contestant"], turn["at_once"]) == (backend, contestant, results["plan"]["usual"])
    ]


def _backends(results: Results) -> list[str]:
    return list(dict.fromkeys(turn["backend"] for turn in results.get("orders", [])))


# --- tables

_FIGURES: Final = (
    ("orders/s", "orders_per_second", 1),
    ("start call p50, ms", "start_p50_ms", 1),
    ("start call p99, ms", "start_p99_ms", 1),
    ("end to end p50, ms", "end_to_end_p50_ms", 0),
    ("end to end p99, ms", "end_to_end_p99_ms", 0),
    ("CPU of Temporal, ms", "cpu_ms_temporal", 1),
    ("CPU of PostgreSQL, ms", "cpu_ms_postgres", 1),
    ("CPU of Python, ms", "cpu_ms_python", 1),
    ("CPU together, ms", "cpu_ms", 1),
    ("history events", "history_events", 1),
    ("history bytes", "history_bytes", 0),
    ("SQL statements", "sql_statements", 1),
    ("transactions that write", "sql_write_transactions", 1),
    ("WAL bytes", "wal_bytes", 0),
)


def _orders(results: Results, backend: str) -> Table:
    names = list(dict.fromkeys(turn["contestant"] for turn in results["orders"] if turn["backend"] == backend))
    turns = [usual_turns(results, backend, name) for name in names]
    rows = [[title, *(_number(median(own, figure), digits) for own in turns)] for title, figure, digits in _FIGURES]
    rows.insert(
        1, ["orders/s, turn by turn", *(" ".join(f"{turn['orders_per_second']:.1f}" for turn in own) for own in turns)]
    )
    return Table(
        f"Per order, {results['plan']['usual']} orders at once, {backend}",
        ["", *(name.replace("-", " ") for name in names)],
        rows,
    )


def _growth(part: dict[str, Any]) -> Table:
    sizes = sorted({turn["rows"] for turn in part["turns"]})
    rows = []
    for size in sizes:
        turns = [turn for turn in part["turns"] if turn["rows"] == size]
        figures = ("cpu_ms_postgres", "cpu_ms_python", "orders_per_second", "wal_bytes")
        rows.append([f"{size:,}", *(_number(median(turns, figure), 1) for figure in figures)])
    fitted = part["fit"]
    return Table(
        "Growth: cost per order by orders in the tables",
        ["orders in the tables", "CPU ms: PostgreSQL", "Python", "orders/s", "WAL bytes"],
        rows,
        f"Fit: PostgreSQL + Python = {fitted['intercept']:.1f} ms {fitted['slope']:+.2f} ms for every tenfold "
        f"(R² {fitted['r2']:.2f}).",
    )


def _drain(part: dict[str, Any]) -> Table:
    rows = []
    for turn in part["turns"]:
        fitted = turn["fit"]
        rate = [_number(fitted["slope"], 1), f"{fitted['r2']:.3f}"] if fitted else ["-", "-"]
        rows.append([str(turn["workers"]), f"{turn['orders']:,}", _number(turn["seconds"], 1), *rate])
    return Table(
        f"Drain of a backlog, {part['backend']}",
        ["worker processes", "orders", "seconds", "orders/s, fitted", "R²"],
        rows,
        "Seconds from the start of the workers' processes; the fit leaves out the first and the last tenth.",
    )


def _memory(part: dict[str, Any]) -> Table:
    beyond = part["bytes_per_order_beyond_the_cache"]
    told = f" Beyond it an order takes {beyond:,.0f} bytes." if beyond is not None else ""
    return Table(
        "Memory of a worker process with orders parked in review",
        ["parked", "resident MB"],
        [[f"{turn['parked']:,}", _number(turn["resident_bytes"] / 1e6, 1)] for turn in part["turns"]],
        f"It caches {part['cached']:,} workflows.{told} The {part['woken']} oldest were then approved, and shipped; "
        f"lost: {part['lost']}.",
    )


def _reads(part: dict[str, Any]) -> Table:
    names = dict.fromkeys(turn["contestant"] for turn in part["turns"])
    figures = ("reads_per_second", "cpu_ms_python", "cpu_ms_postgres", "read_p50_ms", "read_p99_ms", "sql_statements")
    rows = []
    for name in names:
        turns = [turn for turn in part["turns"] if turn["contestant"] == name]
        rows.append([name, *(_number(median(turns, figure), 2) for figure in figures)])
    return Table(
        "Reads of an order's status",
        ["", "reads/s", "CPU ms: Python", "PostgreSQL", "p50 ms", "p99", "SQL statements"],
        rows,
    )


def _watchers(part: dict[str, Any]) -> Table:
    figures = ("statements_per_second", "cpu_percent_python", "cpu_percent_postgres", "delay_p50_ms", "delay_p99_ms")
    return Table(
        "Watchers of timelines while nothing happens, and the delay of an event to all of them",
        ["watchers", "SQL statements/s", "% of a CPU: Python", "PostgreSQL", "delay p50 ms", "p99"],
        [[f"{turn['watchers']:,}", *(_number(turn[figure], 1) for figure in figures)] for turn in part["turns"]],
    )


_PARTS: Final[dict[str, Callable[[dict[str, Any]], Table]]] = {
    "growth": _growth,
    "drain": _drain,
    "memory": _memory,
    "reads": _reads,
    "watchers": _watchers,
}


# --- targets


@dataclass(frozen=True)
class _Target:
    what: str
    value: float | None
    limit: float
    at_least: bool

    def row(self) -> list[str]:
        sign = "≥" if self.at_least else "≤"
        if self.value is None:
            return [self.what, "not measured", f"{sign} {self.limit:g}", ""]
        met = self.value >= self.limit if self.at_least else self.value <= self.limit
        return [self.what, f"{self.value:.2f}", f"{sign} {self.limit:g}", "yes" if met else "**no**"]


def _targets(results: Results) -> Table:
    rows = []
    for backend in _backends(results):

        def ratio(figure: str, over: str, backend: str = backend) -> float | None:
            ours, theirs = (median(usual_turns(results, backend, name), figure) for name in ("trellis", over))
            return ours / theirs if ours is not None and theirs else None

        rows += [
            _Target(
                f"orders/s, trellis / textbook, {backend}", ratio("orders_per_second", "textbook"), 1.5, True
            ).row(),
            _Target(
                f"Python CPU per order, trellis / bare, {backend}", ratio("cpu_ms_python", "bare"), 1.25, False
            ).row(),
            _Target(f"orders/s, trellis / dbos, {backend}", ratio("orders_per_second", "dbos"), 0.8, True).row(),
        ]
        off = "trellis-without-telemetry"
        cost = ratio("cpu_ms_python", off), ratio("orders_per_second", off)
        if cost[0] is not None and cost[1] is not None:
            rows.append([f"telemetry: Python CPU and orders/s, {backend}", f"{cost[0]:.2f}, {cost[1]:.2f}", "", ""])
    rows += [
        _Target("status reads/s, trellis / one-row", _read_ratio(results, "trellis"), 0.85, True).row(),
        _Target("the same without telemetry", _read_ratio(results, "trellis-without-telemetry"), 0.85, True).row(),
        _Target(
            "CPU per order with the most orders in the tables / the fewest", _growth_ratio(results), 1.1, False
        ).row(),
        _Target("orders lost beyond the cache", (results.get("memory") or {}).get("lost"), 0, False).row(),
    ]
    return Table("Targets", ["ratio", "measured", "target", "met"], rows)


def _read_ratio(results: Results, name: str) -> float | None:
    turns = (results.get("reads") or {}).get("turns", [])
    ours, theirs = (
        median([turn for turn in turns if turn["contestant"] == each], "reads_per_second") for each in (name, "one-row")
    )
    return ours / theirs if ours and theirs else None


def _growth_ratio(results: Results) -> float | None:
    turns = (results.get("growth") or {}).get("turns", [])
    sizes = sorted({turn["rows"] for turn in turns})
    if len(sizes) < 2:
        return None
    few, many = (
        statistics.median(turn["cpu_ms_postgres"] + turn["cpu_ms_python"] for turn in turns if turn["rows"] == size)
        for size in (sizes[0], sizes[-1])
    )
    return float(many / few)


# --- cells


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"
