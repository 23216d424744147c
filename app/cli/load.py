"""`trellis load`: a steady stream of orders of every kind, for demonstrations and for what watches them."""

from __future__ import annotations

import asyncio
import contextlib
import random
import secrets
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Final, Self

import typer

from app.cli import output
from app.cli.client import DEFAULT_URL, TIMEOUT, AsJson, ExitCode, Url, connect, trusts_environment
from app.cli.demo import MIX, SHIP, Drive, Driver, Report, Scenario, duration, percentile, tell_of
from app.domain.steps import Step

if TYPE_CHECKING:
    import httpx  # and where it is used: `--help` need not wait for it
    from rich.progress import Progress

#: What was charged is given back, because the carrier refuses the address for ever.
REFUND: Final = Scenario("refund", Step.SHIPPING_FAILED, zip="00002")

#: How many of a hundred orders go each way.
WEIGHTS: Final[dict[Scenario, int]] = {SHIP: 50} | dict.fromkeys((*MIX, REFUND), 10)

#: Seconds between two lines where there is no terminal.
LINE_EVERY: Final = 10.0

INTERRUPTED: Final = 130


@dataclass
class Tally:
    """What became of the orders so far. Durations only, so that a night of load fits into memory."""

    started: int = 0
    accepted: int = 0
    ended: Counter[tuple[str, str]] = field(default_factory=Counter)
    seconds: dict[tuple[str, str], list[float]] = field(default_factory=dict)
    start_seconds: list[float] = field(default_factory=list)
    unexpected: list[Drive] = field(default_factory=list)
    abandoned: int = 0

    def add(self, drive: Drive) -> None:
        """Count an order that is no longer followed."""
        key = (drive.scenario.name, drive.step or "not ended")
        self.ended[key] += 1
        if drive.start_seconds is not None:
            self.accepted += 1
            self.start_seconds.append(drive.start_seconds)
        if drive.end_to_end_seconds is not None:
            self.seconds.setdefault(key, []).append(drive.end_to_end_seconds)
        if not drive.expected:
            self.unexpected.append(drive)

    @property
    def open(self) -> int:
        """Orders that are still followed."""
        return self.started - self.ended.total() - self.abandoned

    def by_step(self) -> Counter[str]:
        """Orders by the step they ended in."""
        steps: Counter[str] = Counter()
        for (_, step), orders in self.ended.items():
            steps[step] += orders
        return steps


