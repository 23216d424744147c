"""Record the histories that `tests/test_replay.py` replays: `python -m tests.record_histories [scenario …]`.

Run it for a scenario that is new, and for all of them only when no order of an earlier release is on its way any
more: recordings of what earlier releases did are what makes the test worth something. It starts its own PostgreSQL
and Temporal, and writes `tests/histories/<scenario>.<order|shipping>.json`.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

from temporalio.api.enums.v1 import EventType, PendingActivityState
from temporalio.client import AsyncActivityHandle, WorkflowFailureError, WorkflowHandle
from temporalio.exceptions import ApplicationError
from temporalio.service import RPCError, RPCStatusCode

from app import failpoints
from app.db.pool import migrate
from app.domain.steps import Step
from app.local.stack import LocalStack
from app.order.models import Review, SignalPayload, Verdict
from app.order.workflows import MAX_ADDRESS_SIGNALS, MAX_NOTES, OrderWorkflow
from app.settings import Settings
from app.shipping.models import Address
from tests.shop import OFFICE, REFUSED, UNANSWERED, UNHEARD, Order, Shop, at_zip, open_shop
from tests.support import reset, until

FOLDER = Path(__file__).parent / "histories"

Scenario = Callable[[Shop], Awaitable[Order]]


async def shipped(shop: Shop) -> Order:
    """The whole life; the second approval is ignored."""
    order = await shop.order()
    await order.reaches(Step.AWAITING_REVIEW)
    await order.approve()
    await order.approve()
    return order


async def local_steps(shop: Shop) -> Order:
    """The same since steps of the database are tried where the workflow runs."""
    return await shipped(shop)


async def handed_over(shop: Shop) -> Order:
    """Each of those steps fails there once."""
    steps = ("receive", "validate", "prepare")
    failpoints.arm(";".join(f"{step}.before_write=fail:1:1" for step in steps))
    order = await shop.approved()
    await order.ends()
    failpoints.arm(None)
    return order


async def approved_early(shop: Shop) -> Order:
    """Everything there before the first task: approval, address, and no worker."""
    async with shop.closed():
        order = await shop.approved()
        await order.send_to(OFFICE)
    return order


async def expired(shop: Shop) -> Order:
    """Nobody decides."""
    return await shop.order(review=1)


async def approved_with_the_timer(shop: Shop) -> Order:
    """Timer and approval in one task."""
    order = await shop.order(review=3)
    await order.recorded(EventType.EVENT_TYPE_TIMER_STARTED)
    async with shop.closed():
        await order.recorded(EventType.EVENT_TYPE_TIMER_FIRED)
        await order.approve()
    return order


async def rejected(shop: Shop) -> Order:
    """By the clerk, as an update, after one that was refused."""
    order = await shop.order()
    await order.workflow.signal("address", "nowhere")
    await shop.service.review(order.id, Review(decision=Verdict.REJECT, note="known fraud"))
    return order


async def cancelled_in_review(shop: Shop) -> Order:
    """Nothing was charged."""
    order = await shop.order()
    await order.reaches(Step.AWAITING_REVIEW)
    await order.cancel()
    return order


async def cancelled_during_charge(shop: Shop) -> Order:
    """The charge is refunded when its success is known."""
    order = await shop.order()
    async with shop.withholding(order.payment_id):
        await order.approve()
        await shop.charged(order)
        await order.cancel()
    return order


async def cancelled_during_handover(shop: Shop) -> Order:
    """As an update, while no carrier answers: recalled and refunded."""
    order = await shop.approved(address=UNANSWERED, attempts=10)
    await order.tells("attempt_failed")
    await shop.service.cancel_now(order.id)
    return order


async def cancelled_too_late(shop: Shop) -> Order:
    """The carrier has the parcel and has not answered yet."""
    order = await shop.order()
    async with shop.withholding(order.id):
        await order.approve()
        await shop.taken(order)
        await order.cancel()
        await order.ends()
    return order


async def cancelled_in_temporal(shop: Shop) -> Order:
    """The workflow itself is cancelled, during the charge."""
    order = await shop.order()
    async with shop.withholding(order.payment_id):
        await order.approve()
        await shop.charged(order)
        await order.workflow.cancel()
    return order


async def payment_failed(shop: Shop) -> Order:
    """Declined."""
    return await shop.approved("pay-decline")


async def payment_retried(shop: Shop) -> Order:
    """The reply to the charge is lost; the second attempt learns of it."""
    return await shop.approved("pay-lost")


async def shipping_failed(shop: Shop) -> Order:
    """No carrier takes it."""
    return await shop.approved(address=REFUSED)


async def taken_unnoticed(shop: Shop) -> Order:
    """The carrier takes it, and no reply ever arrives: found out by the recall."""
    return await shop.approved(address=UNHEARD)


async def shipment_terminated(shop: Shop) -> Order:
    """By an operator: its parent asks for the parcel and refunds."""
    order = await shop.approved(address=UNANSWERED, attempts=10)
    await order.tells("attempt_failed")
    await order.shipment.terminate()
    return order


async def shipment_cancelled(shop: Shop) -> Order:
    """In Temporal, during the handover: taken as the order's cancellation."""
    order = await shop.approved(address=UNANSWERED, attempts=10)
    await order.tells("attempt_failed")
    await order.shipment.cancel()
    return order


