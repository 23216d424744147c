"""After the storm: everything healed, everything closed, the books compared, the promises kept."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import asyncpg
from pydantic import ValidationError

from app.cli.client import ExitCode
from app.domain.steps import FINAL_STEPS, Step
from app.reconcile.models import ReconcileReport

if TYPE_CHECKING:
    from tests.faults.orders import Promise
    from tests.faults.stack import Stack

#: Seconds without a single order coming to its end after which those that are open count as stuck. A provider is asked
#: again after at most a minute, and an attempt whose worker died is given up after forty seconds; an order can need
#: several of both.
STUCK: Final = 240.0

#: What `trellis reconcile` is given: longer than any attempt that could still be running.
GRACE: Final = 45.0


async def drained(stack: Stack, say: Callable[[str], None]) -> list[str]:
    """Wait until no order is open that has a workflow, settle those that have none; what is wrong then."""
    fewest, since = -1, time.monotonic()
    while left := await _open(stack):
        if fewest < 0 or len(left) < fewest:
            fewest, since = len(left), time.monotonic()
        if time.monotonic() - since > STUCK:
            return [f"stuck for {STUCK:.0f} s: order {order} at {step}" for order, step in left[:50]]
        if problem := await reconciled(stack, "--grace", str(GRACE)):
            return [problem]
        await asyncio.sleep(5)
    say("every order is closed")
    problem = await reconciled(stack, "--grace", "0", "--settle", "0")
    return [problem] if problem else []


async def reconciled(stack: Stack, *options: str, storm: bool = False) -> str | None:
    """What is wrong with a pass of `trellis reconcile`. That it leaves something for the next one is not; nor, in the
    storm, that PostgreSQL or Temporal did not answer."""
    code, output = await stack.command("reconcile", "--apply", "--json", *options)
    if storm and code == ExitCode.UNAVAILABLE:
        return None
    try:
        report = ReconcileReport.model_validate_json(output)
    except ValidationError:
        return f"`trellis reconcile --apply` ended with {code} and no report: {output[-500:]}; see commands.log"
    defects = [f"{repair.order_id} ({repair.detail})" for repair in report.repairs if repair.defect]
    return f"`trellis reconcile --apply` leaves for a person: {', '.join(defects)}" if defects else None


async def audited(stack: Stack) -> dict[str, Any]:
    """What `trellis audit` says, with the sandbox's full ledger."""
    code, output = await stack.command("audit", "--json", "--partners", "ledger", "--settle", "0", timeout=600)
    try:
        report: dict[str, Any] = json.loads(output)
    except ValueError:
        report = {"violations": [], "incomplete": [f"`trellis audit` ended with {code}: {output[-500:]}"]}
    return report


async def broken_promises(stack: Stack, promises: dict[str, Promise]) -> list[str]:
    """What the API said and the tables do not bear out."""
    steps = await _steps(stack)
    wrong = []
    for promise in promises.values():
        step = steps.get(promise.order_id)
        reason = _broken(promise, step)
        if reason:
            wrong.append(f"{promise.order_id} ({promise.story}): {reason}, and the order is {step or 'lost'}")
    return wrong


def _broken(promise: Promise, step: Step | None) -> str | None:
    if promise.accepted and step is None:
        return "202 was given to its start"
    if step is None or promise.terminated:
        return None
    if promise.cancelled and step in {Step.SHIPPED, Step.CHARGING, Step.CHARGED, Step.PREPARED}:
        return "200 was given to its cancellation"
    if promise.approved and step in {Step.EXPIRED, Step.REJECTED}:
        return "200 was given to its approval"
    return None


async def ends(stack: Stack) -> Counter[str]:
    """How many orders ended how."""
    return Counter((await _steps(stack)).values())


async def waiting(stack: Stack, promises: dict[str, Promise]) -> int:
    """How many orders are not at their end, accepted or not."""
    closed = {order_id for order_id, step in (await _steps(stack)).items() if step.final}
    return len(promises.keys() - closed)


async def accepted_and_open(stack: Stack, promises: dict[str, Promise]) -> int:
    """How many orders of those that were accepted are not at their end, written down or not."""
    closed = {order_id for order_id, step in (await _steps(stack)).items() if step.final}
    return sum(promise.accepted and promise.order_id not in closed for promise in promises.values())


async def _open(stack: Stack) -> list[tuple[str, str]]:
    rows = await _fetch(
        stack, "SELECT id, state FROM orders WHERE NOT (state = ANY($1)) ORDER BY id", list(FINAL_STEPS)
    )
    return [(row["id"], row["state"]) for row in rows]


async def _steps(stack: Stack) -> dict[str, Step]:
    return {row["id"]: Step(row["state"]) for row in await _fetch(stack, "SELECT id, state FROM orders")}


async def _fetch(stack: Stack, sql: str, *arguments: object) -> list[asyncpg.Record]:
    connection = await asyncpg.connect(stack.database_url)
    try:
        return await connection.fetch(sql, *arguments)
    finally:
        await connection.close()


async def books_of(stack: Stack, order_ids: list[str]) -> dict[str, Any]:
    """Everything that is written of some orders, for the folder of a failed run."""
    tables = {
        "orders": "SELECT * FROM orders WHERE id = ANY($1)",
        "payments": "SELECT * FROM payments WHERE order_id = ANY($1)",
        "events": "SELECT * FROM events WHERE order_id = ANY($1) ORDER BY id",
    }
    return {
        name: [{key: str(value) for key, value in row.items()} for row in await _fetch(stack, sql, order_ids)]
        for name, sql in tables.items()
    }
