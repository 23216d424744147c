"""`trellis demo`: drive orders through and see that each ends as it should."""

from __future__ import annotations

import asyncio
import math
import secrets
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from app.cli import output
from app.cli.client import (
    DEFAULT_URL,
    TIMEOUT,
    AsJson,
    Body,
    CallFailed,
    ExitCode,
    Url,
    answer,
    connect,
    order_path,
    trusts_environment,
    unanswered,
)
from app.domain.steps import Step

if TYPE_CHECKING:
    import httpx  # and where it is used: `--help` need not wait for it

#: Seconds between two tries of a call that got no answer. The API promises that a repeat does nothing twice.
AGAIN: Final = 0.5

#: Most unexpected outcomes that are told one by one.
MOST_TOLD: Final = 20


@dataclass(frozen=True)
class Scenario:
    """A way through an order's life."""

    name: str
    ends_as: Step
    #: What the payment's id begins with; the sandbox provider goes by it.
    payment: str = "pay"
    signal: str | None = "approve"
    #: Long enough for an approval to be in time on any machine, and through an outage.
    review_seconds: int = 600
    #: The sandbox carrier goes by it.
    zip: str = "62701"


SHIP: Final = Scenario("approve", Step.SHIPPED)
MIX: Final = (
    Scenario("cancel", Step.CANCELLED, signal="cancel"),
    Scenario("decline", Step.PAYMENT_FAILED, payment="pay-decline"),
    Scenario("flaky", Step.SHIPPED, payment="pay-flaky"),
    Scenario("expire", Step.EXPIRED, signal=None, review_seconds=1),
)
#: The scenarios of ten orders in a row.
TEN_OF_A_MIX: Final = (SHIP, *MIX, SHIP, SHIP, SHIP, SHIP, SHIP)


@dataclass
class Drive:
    """One order on its way through its scenario."""

    order_id: str
    scenario: Scenario
    start_seconds: float | None = None
    end_to_end_seconds: float | None = None
    step: Step | None = None
    trouble: str = ""

    @property
    def expected(self) -> bool:
        """It ended as its scenario says."""
        return self.step is self.scenario.ends_as

    def as_dict(self) -> dict[str, str | None]:
        """For JSON: what was expected, and what came."""
        return {
            "order_id": self.order_id,
            "scenario": self.scenario.name,
            "expected": self.scenario.ends_as,
            "step": self.step,
            "trouble": self.trouble,
        }


@dataclass
class Report:
    """What became of all of them."""

    drives: list[Drive]
    seconds: float = 0.0
    calls_repeated: int = 0

    @property
    def unexpected(self) -> list[Drive]:
        """Orders that ended otherwise than their scenario says, or did not end in time."""
        return [drive for drive in self.drives if not drive.expected]

    @property
    def per_second(self) -> float:
        """Orders that ended, per second of the whole run."""
        return sum(drive.step is not None for drive in self.drives) / self.seconds


def _reach(url: str, wait: float) -> None:
    """Rather one line now than one for every order; after `wait` seconds, within which the API may yet appear."""
    end = time.monotonic() + wait
    while True:
        last = time.monotonic() >= end
        try:
            with connect(url, quiet=not last) as api:
                api.get("/orders", limit=1)
        except typer.Exit:
            if last:
                raise
            time.sleep(1)
        else:
            return


