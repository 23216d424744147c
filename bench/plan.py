"""How much is measured: all of it, or enough to see in a few minutes how things are."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Plan:
    """Sizes of every part."""

    quick: bool
    #: Turns of every contestant.
    rounds: int
    #: Orders in a turn, at each concurrency, and before it, uncounted.
    orders: int
    warm_up: int
    #: Orders on their way at once. The table shows the last but one, the plot all.
    at_once: tuple[int, ...]
    #: Orders parked in review, and what the worker may cache.
    parked: tuple[int, ...]
    cached: int
    #: Parked orders that are approved at the end, oldest first.
    woken: int
    #: Orders in the tables while new ones are carried.
    rows: tuple[int, ...]
    #: Orders that wait for the workers, and how many worker processes come.
    backlog: int
    workers: tuple[int, ...]
    #: Seconds of reading, and connections that read.
    read_seconds: float
    readers: int
    watchers: tuple[int, ...]

    @property
    def usual(self) -> int:
        """The concurrency of the table and of the parts that have but one."""
        return self.at_once[-2] if len(self.at_once) > 1 else self.at_once[0]

    def orders_at(self, at_once: int) -> int:
        """Orders in a turn: fewer where one waits for the other, or such a turn would take most of the time."""
        return min(self.orders, 40 * at_once)


FULL = Plan(
    quick=False,
    rounds=3,
    orders=200,
    warm_up=30,
    at_once=(1, 4, 16, 64),
    parked=(0, 1_000, 10_000),
    cached=1_000,
    woken=200,
    rows=(1_000, 20_000, 200_000),
    backlog=5_000,
    workers=(1, 2, 4),
    read_seconds=10,
    readers=16,
    watchers=(1, 100, 1_000),
)

QUICK = Plan(
    quick=True,
    rounds=1,
    orders=30,
    warm_up=6,
    at_once=(10,),
    parked=(0, 60, 120),
    cached=60,
    woken=10,
    rows=(1_000, 10_000),
    backlog=60,
    workers=(1, 2),
    read_seconds=1,
    readers=16,
    watchers=(1, 100),
)


def of_size(plan: Plan, orders: int) -> Plan:
    """The same with `orders` in a turn, and no more than those in the backlog and parked."""
    return replace(
        plan,
        orders=orders,
        warm_up=min(plan.warm_up, orders),
        backlog=min(plan.backlog, orders),
        parked=tuple(dict.fromkeys(min(parked, orders) for parked in plan.parked)),
        woken=min(plan.woken, orders),
    )