async def shipment_cancelled_in_recall(shop: Shop) -> Order:
    """In Temporal, while the carrier that was given up is asked for the parcel: asked until it answers."""
    async with unheard(shop, UNANSWERED) as order:
        await order.shipment.cancel()
        await recorded(order.shipment, EventType.EVENT_TYPE_WORKFLOW_EXECUTION_CANCEL_REQUESTED)
    return order


async def recall_ended_by_hand(shop: Shop, address: Address = UNANSWERED) -> Order:
    """`temporal activity fail`: that says nothing of the parcel, so the shipment fails, and its parent asks."""
    async with unheard(shop, address) as order:
        async with shop.locked(order):
            recall = await until(lambda: _attempt(order), f"an attempt at the recall of {order.id}")
            await recall.fail(ApplicationError("ended by hand", non_retryable=True))
        await recorded(order.shipment, EventType.EVENT_TYPE_ACTIVITY_TASK_FAILED)
    return order


@asynccontextmanager
async def unheard(shop: Shop, address: Address = UNHEARD) -> AsyncIterator[Order]:
    """A carrier that was given up, with the parcel or without by the address, and is not heard as long as the block
    runs, however often it is asked for the parcel."""
    order = await shop.order(address=address, attempts=1)
    async with AsyncExitStack() as outage:
        async with shop.withholding(order.id):
            await order.approve()
            await order.reaches(Step.PREPARED)
            if address == UNHEARD:
                await shop.taken(order)
            await outage.enter_async_context(shop.outage("carrier"))

        async def asked() -> bool:
            return any(event.payload["activity"] == "recall" for event in await order.events("attempt_failed"))

        await until(asked, f"the carrier to be asked for the parcel of {order.id}")
        yield order


async def _attempt(order: Order) -> AsyncActivityHandle | None:
    """The shipment's activity, while an attempt of it runs."""
    description = await order.shipment.describe()
    for pending in description.raw_description.pending_activities:
        if pending.state == PendingActivityState.PENDING_ACTIVITY_STATE_STARTED:
            return order.shop.client.get_async_activity_handle(
                workflow_id=order.shipment.id, run_id=description.run_id, activity_id=pending.activity_id
            )
    return None


async def said_to_have_given_up(shop: Shop) -> Order:
    """By somebody else than the shipment, which is terminated then: its parent asks for the parcel all the same."""
    order = await shop.approved(address=UNANSWERED, attempts=10)
    await order.tells("attempt_failed")
    await order.workflow.signal("dispatch_failed", {"reason": "says who?"})
    await order.shipment.terminate()
    return order


async def cancelled_before_shipment(shop: Shop) -> Order:
    """After the charge, while the shipment waits for an address that is being written."""
    order = await shop.order()
    failpoints.arm("change_address.in_transaction=fail")
    await order.send_to(OFFICE)
    await order.tells("attempt_failed")
    await order.approve()
    await order.recorded(EventType.EVENT_TYPE_ACTIVITY_TASK_COMPLETED)
    await until(lambda: _is_worked_off(order), f"{order.id} to go on after its charge")
    await order.cancel()
    await until(lambda: _is_worked_off(order), f"{order.id} to take the cancellation")
    failpoints.arm(None)
    return order