def demo(
    orders: Annotated[int, typer.Argument(metavar="N", min=1, help="How many orders.")] = 20,
    concurrency: Annotated[int, typer.Option(min=1, help="How many at a time.")] = 8,
    mix: Annotated[bool, typer.Option("--mix", help="Cancel, decline, disturb and neglect four in ten.")] = False,
    patience: Annotated[float, typer.Option(min=1, metavar="SECONDS", help="Most an order may take.")] = 120.0,
    wait: Annotated[float, typer.Option(min=0, metavar="SECONDS", help="Wait so long for the API to answer.")] = 0.0,
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """Drive N orders through, and see that each ends as it should.

    They name no items: where the API has no demo price (TRELLIS_DEMO_PRICE), as with a real payment provider, they are
    refused, and nobody is charged.

    A call that gets no answer is repeated as it is: that charges nobody twice, also while something restarts.
    An order that ends otherwise than its scenario says has not ended well.
    """
    _reach(url, wait)
    report = Report(list(_plan(orders, mix)))
    asyncio.run(_drive_all(report, url, concurrency, patience))
    if as_json:
        output.as_json(_as_json(report))
    else:
        _print(report)
    if report.unexpected:
        raise typer.Exit(ExitCode.ENDED_OTHERWISE)


def _plan(orders: int, mix: bool) -> Iterator[Drive]:
    prefix = f"demo-{secrets.token_hex(3)}"
    for number in range(orders):
        yield Drive(f"{prefix}-{number + 1:04}", TEN_OF_A_MIX[number % 10] if mix else SHIP)


# --- driving


async def _drive_all(report: Report, url: str, concurrency: int, patience: float) -> None:
    import httpx
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (*Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn())
    waiting, began = iter(report.drives), time.monotonic()
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("orders", total=len(report.drives))
        # In this order, so that Ctrl-C stops the drivers before their connections close.
        async with (
            httpx.AsyncClient(
                base_url=url, timeout=TIMEOUT, limits=httpx.Limits(), trust_env=trusts_environment(url)
            ) as http,
            asyncio.TaskGroup() as group,
        ):

            async def drive_some() -> None:
                for drive in waiting:
                    await Driver(http, url, report, drive, time.monotonic() + patience).drive()
                    progress.advance(task)

            for _ in range(min(concurrency, len(report.drives))):
                group.create_task(drive_some())
    report.seconds = time.monotonic() - began


@dataclass
class Driver:
    """Takes one order through its scenario."""

    http: httpx.AsyncClient
    url: str
    report: Report
    order: Drive
    deadline: float
    began: float = field(default_factory=time.monotonic)

    async def drive(self) -> None:
        try:
            await self._start()
            await self._signal()
            await self._follow()
        except CallFailed as failed:
            self.order.trouble = str(failed)

    async def _start(self) -> None:
        scenario = self.order.scenario
        request = {
            "payment_id": f"{scenario.payment}-{self.order.order_id}",
            "review_timeout_seconds": scenario.review_seconds,
            "address": {"line1": "1 Main St", "city": "Springfield", "state": "IL", "zip": scenario.zip},
        }
        await self._call("POST", "/start", request)
        self.order.start_seconds = time.monotonic() - self.began

    async def _signal(self) -> None:
        if self.order.scenario.signal is None:
            return
        try:
            await self._call("POST", f"/signals/{self.order.scenario.signal}")
        except CallFailed as failed:
            # A repeat that finds the order closed by its first try; its last step tells.
            if failed.code is not ExitCode.REFUSED:
                raise

    async def _follow(self) -> None:
        while time.monotonic() < self.deadline:
            status = await self._call("GET", "/status")
            elapsed = time.monotonic() - self.began
            if Step(status["step"]).final:
                self.order.step, self.order.end_to_end_seconds = Step(status["step"]), elapsed
                return
            # Often enough to be at most a tenth wrong about the time it took, and no more.
            await asyncio.sleep(min(max(elapsed / 10, 0.05), 1.0))
        self.order.trouble = f"still {status['step']}" + (f": {status['last_error']}" if status["last_error"] else "")

    async def _call(self, method: str, rest: str, body: Body | None = None) -> Any:
        while True:
            try:
                with unanswered(self.url):
                    return answer(await self.http.request(method, order_path(self.order.order_id, rest), json=body))
            except CallFailed as failed:
                if failed.code is not ExitCode.UNAVAILABLE or time.monotonic() > self.deadline:
                    raise
            self.report.calls_repeated += 1
            await asyncio.sleep(AGAIN)


# --- telling


def percentile(values: Sequence[float], percent: float) -> float | None:
    """The smallest of the values that is not below `percent` of them (nearest rank); None if there are none."""
    return sorted(values)[max(math.ceil(len(values) * percent / 100), 1) - 1] if values else None


def _spread(seconds: Iterable[float | None]) -> dict[str, float | None]:
    known = [round(value, 4) for value in seconds if value is not None]
    return {f"p{percent}": percentile(known, percent) for percent in (50, 99)}


def _as_json(report: Report) -> dict[str, Any]:
    return {
        "orders": len(report.drives),
        "seconds": round(report.seconds, 3),
        "orders_per_second": round(report.per_second, 3),
        "steps": Counter(drive.step or "not_ended" for drive in report.drives),
        "start_seconds": _spread(drive.start_seconds for drive in report.drives),
        "end_to_end_seconds": _spread(drive.end_to_end_seconds for drive in report.drives),
        "calls_repeated": report.calls_repeated,
        "unexpected": [drive.as_dict() for drive in report.unexpected],
    }


def _print(report: Report) -> None:
    output.table(_COLUMNS, list(_rows(report.drives)))
    repeated = f", {report.calls_repeated} calls repeated" if report.calls_repeated else ""
    output.line(
        f"{len(report.drives)} orders in {report.seconds:.1f} s, {report.per_second:.1f} orders/s{repeated}, "
        f"{len(report.unexpected)} unexpected"
    )
    tell_of(report.unexpected)


def tell_of(unexpected: Sequence[Drive]) -> None:
    """Name the first of the orders that ended otherwise."""
    for drive in unexpected[:MOST_TOLD]:
        found = drive.trouble or drive.step
        output.line(f"{drive.order_id} ({drive.scenario.name}): {found}, not {drive.scenario.ends_as}")
    if len(unexpected) > MOST_TOLD:
        output.line(f"and {len(unexpected) - MOST_TOLD} more; --json names them all")


_COLUMNS: Final = (
    "SCENARIO", "FINAL STEP", "ORDERS", "START P50", "START P99", "END TO END P50", "END TO END P99",
)  # fmt: skip


def _rows(drives: Sequence[Drive]) -> Iterator[output.Row]:
    groups: dict[tuple[str, str], list[Drive]] = {}
    for drive in drives:
        groups.setdefault((drive.scenario.name, drive.step or "not ended"), []).append(drive)
    for (scenario, step), group in groups.items():
        yield _row(scenario, step, group)
    yield _row("all", "", drives)


def _row(scenario: str, step: str, drives: Sequence[Drive]) -> output.Row:
    start = _spread(drive.start_seconds for drive in drives)
    whole = _spread(drive.end_to_end_seconds for drive in drives)
    return (scenario, step, str(len(drives)), *map(duration, (*start.values(), *whole.values())))


def duration(seconds: float | None) -> str:
    """For people."""
    if seconds is None:
        return "-"
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.2f} s"
