"""What breaks, and when: a list drawn from a seed before the run begins, so that the seed replays it."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Final

import httpx

if TYPE_CHECKING:
    from tests.faults.orders import Customers
    from tests.faults.stack import Stack

#: Links of the stack, by the names of their proxies.
LINKS: Final = ("postgres-api", "postgres-workers", "temporal-api", "temporal-workers", "partners")
WORKERS: Final = ("orders-1", "orders-2", "shipping-1", "shipping-2")

#: Seconds that Temporal stays away; a run shorter than ten minutes cannot spare thirty twice.
TEMPORAL_OUTAGE: Final = 30.0


@dataclass(frozen=True)
class Fault:
    """One thing that breaks."""

    at: float
    kind: str
    target: str
    seconds: float

    def __str__(self) -> str:
        return f"{self.kind} {self.target} {self.seconds:.1f} s".replace("  ", " ")


def draw(dice: Random, seconds: float, pause: float) -> list[Fault]:
    """The faults of a storm of so many seconds, one about every `pause`; every kind comes before any comes twice."""
    faults: list[Fault] = []
    deck: list[str] = []
    at = 5.0
    while at < seconds:
        if not deck:
            deck = list(FAULTS)
            dice.shuffle(deck)
        # The last ones must be over before the storm is.
        kind = next((kind for kind in deck if at + FAULTS[kind][1][1] < seconds), None)
        if kind is None:
            break
        deck.remove(kind)
        targets, (least, most), _ = FAULTS[kind]
        fault = Fault(at, kind, dice.choice(targets), dice.uniform(least, most))
        faults.append(fault)
        at += dice.uniform(0.5, 1.5) * pause
    return faults


async def play(faults: list[Fault], stack: Stack, customers: Customers, say: Callable[[str], None]) -> None:
    """Break one thing after the other, at its time. One that is still broken does not hold up the next."""
    began = asyncio.get_running_loop().time()
    running: list[asyncio.Task[None]] = []
    busy: dict[str, asyncio.Lock] = {}
    for fault in faults:
        await asyncio.sleep(max(0, began + fault.at - asyncio.get_running_loop().time()))
        say(str(fault))
        running.append(asyncio.create_task(_one(fault, stack, customers, busy)))
    await asyncio.gather(*running)


async def _one(fault: Fault, stack: Stack, customers: Customers, busy: dict[str, asyncio.Lock]) -> None:
    # Two faults of one server or worker at a time would only stop it twice.
    owner = fault.target if fault.target in {"postgres", "temporal"} else fault.kind
    async with busy.setdefault(owner, asyncio.Lock()):
        await FAULTS[fault.kind][2](fault, stack, customers)


# --- the faults


async def _kill(fault: Fault, stack: Stack, _: Customers) -> None:
    stack.kill(fault.target)


async def _terminate(fault: Fault, stack: Stack, _: Customers) -> None:
    if not stack.members[fault.target].down:
        await stack.terminate(fault.target)


async def _postgres_immediate(fault: Fault, stack: Stack, _: Customers) -> None:
    await stack.postgres.stop("immediate")
    await asyncio.sleep(fault.seconds)
    await stack.postgres.start()


async def _postgres_kill(fault: Fault, stack: Stack, _: Customers) -> None:
    await stack.postgres.stop("kill")
    await stack.postgres.start()


async def _temporal_kill(fault: Fault, stack: Stack, _: Customers) -> None:
    await stack.temporal.kill()
    await stack.temporal.start()


async def _temporal_outage(fault: Fault, stack: Stack, _: Customers) -> None:
    await stack.temporal.stop()
    await asyncio.sleep(fault.seconds)
    await stack.temporal.start()


async def _partner_outage(fault: Fault, stack: Stack, _: Customers) -> None:
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{stack.sandbox_port}", trust_env=False) as client:
        try:
            await client.post(f"/{fault.target}/sandbox/outage", json={"seconds": fault.seconds})
        except httpx.HTTPError:
            pass  # down already, for another reason


async def _slow(fault: Fault, stack: Stack, _: Customers) -> None:
    proxy = stack.proxies[fault.target]
    proxy.delay = 0.3
    await asyncio.sleep(fault.seconds)
    proxy.delay = 0.0


async def _cut(fault: Fault, stack: Stack, _: Customers) -> None:
    stack.proxies[fault.target].cut()


async def _half_open(fault: Fault, stack: Stack, _: Customers) -> None:
    stack.proxies[fault.target].freeze()


async def _lose_commits(fault: Fault, stack: Stack, _: Customers) -> None:
    stack.proxies[fault.target].commits_to_lose += 5


async def _rolling_change(fault: Fault, stack: Stack, customers: Customers) -> None:
    """Change every worker process while orders are parked in review; then approve them."""
    for _ in range(3):
        customers.begin("park")
    await asyncio.sleep(2)
    for name in WORKERS:
        if not stack.members[name].down:
            await stack.terminate(name)
    for order_id in customers.parked:
        promise = customers.promises[order_id]
        if not promise.approved and promise.accepted:
            customers.aside(_approve_parked(customers, order_id))


async def _approve_parked(customers: Customers, order_id: str) -> None:
    try:
        await customers.review(customers.promises[order_id], "approve")
    except TimeoutError:
        customers.answers["gave up"] += 1


async def _crowd(fault: Fault, stack: Stack, customers: Customers) -> None:
    customers.begin("crowd")


async def _pause(fault: Fault, stack: Stack, _: Customers) -> None:
    """Stop a worker's clock (SIGSTOP), so that its attempts come back after their successors."""
    member = stack.members[fault.target]
    process = member.process
    if member.down or process is None or process._process is None or not process.running:
        return
    member.down = True
    process._process.send_signal(signal.SIGSTOP)
    await asyncio.sleep(fault.seconds)
    process._process.send_signal(signal.SIGCONT)
    member.down = False


_Play = Callable[["Fault", "Stack", "Customers"], Awaitable[None]]

#: Every kind: whom it may hit, for how long, and what happens.
FAULTS: Final[dict[str, tuple[tuple[str, ...], tuple[float, float], _Play]]] = {
    "kill -9": (("api", "api-reviewing", "sandbox"), (0, 0), _kill),
    "kill -9 orders": (("orders-1", "orders-2"), (0, 0), _kill),
    "kill -9 shipping": (("shipping-1", "shipping-2"), (0, 0), _kill),
    "kill -9 of all of": (("postgres",), (0, 0), _postgres_kill),
    "immediate stop of": (("postgres",), (1, 4), _postgres_immediate),
    "kill -9 and restart": (("temporal",), (0, 0), _temporal_kill),
    "outage of": (("temporal",), (TEMPORAL_OUTAGE, TEMPORAL_OUTAGE), _temporal_outage),
    "partner down": (("payments", "carrier"), (3, 10), _partner_outage),
    "slow link": (LINKS, (3, 8), _slow),
    "slow partners": (("partners",), (3, 8), _slow),
    "cut link": (LINKS, (0, 0), _cut),
    "cut partners": (("partners",), (0, 0), _cut),
    "half-open link": (LINKS, (0, 0), _half_open),
    "half-open partners": (("partners",), (0, 0), _half_open),
    "lost commits": (("postgres-workers",), (0, 0), _lose_commits),
    "SIGTERM": (WORKERS, (0, 0), _terminate),
    "rolling change": (("workers",), (0, 0), _rolling_change),
    "50 starts at once": (("api",), (0, 0), _crowd),
    "pause": (WORKERS, (10, 50), _pause),
}
