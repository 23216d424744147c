"""An order's timeline: what each event tells, and the events as they happen."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from datetime import datetime
from typing import Any, Final

from app.cli import output
from app.cli.client import Api, CallFailed, ExitCode, order_path
from app.domain.steps import FINAL_STEPS

#: How often a broken connection is tried again, a second apart: enough for an API that restarts.
TRIES: Final = 60

#: Of an event: `id`, `type`, `ts`, `payload`, as the API sends them.
Event = dict[str, Any]


def watch(api: Api, order_id: str) -> Iterator[Event]:
    """The order's events, old ones at once and new ones as they come; ends when the order has.

    A connection that breaks is made again, and goes on after the last event that was seen.

    Raises:
        CallFailed: the order is unknown, or there was no API: at first, or at `TRIES` tries in a row.
    """
    seen, ended, tries_left = "", False, 0
    while True:
        try:
            with api.stream(order_path(order_id, "/events"), seen) as messages:
                tries_left = TRIES
                for message in messages:
                    seen, event = message.id, json.loads(message.data)
                    # A last note may follow the last step: the API closes the stream a moment later.
                    ended = ended or event["type"] in FINAL_STEPS
                    yield event
            if not ended:
                time.sleep(
                    1
                )  # a stream that has lasted long enough ends in order, and so does one of an API that stops
                continue
            failed = CallFailed("the API closed the connection", ExitCode.UNAVAILABLE)
        except CallFailed as error:
            failed = error
        if ended:
            return
        if tries_left == 0 or failed.code is not ExitCode.UNAVAILABLE:
            raise failed
        if tries_left == TRIES:
            output.remark(f"trellis: {failed}; trying again")
        tries_left -= 1
        time.sleep(1)


def show(event: Event) -> None:
    """One event as a line: when, what, and what is telling of it."""
    when = output.moment(datetime.fromisoformat(event["ts"]))
    output.line(f"{when}  {event['type']:<16}  {tell(event['payload'])}".rstrip(), like=event["type"])


def tell(payload: dict[str, Any]) -> str:
    """The telling part of an event: what is known by heart in words, the rest by name."""
    rest = dict(payload)
    words = [text for part in _PARTS if (text := part(rest))]
    words += [f"{name}={value}" for name, value in rest.items()]
    return "  ".join(words)


# --- each takes from the payload what it puts into words


def _amount(payload: dict[str, Any]) -> str:
    if not payload.keys() >= {"amount", "currency"}:
        return ""
    return f"{payload.pop('amount')} {payload.pop('currency')}"


def _attempt(payload: dict[str, Any]) -> str:
    if not payload.keys() >= {"activity", "attempt"}:
        return ""
    return f"{payload.pop('activity')}, attempt {payload.pop('attempt')}"


def _error(payload: dict[str, Any]) -> str:
    kind, message = payload.pop("error_type", ""), payload.pop("message", "")
    # That it is tried again goes without saying.
    final = payload.pop("retryable", True) is False
    return ": ".join(filter(None, (kind, message))) + (" (not tried again)" if final else "")


def _reason(payload: dict[str, Any]) -> str:
    return str(payload.pop("reason", ""))


def _note(payload: dict[str, Any]) -> str:
    note = payload.pop("note", "")
    return f"“{note}”" if note else ""


def _window(payload: dict[str, Any]) -> str:
    seconds = payload.pop("review_timeout_seconds", None)
    return "" if seconds is None else f"{seconds} s to decide"


def _pickup(payload: dict[str, Any]) -> str:
    return "to be picked up" if payload.pop("pickup", False) else ""


_PARTS: Final = (_amount, _attempt, _error, _reason, _note, _window, _pickup)
