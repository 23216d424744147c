"""`temporal workflow reset`, Temporal's usual cure: of an order or of its shipment, to every point there is.

Each story is lived once for every point that its history usually has. Wherever the reset leads, the order must come to
the end that its parcel and its money have, once each; what the tables, the partners and Temporal say of it is compared
at the end of the module.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import pytest
from temporalio.api.enums.v1 import EventType
from temporalio.client import WorkflowExecutionStatus, WorkflowHandle

from app.domain.steps import Step
from tests.shop import REFUSED, UNANSWERED, Order, Shop, fresh_settings, open_shop
from tests.support import reset, until


@pytest.fixture(scope="module")
async def shop(servers: Any, template: str) -> AsyncIterator[Shop]:
    """One shop for the module; at its end the tables and the partners must agree about every order."""
    async with fresh_settings(servers, template) as settings, open_shop(settings) as opened:
        yield opened
        await opened.audit()


# --- how an order comes to its end, and what that is


async def shipped(shop: Shop) -> Order:
    return await shop.approved()


async def refused(shop: Shop) -> Order:
    """Nobody takes the parcel."""
    return await shop.approved(address=REFUSED)


async def expired(shop: Shop) -> Order:
    return await shop.order(review=1)


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


#: The end, and how many points there are.
ENDS = [
    (shipped, Step.SHIPPED, 5),
    (refused, Step.SHIPPING_FAILED, 7),
    (expired, Step.EXPIRED, 3),
    (cancelled_in_review, Step.CANCELLED, 3),
    (cancelled_in_charge, Step.CANCELLED, 4),
    (cancelled_in_handover, Step.CANCELLED, 9),
]

#: The same for those that have a shipment.
SHIPMENTS = [
    (shipped, Step.SHIPPED, 2),
    (refused, Step.SHIPPING_FAILED, 4),
    (cancelled_in_handover, Step.CANCELLED, 5),
]


def _name(given: Any) -> str:
    return str(getattr(given, "__name__", given))


@pytest.mark.parametrize(("story", "end", "points"), ENDS, ids=_name)
async def test_an_order_that_is_reset_after_its_end_ends_the_same_way(
    shop: Shop, story: Callable[[Shop], Awaitable[Order]], end: Step, points: int
) -> None:
    async def live(number: int) -> Step:
        order = await story(shop)
        assert await order.ends() is end
        await reset(shop.client, order.workflow, number)
        return await order.ends()

    assert set(await asyncio.gather(*map(live, range(points)))) == {end}


@pytest.mark.parametrize(("story", "end", "points"), SHIPMENTS, ids=_name)
async def test_a_shipment_that_is_reset_after_its_end_changes_nothing(
    shop: Shop, story: Callable[[Shop], Awaitable[Order]], end: Step, points: int
) -> None:
    async def live(number: int) -> Step | None:
        order = await story(shop)
        assert await order.ends() is end
        await reset(shop.client, order.shipment, number)
        await _closes(order.shipment)
        return (await order.status())[0]

    assert set(await asyncio.gather(*map(live, range(points)))) == {end}


# --- orders that are reset on their way


@asynccontextmanager
async def charging_and_cancelled(shop: Shop) -> AsyncIterator[Order]:
    """The provider has the money, and its answer is on the way while the block runs."""
    order = await shop.order()
    async with shop.withholding(order.payment_id):
        await order.approve()
        await shop.charged(order)
        await order.cancel()
        yield order


@asynccontextmanager
async def taken(shop: Shop) -> AsyncIterator[Order]:
    """The carrier has the parcel, and its answer is on the way while the block runs."""
    order = await shop.order()
    async with shop.withholding(order.id):
        await order.approve()
        await shop.taken(order)
        yield order


@asynccontextmanager
async def taken_and_cancelled(shop: Shop) -> AsyncIterator[Order]:
    """The same, and too late to cancel; nobody knows yet."""
    async with taken(shop) as order:
        await order.cancel()
        await _told(order, 1)
        yield order


@asynccontextmanager
async def unanswered(shop: Shop) -> AsyncIterator[Order]:
    """No carrier answers; cancelled when the block has ended."""
    order = await shop.approved(address=UNANSWERED, attempts=100)
    await order.tells("attempt_failed")
    yield order
    await order.cancel()


ON_THE_WAY = [
    (charging_and_cancelled, "workflow", Step.CANCELLED, 3),
    (taken, "workflow", Step.SHIPPED, 4),
    (taken, "shipment", Step.SHIPPED, 1),
    (taken_and_cancelled, "workflow", Step.SHIPPED, 6),
    (taken_and_cancelled, "shipment", Step.SHIPPED, 3),
    (unanswered, "workflow", Step.CANCELLED, 4),
    (unanswered, "shipment", Step.CANCELLED, 1),
]


@pytest.mark.parametrize(("way", "part", "end", "points"), ON_THE_WAY, ids=_name)
async def test_an_order_is_reset_on_its_way(
    shop: Shop, way: Callable[[Shop], AbstractAsyncContextManager[Order]], part: str, end: Step, points: int
) -> None:
    async def live(number: int) -> Step:
        async with way(shop) as order:
            workflow: WorkflowHandle[Any, Any] = getattr(order, part)
            await reset(shop.client, workflow, number)
            await _takes_up(workflow)
        return await order.ends()

    assert set(await asyncio.gather(*map(live, range(points)))) == {end}


# --- what is waited for


async def _takes_up(workflow: WorkflowHandle[Any, Any]) -> None:
    """Wait until the new run has had its first task."""

    async def done() -> bool:
        kinds = [event.event_type async for event in workflow.fetch_history_events()]
        failed = len(kinds) - 1 - kinds[::-1].index(EventType.EVENT_TYPE_WORKFLOW_TASK_FAILED)
        return EventType.EVENT_TYPE_WORKFLOW_TASK_COMPLETED in kinds[failed:]

    await until(done, f"the new run of {workflow.id}")


async def _closes(workflow: WorkflowHandle[Any, Any]) -> None:
    async def closed() -> bool:
        return (await workflow.describe()).status is not WorkflowExecutionStatus.RUNNING

    await until(closed, f"the end of {workflow.id}")


async def _told(order: Order, times: int) -> None:
    async def signalled() -> bool:
        history = [event.event_type async for event in order.shipment.fetch_history_events()]
        return history.count(EventType.EVENT_TYPE_WORKFLOW_EXECUTION_SIGNALED) >= times

    await until(signalled, f"the cancellation to reach the shipment of {order.id}")
