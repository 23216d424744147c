"""Which failpoints each new process gets, so that all of them are hit, and which were.

A process that dies is started again with what is still missing; when nothing is, a little of everything stays on.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from random import Random

from app.failpoints import NAMES, Action

#: Who reaches a failpoint: the worker on the shipments' queue, or the one on the orders'.
_SHIPPING = ("prepare.", "dispatch.", "recall.")

#: Deaths in waiting per process: more would kill it before it has done anything else.
_DEATHS_AT_ONCE = 2

_REMAINDER = "*=fail:0.004,timeout:0.004,die:0.0005"


class FailpointPlan:
    """The matrix of failpoints and actions, and how far it is filled."""

    def __init__(self, log: Path, dice: Random) -> None:
        self.log = log
        self._dice = dice

    def hits(self) -> Counter[tuple[str, Action]]:
        """How often each action was taken at each failpoint, by every process so far."""
        if not self.log.exists():
            return Counter()
        lines = (line.split() for line in self.log.read_text().splitlines())
        return Counter((name, Action(action)) for _, _, name, action in lines)

    def missing(self) -> list[tuple[str, Action]]:
        """What was not hit yet."""
        done = self.hits()
        return [(name, action) for name in NAMES for action in Action if (name, action) not in done]

    def missing_on(self, queue: str) -> list[tuple[str, Action]]:
        """What was not hit yet by the workers on `queue`."""
        shipping = queue == "shipping"
        return [(name, action) for name, action in self.missing() if name.startswith(_SHIPPING) == shipping]

    def spec(self, queue: str) -> str:
        """The setting for a process on `queue`, `default` or `shipping`."""
        missing = self.missing_on(queue)
        if not missing:
            return _REMAINDER
        deaths = [name for name, action in missing if action is Action.DIE]
        chosen = self._dice.sample(deaths, min(_DEATHS_AT_ONCE, len(deaths)))
        parts = [f"{name}={action}:0.25:1" for name, action in missing if action is not Action.DIE]
        # Not at the first visit: what was never reached before should be reached in passing, too.
        return ";".join([*parts, *(f"{name}=die:0.4:1" for name in chosen)])
