"""Failpoints: named places where a test lets a process break, at every boundary of a side effect.

Off unless `TRELLIS_FAILPOINTS` names one; then `reach` is one look at a module variable. Only activities and
repositories have them: a workflow that broke by chance would not replay. docs/reliability.md says what each is for.

The setting is a list such as `charge.after_gateway=die:0.1;dispatch.*=fail:0.2,timeout:0.2:1`: names (with `*`),
then actions with the probability that a visit triggers them, and how often at most per process. The actions:

die      The process ends here, as with `kill -9`.
fail     A retryable error is raised here.
timeout  The work that follows is done, up to the next failpoint outside a transaction, and only then an error is
         raised: what was asked for has happened, and nobody is told.
"""

from __future__ import annotations

import os
import random
import time
from contextvars import ContextVar
from dataclasses import dataclass
from enum import StrEnum
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Final

from app.errors import ServiceUnavailable

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

#: Every failpoint there is. The last one of each activity lies between its work and the news of it.
NAMES: Final = (
    "receive.before_write",
    "receive.before_reply",
    "validate.before_write",
    "validate.before_reply",
    "close.before_write",
    "close.before_reply",
    "change_address.in_transaction",
    "change_address.before_reply",
    "reopen_review.before_write",
    "reopen_review.before_reply",
    "settle_review.before_write",
    "settle_review.before_reply",
    "note.before_reply",
    "charge.before_claim",
    "charge.before_gateway",
    "charge.after_gateway",
    "charge.in_settlement",
    "charge.before_reply",
    "refund.before_check",
    "refund.before_gateway",
    "refund.after_gateway",
    "refund.in_settlement",
    "refund.before_reply",
    "prepare.before_write",
    "prepare.before_reply",
    "dispatch.before_freeze",
    "dispatch.before_carrier",
    "dispatch.after_carrier",
    "dispatch.before_reply",
    "recall.before_carrier",
    "recall.after_carrier",
    "recall.before_reply",
)

#: What a killed process leaves as its exit code, so that nobody takes this end for an orderly one.
EXIT_CODE: Final = 137


class Action(StrEnum):
    """What happens at a failpoint."""

    DIE = "die"
    FAIL = "fail"
    TIMEOUT = "timeout"


@dataclass
class _Trap:
    """One action at one failpoint."""

    action: Action
    chance: float
    left: float


@dataclass(frozen=True)
class _Armed:
    traps: dict[str, list[_Trap]]
    dice: random.Random
    log: Path | None


_armed: _Armed | None = None

#: The failpoint that this attempt is to report as timed out, once what follows it is done.
_owed: ContextVar[str | None] = ContextVar("owed", default=None)


def arm(spec: str | None, *, seed: int | None = None, log: Path | None = None) -> None:
    """Set the failpoints of this process; without a `spec`, none. Each hit is added to the file `log`.

    Raises:
        ValueError: there is no such failpoint or action.
    """
    global _armed  # noqa: PLW0603 - one switch per process, read on the way of every activity
    if not spec:
        _armed = None
        return
    traps: dict[str, list[_Trap]] = {}
    for name, trap in _parsed(spec):
        traps.setdefault(name, []).append(trap)
    # Not for secrets: a seed makes the run repeatable.
    _armed = _Armed(traps, random.Random(seed), log)  # noqa: S311


def reach(name: str) -> None:
    """The attempt has come to this failpoint.

    Raises:
        ServiceUnavailable: this is the action.
    """
    if _armed is not None:
        _reach(name, _armed)


def _reach(name: str, armed: _Armed) -> None:
    owed = _owed.get()
    if owed is not None:
        if ".in_" in name:
            return  # what is owed is an error after the commit, not one that undoes the work
        _owed.set(None)
        raise ServiceUnavailable(f"failpoint {owed} timed out")
    for trap in armed.traps.get(name, ()):
        if trap.left >= 1 and armed.dice.random() < trap.chance:
            trap.left -= 1
            _record(name, trap.action, armed.log)
            _act(name, trap.action)
            return


def _act(name: str, action: Action) -> None:
    if action is Action.DIE:
        os._exit(EXIT_CODE)
    if action is Action.FAIL:
        raise ServiceUnavailable(f"failpoint {name}")
    if name.endswith(".before_reply"):
        raise ServiceUnavailable(f"failpoint {name} timed out")
    _owed.set(name)


def _record(name: str, action: Action, log: Path | None) -> None:
    if log is None:
        return
    # One unbuffered append: it is there even if the next thing is the end of the process.
    with log.open("ab", buffering=0) as file:
        file.write(f"{time.time():.3f} {os.getpid()} {name} {action}\n".encode())


def _parsed(spec: str) -> Iterator[tuple[str, _Trap]]:
    for part in filter(None, (part.strip() for part in spec.split(";"))):
        pattern, _, actions = part.partition("=")
        names = [name for name in NAMES if fnmatchcase(name, pattern)]
        if not names:
            raise ValueError(f"there is no failpoint {pattern}")
        for action in actions.split(","):
            kind, chance, times = (*action.split(":"), "", "")[:3]
            for name in names:
                yield name, _Trap(Action(kind), float(chance or 1), float(times or "inf"))