def load(
    rate: Annotated[float, typer.Option(min=0.01, max=1000, metavar="PER SECOND", help="Orders per second.")] = 5.0,
    length: Annotated[
        float, typer.Option("--duration", min=0, metavar="SECONDS", help="How long; 0 is until Ctrl-C.")
    ] = 60.0,
    seed: Annotated[int | None, typer.Option(help="Draws the same sequence of scenarios again.")] = None,
    in_flight: Annotated[
        int, typer.Option(min=1, help="Most orders followed at a time; the rate falls when they are reached.")
    ] = 500,
    patience: Annotated[float, typer.Option(min=1, metavar="SECONDS", help="Most an order may take.")] = 120.0,
    url: Url = DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """Start orders at a steady rate, and see that each ends as it should.

    As with `demo`, they are refused where the API has no demo price.

    Half of them are approved and shipped; the others expire, are cancelled or declined, meet a flaky provider, or are
    refunded because the carrier refuses the address, a tenth each.

    Ctrl-C starts no more and waits for those on their way; a second one leaves them to themselves, which is the exit
    code's "interrupted". An order that ends otherwise than its scenario says, or not in time, has not ended well.
    """
    with connect(url) as api:
        api.get("/orders", limit=1)  # rather one line now than one for every order
    plan = Plan(rate, length, in_flight, patience, seed if seed is not None else secrets.randbelow(2**31))
    this = _Load(plan, url)
    interrupted = asyncio.run(this.to_the_end())
    if as_json:
        output.as_json(_as_json(plan, this))
    else:
        _print(plan, this)
    if this.tally.unexpected:
        raise typer.Exit(ExitCode.ENDED_OTHERWISE)
    if interrupted:
        raise typer.Exit(INTERRUPTED)


@dataclass(frozen=True)
class Plan:
    """What the command line said."""

    rate: float
    duration: float
    in_flight: int
    patience: float
    seed: int

    def scenarios(self) -> Iterator[Scenario]:
        """Drawn one after the other, the same for the same seed."""
        dice = random.Random(self.seed)  # noqa: S311 - nothing secret
        kinds, weights = list(WEIGHTS), list(WEIGHTS.values())
        while True:
            yield dice.choices(kinds, weights)[0]


class _Load:
    """One run, from the first order to the last."""

    def __init__(self, plan: Plan, url: str) -> None:
        self.tally = Tally()
        self.calls = Report([])
        self.seconds = 0.0
        self._plan = plan
        self._url = url
        self._stop = asyncio.Event()
        self._leave = asyncio.Event()
        self._orders: set[asyncio.Task[None]] = set()
        self._defect: BaseException | None = None

    async def to_the_end(self) -> bool:
        """Run; whether orders were left to themselves."""
        import httpx

        began = time.monotonic()
        with _interrupts(self._interrupted), _Progress(self._plan, self.tally, self._stop) as progress:
            telling = asyncio.create_task(progress.keep_telling())
            try:
                limits = httpx.Limits(max_connections=100)
                # A follower asks again soon; it need not be first in the queue for a connection.
                timeout = httpx.Timeout(TIMEOUT, pool=self._plan.patience)
                async with httpx.AsyncClient(
                    base_url=self._url, timeout=timeout, limits=limits, trust_env=trusts_environment(self._url)
                ) as http:
                    await self._start_orders(http)
                    await self._wait_for_orders()
            finally:
                telling.cancel()
        self.seconds = time.monotonic() - began
        return self._leave.is_set()

    async def _start_orders(self, http: httpx.AsyncClient) -> None:
        began, prefix = time.monotonic(), f"load-{secrets.token_hex(4)}"
        for number, scenario in enumerate(self._plan.scenarios()):
            due = number / self._plan.rate
            if self._plan.duration and due >= self._plan.duration:
                return
            await self._sleep(began + due - time.monotonic())
            while len(self._orders) >= self._plan.in_flight and not self._stop.is_set():
                await asyncio.wait(self._orders, timeout=1.0, return_when=asyncio.FIRST_COMPLETED)
            if self._stop.is_set():
                return
            self.tally.started += 1
            order = asyncio.create_task(self._drive(http, Drive(f"{prefix}-{number + 1:06}", scenario)))
            self._orders.add(order)
            order.add_done_callback(self._done)

    async def _drive(self, http: httpx.AsyncClient, drive: Drive) -> None:
        try:
            await Driver(http, self._url, self.calls, drive, time.monotonic() + self._plan.patience).drive()
        except asyncio.CancelledError:
            self.tally.abandoned += 1
            raise
        self.tally.add(drive)

    def _done(self, order: asyncio.Task[None]) -> None:
        self._orders.discard(order)
        if not order.cancelled() and (defect := order.exception()):
            # What can happen to an order is in its `trouble`; this is a fault of ours, and ends the run.
            self._defect = self._defect or defect
            self._stop.set()
            self._leave.set()

    async def _wait_for_orders(self) -> None:
        leave = asyncio.create_task(self._leave.wait())
        while self._orders and not leave.done():
            await asyncio.wait({leave, *self._orders}, return_when=asyncio.FIRST_COMPLETED)
        leave.cancel()
        left = list(self._orders)
        for order in left:
            order.cancel()
        await asyncio.gather(*left, return_exceptions=True)
        if self._defect:
            raise self._defect

    async def _sleep(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._stop.wait(), max(seconds, 0))

    def _interrupted(self) -> None:
        if self._stop.is_set():
            self._leave.set()
        self._stop.set()


@contextlib.contextmanager
def _interrupts(action: Callable[[], None]) -> Iterator[None]:
    loop, numbers = asyncio.get_running_loop(), (signal.SIGINT, signal.SIGTERM)
    for number in numbers:
        loop.add_signal_handler(number, action)
    try:
        yield
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)


# --- telling


