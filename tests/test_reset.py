"""`temporal workflow reset`, Temporal's usual cure: of an order or of its shipment, to every point there is.

Each story is told once per point: the order lives, one of its workflows is reset, and the end must be the one it had.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from temporalio.api.common.v1 import WorkflowExecution
from temporalio.api.enums.v1 import EventType
from temporalio.api.workflowservice.v1 import ResetWorkflowExecutionRequest
from temporalio.client import WorkflowHandle

from app.steps import Step
from tests.shop import REFUSED, UNANSWERED, UNHEARD, Order, Shop, fresh_settings, open_shop

Story = Callable[[Shop], Awaitable[Order]]


@pytest.fixture(scope="module")
async def shop(servers: Any, template: str) -> AsyncIterator[Shop]:
    """One shop for the module; at its end the tables and the partners must agree about every order."""
    async with fresh_settings(servers, template) as settings, open_shop(settings) as opened:
        yield opened
        await opened.audit()


async def shipped(shop: Shop) -> Order:
    order = await shop.order()
    await order.reaches(Step.AWAITING_REVIEW)
    await order.approve()
    return order


async def refused(shop: Shop) -> Order:
    return await shop.approved(address=REFUSED)


async def taken_unnoticed(shop: Shop) -> Order:
    return await shop.approved(address=UNHEARD)


async def declined(shop: Shop) -> Order:
    return await shop.approved("pay-decline")


async def expired(shop: Shop) -> Order:
    order = await shop.order(review=1)
    return order


async def cancelled_in_review(shop: Shop) -> Order:
    order = await shop.order()
    await order.reaches(Step.AWAITING_REVIEW)
    await order.cancel()
    return order


async def cancelled_in_charge(shop: Shop) -> Order:
    order = await shop.order()
    async with shop.withholding(order.payment_id):
        await order.approve()
        await shop.charged(order)
        await order.cancel()
        await order.recorded(EventType.EVENT_TYPE_WORKFLOW_EXECUTION_SIGNALED, 2)
    return order


async def cancelled_in_handover(shop: Shop) -> Order:
    order = await shop.approved(address=UNANSWERED, attempts=10)
    await order.tells("attempt_failed")
    await shop.service.cancel_now(order.id)
    return order


async def cancelled_too_late(shop: Shop) -> Order:
    order = await shop.order()
    async with shop.withholding(order.id):
        await order.approve()
        await shop.taken(order)
        await order.cancel()
        await order.ends()
    return order


STORIES = {
    shipped: Step.SHIPPED,
    refused: Step.SHIPPING_FAILED,
    taken_unnoticed: Step.SHIPPED,
    declined: Step.PAYMENT_FAILED,
    expired: Step.EXPIRED,
    cancelled_in_review: Step.CANCELLED,
    cancelled_in_charge: Step.CANCELLED,
    cancelled_in_handover: Step.CANCELLED,
    cancelled_too_late: Step.SHIPPED,
}


async def reset(shop: Shop, workflow: WorkflowHandle[Any, Any], event_id: int) -> str:
    """As `temporal workflow reset --event-id` does it; the id of the new run."""
    answer = await shop.client.workflow_service.reset_workflow_execution(
        ResetWorkflowExecutionRequest(
            namespace=shop.client.namespace,
            workflow_execution=WorkflowExecution(workflow_id=workflow.id),
            reason="as an operator would",
            workflow_task_finish_event_id=event_id,
            request_id=str(uuid.uuid4()),
        )
    )
    return answer.run_id


async def points(workflow: WorkflowHandle[Any, Any]) -> list[int]:
    """Where it can be reset to."""
    return [
        event.event_id
        async for event in workflow.fetch_history_events()
        if event.event_type == EventType.EVENT_TYPE_WORKFLOW_TASK_COMPLETED
    ]


@pytest.mark.parametrize("part", ["workflow", "shipment"])
@pytest.mark.parametrize(("story", "end"), STORIES.items(), ids=lambda given: getattr(given, "__name__", None))
async def test_an_order_that_has_ended_is_reset(shop: Shop, story: Story, end: Step, part: str) -> None:
    first = await story(shop)
    assert await first.ends() is end
    try:
        ways = await points(getattr(first, part))
    except Exception:
        pytest.skip("no shipment")

    async def live(number: int) -> str:
        order = await story(shop)
        try:
            await order.ends()
            at = await points(getattr(order, part))
            if number >= len(at):
                return "short"
            await reset(shop, getattr(order, part), at[number])
            async with asyncio.timeout(15):
                if part == "workflow":
                    result: Any = await order.ends()
                else:
                    result = await order.shipment.result()
        except BaseException as error:
            cause = getattr(error, "cause", None)
            return f"{number}: {order.id} {type(error).__name__} {error} {cause} {getattr(cause,'cause','')} {await order.status()}"
        ok = (await order.status())[0]
        return "" if ok is end else f"{number} {ok} {result}"

    found = await asyncio.gather(*(live(number) for number in range(len(ways))))
    print(story.__name__, part, len(ways))
    assert not [f for f in found if f], "\n".join(found)
