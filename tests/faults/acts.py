"""What operators do meanwhile, each act drawn from the seed: they end, reset and cancel workflows of either kind, run
passes of `trellis reconcile` in the middle of everything, and trust a provider whose look-up lags behind its charges.
"""

from __future__ import annotations

import asyncio
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Final

import httpx
from temporalio.api.common.v1 import WorkflowExecution
from temporalio.api.enums.v1 import EventType
from temporalio.api.workflowservice.v1 import ResetWorkflowExecutionRequest
from temporalio.service import RPCError

from tests.faults import verdict
from tests.faults.stack import eventually

if TYPE_CHECKING:
    from tests.faults.orders import Customers, Promise
    from tests.faults.stack import Stack

#: Seconds between two acts of the same kind, on the average.
PAUSE: Final = 6.0

#: Seconds by which the provider's look-up lags, while it does: longer than `reconcile` waits for an attempt, so that a
#: pass is told "none" of a charge that was made.
LAG: Final = 70.0

#: Seconds between two passes of `reconcile`, and what they are given: a charge is not given up while a look-up may lag.
PASS_EVERY: Final = 25.0
SETTLE: Final = LAG + verdict.GRACE

#: Orders that an operator chooses from, the latest.
_LATEST: Final = 40


@dataclass(frozen=True)
class Act:
    """One thing that an operator does: to which of the orders there are then, and how far back."""

    at: float
    kind: str
    workflow: str
    which: float
    how_far: float


def draw(dice: Random, seconds: float, kinds: list[str]) -> list[Act]:
    """The acts of a storm of so many seconds. Each kind has its own dice: leaving one out changes no other."""
    acts: list[Act] = []
    seed = dice.random()
    for kind in kinds:
        own = Random(f"{seed} {kind}")
        at = own.uniform(0, PAUSE) + 5
        while at < seconds:
            acts.append(Act(at, kind, own.choice(["order", "shipping"]), own.random(), own.random()))
            at += own.uniform(0.5, 1.5) * (PAUSE if kind != "lies" else 4 * PAUSE)
    return sorted(acts, key=lambda act: act.at)


async def play(acts: list[Act], stack: Stack, customers: Customers, say: Callable[[str], None]) -> Counter[str]:
    """Each act at its time; how many of each kind did something."""
    began = asyncio.get_running_loop().time()
    done: Counter[str] = Counter()
    for act in acts:
        await asyncio.sleep(max(0, began + act.at - asyncio.get_running_loop().time()))
        try:
            async with asyncio.timeout(10):
                told = await ACTS[act.kind](act, stack, customers)
        except (RPCError, httpx.HTTPError, TimeoutError):
            continue  # too late, too early, or whoever is asked is down: then nothing was done
        if told:
            done[f"{act.kind} {act.workflow}" if act.kind != "lies" else act.kind] += 1
            say(f"{act.kind} {told}")
    return done


async def keep_reconciling(stack: Stack, wrong: list[str]) -> None:
    """Passes while everything breaks, as the schedule would run them."""
    while True:
        await asyncio.sleep(PASS_EVERY)
        options = ("--grace", str(verdict.GRACE), "--settle", str(SETTLE))
        if problem := await verdict.reconciled(stack, *options, storm=True):
            wrong.append(problem)


async def stop_lying(stack: Stack) -> None:
    """The provider's look-up knows of every charge again. Waits for a sandbox that is being started."""

    async def told() -> bool:
        try:
            await _lag(stack, 0)
        except httpx.HTTPError:
            return False
        return True

    await eventually(told, 60, "the sandbox does not answer")


# --- the acts


async def _terminate(act: Act, stack: Stack, customers: Customers) -> str | None:
    promise = _chosen(act, customers)
    if promise is None:
        return None
    workflow_id = f"{act.workflow}/{promise.order_id}"
    # Before: it may be done although the reply is lost.
    promise.terminated = True
    await customers.temporal.get_workflow_handle(workflow_id).terminate("by the fault run")
    return workflow_id


async def _cancel(act: Act, stack: Stack, customers: Customers) -> str | None:
    promise = _chosen(act, customers)
    if promise is None:
        return None
    workflow_id = f"{act.workflow}/{promise.order_id}"
    promise.terminated = True
    await customers.temporal.get_workflow_handle(workflow_id).cancel()
    return workflow_id


async def _reset(act: Act, stack: Stack, customers: Customers) -> str | None:
    """To the end of any workflow task so far, also of an order that has ended."""
    promise = _chosen(act, customers)
    if promise is None:
        return None
    handle = customers.temporal.get_workflow_handle(f"{act.workflow}/{promise.order_id}")
    ends = [
        event.event_id
        async for event in handle.fetch_history_events()
        if event.event_type == EventType.EVENT_TYPE_WORKFLOW_TASK_COMPLETED
    ]
    if not ends:
        return None
    point = ends[int(act.how_far * len(ends))]
    promise.terminated = True
    await customers.temporal.workflow_service.reset_workflow_execution(
        ResetWorkflowExecutionRequest(
            namespace=customers.temporal.namespace,
            workflow_execution=WorkflowExecution(workflow_id=handle.id),
            reason="by the fault run",
            workflow_task_finish_event_id=point,
            request_id=str(uuid.uuid4()),
        )
    )
    return f"{handle.id} to event {point}"


async def _lies(act: Act, stack: Stack, _: Customers) -> str | None:
    """Half of the time the look-up says "none" of charges younger than `LAG`."""
    seconds = LAG if act.how_far < 0.7 else 0.0
    await _lag(stack, seconds)
    return f"by {seconds:.0f} s"


async def _lag(stack: Stack, seconds: float) -> None:
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{stack.sandbox_port}", trust_env=False) as client:
        (await client.post("/payments/sandbox/lag", json={"seconds": seconds})).raise_for_status()


def _chosen(act: Act, customers: Customers) -> Promise | None:
    accepted = [promise for promise in customers.promises.values() if promise.accepted][-_LATEST:]
    return accepted[int(act.which * len(accepted))] if accepted else None


#: Every kind of act.
ACTS: Final[dict[str, Callable[[Act, Stack, Customers], Awaitable[str | None]]]] = {
    "terminate": _terminate,
    "reset": _reset,
    "cancel": _cancel,
    "lies": _lies,
}