async def reset_before_shipment(shop: Shop) -> Order:
    """After the shipment has ended: another one finds that the parcel is on its way."""
    order = await shipped(shop)
    await order.ends()
    await reset(shop.client, order.workflow, 0)
    return order


async def reset_and_cancelled(shop: Shop) -> Order:
    """While the shipment runs, which is not the new run's child for Temporal, and is told all the same."""
    order = await shop.approved(address=UNANSWERED, attempts=4)
    await order.tells("attempt_failed")
    await reset(shop.client, order.workflow, -1)
    await until(lambda: _is_worked_off(order), f"the new run of {order.id}")
    await order.cancel()
    return order


async def _is_worked_off(order: Order) -> bool:
    """Whether the workflow has seen everything that happened."""
    kinds = [event.event_type for event in await order.history()]
    done = len(kinds) - 1 - kinds[::-1].index(EventType.EVENT_TYPE_WORKFLOW_TASK_COMPLETED)
    return not _NEWS & set(kinds[done:])


#: What a workflow has to see.
_NEWS = {
    EventType.EVENT_TYPE_ACTIVITY_TASK_COMPLETED,
    EventType.EVENT_TYPE_WORKFLOW_EXECUTION_SIGNALED,
    EventType.EVENT_TYPE_WORKFLOW_TASK_FAILED,
}


async def recorded(workflow: WorkflowHandle[Any, Any], kind: EventType.ValueType) -> None:
    """Wait until Temporal has recorded an event of this kind."""

    async def there() -> bool:
        return any([event.event_type == kind async for event in workflow.fetch_history_events()])

    await until(there, f"{EventType.Name(kind)} in {workflow.id}")


async def address_changed(shop: Shop) -> Order:
    """In review, by signal and by update; and while the shipment runs, which is told."""
    order = await shop.order()
    await order.send_to(OFFICE)
    await shop.service.change_address(order.id, at_zip("62702"))
    await order.tells("address_changed", 2)
    async with shop.without_shipping():
        await order.approve()
        await order.recorded(EventType.EVENT_TYPE_CHILD_WORKFLOW_EXECUTION_STARTED)
        await order.send_to(at_zip("62703"))
        await order.recorded(EventType.EVENT_TYPE_EXTERNAL_WORKFLOW_EXECUTION_SIGNALED)
    return order


async def flooded(shop: Shop) -> Order:
    """More signals than are told or written: late approvals, then a late cancellation; and addresses that replace
    each other while they wait."""
    async with shop.closed():
        order = await shop.order()
        for number in range(MAX_ADDRESS_SIGNALS + 5):
            await order.workflow.signal(OrderWorkflow.address, at_zip(f"{62700 + number}"))
    await order.tells("address_changed")
    async with shop.withholding(order.id):
        await order.approve()
        await shop.taken(order)
        for _ in range(MAX_NOTES + 5):
            await order.workflow.signal(OrderWorkflow.approve, SignalPayload())
        await order.tells("approve_ignored", MAX_NOTES)
        await order.cancel()
        await order.ends()
    return order


async def decided_twice(shop: Shop) -> Order:
    """The same answered calls again; the cancellation under ids of its own, during the charge."""
    order = await shop.order()
    async with shop.withholding(order.payment_id):
        for _ in range(2):
            await shop.service.review(order.id, Review(decision=Verdict.APPROVE))
        await shop.charged(order)
        for number in range(2):
            await order.workflow.execute_update(OrderWorkflow.cancel_order, SignalPayload(), id=f"cancel-{number}")
    return order


async def address_of_a_newer_release(shop: Shop) -> Order:
    """A signal with an address that has a field which this release does not know."""
    order = await shop.order()
    await order.workflow.signal("address", OFFICE.model_dump() | {"country": "NO"})
    await order.tells("address_changed")
    await order.approve()
    return order


async def _changed_after_approval(shop: Shop, after_review: str) -> Order:
    order = await shop.order(after_review=after_review)
    async with shop.withholding(order.payment_id):
        await order.approve()
        await shop.charged(order)
        await order.send_to(OFFICE)
        await order.tells("address_changed" if after_review == "review" else "address_ignored")
    return order


