"""How many signals to one order the API passes on to Temporal.

Every signal makes the order's history longer, also while no worker runs, and Temporal terminates a workflow whose
history is full. docs/decisions/0052-a-history-is-a-budget.md has the figures.
"""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal

#: The signals, each with an allowance of its own: none can use up that of another.
Change = Literal["approve", "cancel", "address"]

#: Seconds within which a used-up allowance is there again.
_REFILLS_IN: Final = 3600.0
#: Allowances that a process remembers; the one that was used longest ago is forgotten first.
_REMEMBERED: Final = 50_000

#: Length of a history, in events, from which on it takes no more signals of a kind. A flood of addresses leaves room
#: for an approval, and both leave room for a cancellation. A signal costs up to four events.
ROOM: Final[dict[Change, int]] = {"address": 1000, "approve": 1500, "cancel": 2000}


@dataclass(frozen=True)
class Spent:
    """What is left of an allowance."""

    #: How many changes count at the moment, this one included if there was room for it.
    count: float
    #: Seconds until there is room for one; 0 if there was.
    wait: int = 0


class ChangeBudget:
    """An allowance per order and kind of change: so many at once, and again as many evenly over the next hour.

    It is the process's own: several replicas allow that many each. What holds for all of them is the length of the
    order's history (`ROOM`) and the limits inside the workflow.
    """

    def __init__(self, limit: int, now: Callable[[], float] = time.monotonic) -> None:
        self._limit = limit
        self._now = now
        self._spent: OrderedDict[tuple[str, Change], tuple[float, float]] = OrderedDict()

    def spend(self, order_id: str, change: Change) -> Spent:
        """Count a change if there is room for it."""
        key, now = (order_id, change), self._now()
        count = self._count(key, now)
        over = count + 1 - self._limit
        if over > 0:
            return Spent(count, wait=math.ceil(round(over * _REFILLS_IN / self._limit, 3)))
        self._remember(key, count + 1, now)
        return Spent(count + 1)

    def give_back(self, order_id: str, change: Change) -> None:
        """Undo one `spend`: the change did not reach the order."""
        key, now = (order_id, change), self._now()
        count = self._count(key, now) - 1
        if count > 0:
            self._remember(key, count, now)
        else:
            self._spent.pop(key, None)

    def _count(self, key: tuple[str, Change], now: float) -> float:
        count, at = self._spent.get(key, (0.0, now))
        return max(0.0, count - (now - at) * self._limit / _REFILLS_IN)

    def _remember(self, key: tuple[str, Change], count: float, now: float) -> None:
        self._spent[key] = (count, now)
        self._spent.move_to_end(key)
        if len(self._spent) > _REMEMBERED:
            self._spent.popitem(last=False)
