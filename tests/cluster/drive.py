"""Many orders at once, through an API whose pods come and go: `python -m tests.cluster.drive --url URL start o 100`.

Orders are `{prefix}-{number}`. A call that gets no answer is repeated as it is; the API promises that this does nothing
twice. Anything else that goes wrong ends the program with a line that says what.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, Final

import httpx

from app.cli.client import CallFailed, ExitCode, answer, order_path, unanswered
from app.domain.steps import Step

#: Calls at a time: enough to fill the workers, few enough for one `kubectl port-forward`.
CONCURRENCY: Final = 16
#: Seconds a call is repeated.
PATIENCE: Final = 240.0

Each = Callable[[int], Awaitable[None]]


class Orders:
    """The orders `first` to `last` of a prefix."""

    def __init__(self, http: httpx.AsyncClient, options: argparse.Namespace) -> None:
        self._http = http
        self._options = options
        self._repeated = 0

    async def start(self) -> None:
        """Start them, with a review long enough to park in."""
        payment, window = self._options.payment, self._options.review
        began = time.monotonic()

        async def one(number: int) -> None:
            order_id = self._order_id(number)
            body: dict[str, Any] = {"payment_id": f"{payment}-{order_id}", "review_timeout_seconds": window}
            if self._options.zip:
                body["address"] = {"line1": "1 Main St", "city": "Springfield", "state": "IL", "zip": self._options.zip}
            await self._call("POST", order_path(order_id, "/start"), body)

        await self._all(one)
        self._say("started", began)

    async def approve(self) -> None:
        """Approve them."""
        await self._signal("approve", "approved")

    async def cancel(self) -> None:
        """Cancel them."""
        await self._signal("cancel", "told to be cancelled")

    async def wait(self) -> None:
        """Wait until every one of them is at the step."""
        wanted, began = Step(self._options.step), time.monotonic()
        waiting = set(self._numbers())
        steps: dict[int, str] = {}

        async def one(number: int) -> None:
            status = await self._call("GET", order_path(self._order_id(number), "/status"))
            steps[number] = status["step"]

        while True:
            await self._all(one, sorted(waiting))
            waiting = {number for number in waiting if steps[number] != wanted}
            astray = [number for number in waiting if Step(steps[number]).final]
            if astray or (waiting and time.monotonic() - began > self._options.seconds):
                example = self._order_id(min(astray or waiting))
                sys.exit(f"not all at {wanted}: {dict(Counter(steps.values()))}, such as {example}")
            if not waiting:
                break
            await asyncio.sleep(1)
        self._say(wanted, began)

    # --- calls

    async def _signal(self, signal: str, done: str) -> None:
        began = time.monotonic()

        async def one(number: int) -> None:
            try:
                await self._call("POST", order_path(self._order_id(number), f"/signals/{signal}"))
            except CallFailed as failed:
                # The repeat of a signal whose answer was lost can find the order closed already.
                if failed.code is not ExitCode.REFUSED or not self._repeated:
                    raise

        await self._all(one)
        self._say(done, began)

    async def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                with unanswered(self._options.url):
                    return answer(await self._http.request(method, path, json=body))
            except CallFailed as failed:
                if failed.code is not ExitCode.UNAVAILABLE or time.monotonic() > deadline:
                    raise
            self._repeated += 1
            await asyncio.sleep(0.5)

    async def _all(self, each: Each, numbers: Iterable[int] | None = None) -> None:
        left = iter(self._numbers() if numbers is None else numbers)

        async def some() -> None:
            for number in left:
                await each(number)

        async with asyncio.TaskGroup() as group:
            for _ in range(CONCURRENCY):
                group.create_task(some())

    def _numbers(self) -> range:
        return range(self._options.first, self._options.last + 1)

    def _order_id(self, number: int) -> str:
        return f"{self._options.prefix}-{number}"

    def _say(self, what: str, began: float) -> None:
        repeated = f", {self._repeated} calls repeated" if self._repeated else ""
        took = time.monotonic() - began
        print(f"cluster: {len(self._numbers())} orders {what} in {took:.1f} s{repeated}", flush=True)  # noqa: T201


async def main() -> None:
    """Do one thing with all of them."""
    options = _options()
    limits = httpx.Limits(max_connections=CONCURRENCY)
    wrong = ""
    async with httpx.AsyncClient(base_url=options.url, timeout=15, limits=limits, trust_env=False) as http:
        try:
            await getattr(Orders(http, options), options.command)()
        except* CallFailed as failed:
            wrong = str(failed.exceptions[0])
    sys.exit(wrong or None)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--url", required=True)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("start", "approve", "cancel", "wait"):
        command = commands.add_parser(name)
        command.add_argument("prefix")
        command.add_argument("last", type=int)
        command.add_argument("--first", type=int, default=1)
        if name == "start":
            command.add_argument("--payment", default="pay", help="what the payment's id begins with")
            command.add_argument("--zip", default="", help="where the parcel goes; without it, it is picked up")
            command.add_argument("--review", type=int, default=1800, help="review window in seconds")
        if name == "wait":
            command.add_argument("--step", default="shipped")
            command.add_argument("--seconds", type=float, default=300)
    return parser.parse_args()


if __name__ == "__main__":
    asyncio.run(main())