class _Progress:
    """A bar on a terminal; elsewhere a line now and then."""

    def __init__(self, plan: Plan, tally: Tally, stop: asyncio.Event) -> None:
        from rich.console import Console

        self._plan, self._tally, self._stop = plan, tally, stop
        self._console = Console(stderr=True)
        self._bar: Progress | None = None
        self._began = time.monotonic()

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._bar = self._make_bar()
            self._bar.start()
        else:
            length = f"{self._plan.duration:g} s" if self._plan.duration else "until Ctrl-C"
            output.remark(f"{self._plan.rate:g} orders/s, {length}, seed {self._plan.seed}")
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    async def keep_telling(self) -> None:
        """Until it is cancelled."""
        while True:
            if self._bar:
                await asyncio.sleep(0.2)
                done = min(time.monotonic() - self._began, self._plan.duration or float("inf"))
                self._bar.update(self._bar.task_ids[0], completed=done, said=self._line())
            else:
                await asyncio.sleep(LINE_EVERY)
                output.remark(f"{time.monotonic() - self._began:6.0f} s  {self._line()}")

    def _make_bar(self) -> Progress:
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        bar = Progress(BarColumn(20), TimeElapsedColumn(), TextColumn("{task.fields[said]}"), console=self._console)
        bar.add_task("load", total=self._plan.duration or None, said="")
        return bar

    def _line(self) -> str:
        steps = ", ".join(f"{orders} {step}" for step, orders in sorted(self._tally.by_step().items()))
        waiting = "waiting for the rest, Ctrl-C leaves them; " if self._stop.is_set() else ""
        unexpected = f"; {len(self._tally.unexpected)} unexpected" if self._tally.unexpected else ""
        return f"{waiting}{self._tally.started} started, {self._tally.open} open; {steps or 'none ended'}{unexpected}"


_COLUMNS: Final = ("SCENARIO", "FINAL STEP", "ORDERS", "END TO END P50", "P95", "P99")


def _print(plan: Plan, this: _Load) -> None:
    tally = this.tally
    rows = [
        (scenario, step, str(orders), *(duration(value) for value in _spread(tally.seconds.get((scenario, step), []))))
        for (scenario, step), orders in sorted(tally.ended.items())
    ]
    whole = [value for values in tally.seconds.values() for value in values]
    output.table(_COLUMNS, [*rows, ("all", "", str(tally.ended.total()), *map(duration, _spread(whole)))])
    accepted = "/".join(duration(value) for value in _spread(tally.start_seconds))
    output.line(f"accepted (202) after p50/p95/p99 {accepted}")
    more = [f"{this.calls.calls_repeated} calls repeated"] if this.calls.calls_repeated else []
    more += [f"{tally.abandoned} left to themselves"] if tally.abandoned else []
    output.line(
        f"{tally.started} orders in {this.seconds:.1f} s, seed {plan.seed}: "
        + ", ".join([*more, f"{len(tally.unexpected)} unexpected"])
    )
    tell_of(tally.unexpected)


def _as_json(plan: Plan, this: _Load) -> dict[str, Any]:
    tally = this.tally
    return {
        "orders": tally.started,
        "accepted": tally.accepted,
        "abandoned": tally.abandoned,
        "seconds": round(this.seconds, 3),
        "seed": plan.seed,
        "steps": tally.by_step(),
        "scenarios": [
            {"scenario": scenario, "step": step, "orders": orders, "end_to_end_seconds": _named(scenario, step, tally)}
            for (scenario, step), orders in sorted(tally.ended.items())
        ],
        "start_seconds": dict(zip(_PERCENTILES, _spread(tally.start_seconds), strict=True)),
        "calls_repeated": this.calls.calls_repeated,
        "unexpected": [drive.as_dict() for drive in tally.unexpected],
    }


_PERCENTILES: Final = ("p50", "p95", "p99")


def _named(scenario: str, step: str, tally: Tally) -> dict[str, float | None]:
    return dict(zip(_PERCENTILES, _spread(tally.seconds.get((scenario, step), [])), strict=True))


def _spread(seconds: list[float]) -> list[float | None]:
    values = [percentile(seconds, percent) for percent in (50, 95, 99)]
    return [None if value is None else round(value, 4) for value in values]
