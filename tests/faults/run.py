"""One fault run, from the first process to the report."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from temporalio.client import Client
from temporalio.contrib.pydantic import pydantic_data_converter
from temporalio.service import RPCError

from app.db.pool import UNAVAILABLE
from app.failpoints import NAMES, Action
from tests.faults import acts, schedule, verdict
from tests.faults.orders import LEADS_TO, STORIES, Customers
from tests.faults.stack import Stack, eventually

#: After the storm, stories go on without faults until the missing failpoints were hit, at most so many seconds.
COVERAGE_EXTRA = 240.0

#: Seconds between two kills of everything that leave no time to recover: the second one hits the recovery.
RECOVERY = (1.0, 6.0)


@dataclass(frozen=True)
class Plan:
    """What the command line asked for."""

    seed: int
    minutes: float
    rate: float
    pause: float
    kills: int
    orders: int
    out: Path
    keep: bool
    acts: tuple[str, ...] = tuple(acts.ACTS)

    @property
    def command(self) -> str:
        """Replays this run."""
        if self.kills:
            return f"python -m tests.faults --kill-everything {self.kills} --orders {self.orders} --seed {self.seed}"
        given = []
        if (self.rate, self.pause, self.orders) != (2.5, 8.0, 80):
            given += [f"--rate {self.rate:g} --pause {self.pause:g} --orders {self.orders}"]
        if set(self.acts) != set(acts.ACTS):
            given += [f"--acts {','.join(self.acts) or 'none'}"]
        arguments = f' ARGS="{" ".join(given)}"' if given else ""
        return f"make faults MINUTES={self.minutes:g} SEED={self.seed}{arguments}"


@dataclass
class Outcome:
    """What a run found; written as report.json."""

    seed: int
    command: str
    orders: int = 0
    accepted: int = 0
    ends: dict[str, int] = field(default_factory=dict)
    stories: dict[str, int] = field(default_factory=dict)
    answers: dict[str, int] = field(default_factory=dict)
    faults: dict[str, int] = field(default_factory=dict)
    acts: dict[str, int] = field(default_factory=dict)
    failpoints: dict[str, dict[str, int]] = field(default_factory=dict)
    failpoints_missing: list[str] = field(default_factory=list)
    deaths: int = 0
    commits_lost: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    audit: dict[str, Any] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)


class Run:
    """One run. Everything random is drawn from the seed."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._began = time.monotonic()
        self._counted_at, self._counted = 0.0, 0
        self._outcome = Outcome(seed=plan.seed, command=plan.command)
        # Not below the repository: PostgreSQL runs as another user when we are root.
        self._data = Path(tempfile.mkdtemp(prefix=f"trellis-faults-{plan.seed}-"))

    async def to_the_end(self) -> int:
        """The exit code."""
        self._say(f"seed {self._plan.seed}; replay with: {self._plan.command}")
        stack = Stack(self._data, Random(f"{self._plan.seed} failpoints"), self._say, arm=not self._plan.kills)
        async with stack.running():
            try:
                await (self._kill_everything(stack) if self._plan.kills else self._storm(stack))
            except Exception as error:  # noqa: BLE001 - whatever it is, the evidence is kept
                self._outcome.wrong.append(f"the run itself failed: {type(error).__name__}: {error}")
            self._outcome.wrong += stack.surprises
            with contextlib.suppress(Exception):
                await self._keep_evidence(stack)
        return self._report()

    # --- the two kinds of run

    async def _storm(self, stack: Stack) -> None:
        seconds = self._plan.minutes * 60
        faults = schedule.draw(Random(f"{self._plan.seed} faults"), seconds, self._plan.pause)
        async with await self._customers(stack, "o") as customers:
            arrivals = asyncio.create_task(self._arrivals(stack, customers))
            weather = asyncio.create_task(schedule.play(faults, stack, customers, self._say))
            operators = asyncio.create_task(self._operators(stack, customers, seconds))
            passes = asyncio.create_task(acts.keep_reconciling(stack, self._outcome.wrong))
            await asyncio.sleep(seconds)
            await weather
            await operators
            arrivals.cancel()
            passes.cancel()
            await asyncio.gather(passes, return_exceptions=True)
            self._say("no more faults")
            await self._fill_the_matrix(stack, customers)
            self._took("storm")
            await self._heal(stack, customers)
        self._outcome.faults = _counted(fault.kind for fault in faults)
        self._outcome.commits_lost = sum(proxy.commits_lost for proxy in stack.proxies.values())
        self._tell_coverage(stack)
        await self._judge(stack, customers)

    async def _kill_everything(self, stack: Stack) -> None:
        dice = Random(f"{self._plan.seed} kills")
        for number in range(1, self._plan.kills + 1):
            async with await self._customers(stack, f"k{number}", dice.random()) as customers:
                await self._fill_up(stack, customers)
                await asyncio.sleep(dice.uniform(0, 8))
                await self._fill_up(stack, customers)
                await self._kill_once(stack, customers, number)
                if dice.random() < 0.5:
                    await asyncio.sleep(dice.uniform(*RECOVERY))
                    await self._kill_once(stack, customers, number)
                await customers.finished(200)
                await self._approve_what_is_parked(customers)
            await self._judge(stack, customers)
            self._outcome.faults["kill -9 of everything"] = number
            if self._outcome.wrong:
                break

    async def _kill_once(self, stack: Stack, customers: Customers, number: int) -> None:
        waiting = await verdict.accepted_and_open(stack, customers.promises)
        stack.kill_everything()
        self._say(f"kill -9 of everything, {number} of {self._plan.kills}, {waiting} accepted orders open")
        await stack.start_everything()

    async def _fill_up(self, stack: Stack, customers: Customers) -> None:
        """Start orders until as many are accepted and open as were asked for."""

        async def enough() -> bool:
            waiting = await verdict.accepted_and_open(stack, customers.promises)
            asked = sum(not promise.accepted for promise in customers.promises.values())
            for _ in range(self._plan.orders - waiting - asked):
                customers.begin()
            return waiting >= self._plan.orders

        await eventually(enough, 120, "the orders are not accepted")

    # --- parts

    async def _customers(self, stack: Stack, prefix: str, seed: float = 0.0) -> Customers:
        temporal = await Client.connect(stack.temporal.address, data_converter=pydantic_data_converter)
        dice = Random(f"{self._plan.seed} stories {seed}")
        return Customers(stack.api_url, stack.reviewing_url, temporal, dice, prefix)

    async def _arrivals(self, stack: Stack, customers: Customers) -> None:
        """Orders at the rate asked for, as long as no more are open than asked for: a queue that only grows would
        test patience, and nothing else."""
        for story in STORIES:
            customers.begin(story)
        while True:
            if await self._waiting(stack, customers) < self._plan.orders:
                customers.begin()
            await asyncio.sleep(1 / self._plan.rate)

    async def _waiting(self, stack: Stack, customers: Customers) -> int:
        """How many orders are not at their end; when the database is down, as many as when it was asked last."""
        if time.monotonic() - self._counted_at > 1:
            self._counted_at = time.monotonic()
            with contextlib.suppress(*UNAVAILABLE):
                self._counted = await verdict.waiting(stack, customers.promises)
        return self._counted

    async def _operators(self, stack: Stack, customers: Customers, seconds: float) -> None:
        drawn = acts.draw(Random(f"{self._plan.seed} acts"), seconds, list(self._plan.acts))
        self._outcome.acts = dict(await acts.play(drawn, stack, customers, self._say))

    async def _fill_the_matrix(self, stack: Stack, customers: Customers) -> None:
        deadline = time.monotonic() + COVERAGE_EXTRA
        while (missing := stack.plan.missing()) and time.monotonic() < deadline:
            self._say(f"{len(missing)} of {len(NAMES) * len(Action)} failpoint actions not hit yet")
            stack.renew_stale()
            if await self._waiting(stack, customers) < self._plan.orders:
                for activity in sorted({name.split(".")[0] for name, _ in missing}):
                    for story in LEADS_TO[activity] * 3:
                        customers.begin(story)
            await asyncio.sleep(4)

    async def _heal(self, stack: Stack, customers: Customers) -> None:
        for proxy in stack.proxies.values():
            proxy.heal()
        await stack.disarm()
        await acts.stop_lying(stack)
        await customers.finished(120)
        await self._approve_what_is_parked(customers)

    async def _approve_what_is_parked(self, customers: Customers) -> None:
        waiting = [order_id for order_id in customers.parked if customers.promises[order_id].accepted]
        await asyncio.gather(
            *(customers.review(customers.promises[order_id], "approve") for order_id in waiting),
            return_exceptions=True,
        )

    async def _judge(self, stack: Stack, customers: Customers) -> None:
        outcome = self._outcome
        outcome.wrong += await verdict.drained(stack, self._say)
        self._took("until everything was closed")
        outcome.audit = await verdict.audited(stack)
        outcome.wrong += [f"audit: {violation}" for violation in outcome.audit["violations"]]
        outcome.wrong += [f"audit incomplete: {reason}" for reason in outcome.audit["incomplete"]]
        outcome.wrong += await verdict.broken_promises(stack, customers.promises) + customers.wrong
        outcome.orders += len(customers.promises)
        outcome.accepted += sum(promise.accepted for promise in customers.promises.values())
        outcome.ends = dict(await verdict.ends(stack))
        outcome.stories = _added(outcome.stories, _counted(each.story for each in customers.promises.values()))
        outcome.answers = _added(outcome.answers, dict(customers.answers))
        self._took("until the verdict")
        self._say(f"{outcome.accepted} orders accepted, {dict(outcome.ends)}, {len(outcome.wrong)} violations")

    def _tell_coverage(self, stack: Stack) -> None:
        hits = stack.plan.hits()
        self._outcome.failpoints = {name: {action: hits[name, action] for action in Action} for name in NAMES}
        self._outcome.failpoints_missing = [f"{name} {action}" for name, action in stack.plan.missing()]
        self._outcome.wrong += [f"failpoint never hit: {missing}" for missing in self._outcome.failpoints_missing]
        self._outcome.deaths = stack.deaths

    # --- the report

    async def _keep_evidence(self, stack: Stack) -> None:
        """Books and histories of the orders that went wrong."""
        if not self._outcome.wrong:
            return
        suspects = _order_ids(self._outcome)
        books = await verdict.books_of(stack, suspects)
        (self._data / "books.json").write_text(json.dumps(books, indent=1))
        client = await Client.connect(stack.temporal.address)
        histories = self._data / "histories"
        histories.mkdir(exist_ok=True)
        for order_id in suspects[:50]:
            for kind in ("order", "shipping"):
                with contextlib.suppress(RPCError):
                    history = await client.get_workflow_handle(f"{kind}/{order_id}").fetch_history()
                    (histories / f"{kind}-{order_id}.json").write_text(history.to_json())

    def _report(self) -> int:
        outcome, out = self._outcome, self._plan.out.resolve()
        out.mkdir(parents=True, exist_ok=True)
        name = f"{'kills' if self._plan.kills else 'storm'}-{self._plan.seed}"
        (out / f"{name}.json").write_text(json.dumps(asdict(outcome), indent=1))
        self._print_counts()
        if outcome.wrong or self._plan.keep:
            kept = out / f"{name}-{time.strftime('%Y%m%dT%H%M%S')}"
            shutil.move(self._data, kept)
            self._say(f"logs, histories and books: {kept}")
        else:
            shutil.rmtree(self._data, ignore_errors=True)
        for wrong in outcome.wrong[:40]:
            self._say(f"WRONG: {wrong}")
        if outcome.wrong:
            self._say(f"{len(outcome.wrong)} violations; replay with: {outcome.command}")
        else:
            self._say(f"no violation in {outcome.accepted} accepted orders; report: {out / f'{name}.json'}")
        return 1 if outcome.wrong else 0

    def _print_counts(self) -> None:
        if self._outcome.failpoints:
            print(f"{'failpoint':32}" + "".join(f"{action:>9}" for action in Action))  # noqa: T201 - the report
            for name, counts in self._outcome.failpoints.items():
                print(f"{name:32}" + "".join(f"{counts[action]:9}" for action in Action))  # noqa: T201
        for what in ("faults", "acts", "stories", "ends", "answers"):
            print(f"{what}: {getattr(self._outcome, what)}")  # noqa: T201

    def _took(self, what: str) -> None:
        self._outcome.seconds[what] = round(time.monotonic() - self._began, 1)

    def _say(self, line: str) -> None:
        print(f"[{time.monotonic() - self._began:6.1f}] {line}", flush=True)  # noqa: T201 - the run's own voice


def _counted(names: Any) -> dict[str, int]:
    counts: dict[str, int] = {}
    for name in names:
        counts[name] = counts.get(name, 0) + 1
    return counts


def _added(one: dict[str, int], other: dict[str, int]) -> dict[str, int]:
    return {name: one.get(name, 0) + other.get(name, 0) for name in {**one, **other}}


def _order_ids(outcome: Outcome) -> list[str]:
    audited = [violation["order_id"] for violation in outcome.audit.get("violations", [])]
    named = [line.split(" ")[0] for line in outcome.wrong if line.startswith(("o-", "k"))]
    stuck = [line.split("order ")[1].split(" ")[0] for line in outcome.wrong if line.startswith("stuck")]
    return sorted({*audited, *named, *stuck})