async def address_approved(shop: Shop) -> Order:
    """Changed after the approval, and approved in a second review; a decision on the first address is refused."""
    order = await _changed_after_approval(shop, "review")
    await order.tells("review_reopened")
    task = (await shop.repository.in_review(None, 1)).reviews[0]
    await shop.service.review(order.id, Review(decision=Verdict.APPROVE, digest=task.digest, note="moved"))
    return order


async def address_rejected(shop: Shop) -> Order:
    """Changed after the approval, and refunded by the second review."""
    order = await _changed_after_approval(shop, "review")
    await order.tells("review_reopened")
    await shop.service.review(order.id, Review(decision=Verdict.REJECT))
    return order


async def address_denied(shop: Shop) -> Order:
    """Approved for the address that it has."""
    return await _changed_after_approval(shop, "deny")


SCENARIOS: dict[str, Scenario] = {
    scenario.__name__: scenario
    for scenario in (
        shipped,
        local_steps,
        handed_over,
        approved_early,
        expired,
        approved_with_the_timer,
        rejected,
        cancelled_in_review,
        cancelled_during_charge,
        cancelled_during_handover,
        cancelled_too_late,
        cancelled_in_temporal,
        payment_failed,
        payment_retried,
        shipping_failed,
        taken_unnoticed,
        shipment_terminated,
        address_changed,
        shipment_cancelled,
        shipment_cancelled_in_recall,
        recall_ended_by_hand,
        said_to_have_given_up,
        cancelled_before_shipment,
        reset_before_shipment,
        reset_and_cancelled,
        flooded,
        decided_twice,
        address_of_a_newer_release,
        address_approved,
        address_rejected,
        address_denied,
    )
}

#: What a release before did otherwise is kept beside: `<scenario>@<commit>.<order|shipping>.json`, recorded by the
#: code of that commit. This code cannot record it any more.
EARLIER = (
    "shipment_cancelled@31b9616",
    "shipment_cancelled_in_recall@31b9616",
    "recall_ended_by_hand@31b9616",
    "said_to_have_given_up@31b9616",
    "cancelled_before_shipment@31b9616",
    "reset_before_shipment@31b9616",
    "reset_and_cancelled@31b9616",
)


async def record(shop: Shop, name: str) -> None:
    """Live through one scenario and write down what Temporal recorded."""
    order = await SCENARIOS[name](shop)
    try:
        print(f"{name}: {await order.ends()}")  # noqa: T201 - a script's report
    except WorkflowFailureError as error:
        print(f"{name}: {error.cause}")  # noqa: T201 - likewise
    for part, workflow in (("order", order.workflow), ("shipping", order.shipment)):
        history = await _history(workflow)
        if history is not None:
            text = json.dumps(_without_traces_of_us(history), indent=1, ensure_ascii=False) + "\n"
            (FOLDER / f"{name}.{part}.json").write_text(text)


async def _history(workflow: WorkflowHandle[Any, Any]) -> dict[str, Any] | None:
    try:
        history: dict[str, Any] = json.loads((await workflow.fetch_history()).to_json())
    except RPCError as error:
        if error.status is RPCStatusCode.NOT_FOUND:
            return None
        raise
    return history


def _without_traces_of_us(value: Any) -> Any:
    """The history without the names of the recording machine, its processes and its folders."""
    match value:
        case dict():
            return {key: "" if key == "stackTrace" else _without_traces_of_us(inner) for key, inner in value.items()}
        case list():
            return [_without_traces_of_us(inner) for inner in value]
        case str():
            # Of clients and workers, and in the names of workers' own queues.
            return re.sub(r"^\d+@[\w.-]+$", "recorder", value)
        case _:
            return value


async def main(names: list[str]) -> None:
    """Record these scenarios, or all of them."""
    FOLDER.mkdir(exist_ok=True)
    async with LocalStack(durable=False) as stack:
        await asyncio.to_thread(migrate, stack.database_url)
        settings = Settings(**stack.settings_overrides(), metrics_port=0, sandbox=True)
        async with open_shop(settings.model_copy(update={"dispatch_attempts": 2})) as shop:
            for name in names or SCENARIOS:
                await record(shop, name)
            await shop.audit()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1:]))
