"""Determinism: recorded histories replay, a workflow that is nowhere cached lives its whole life, and workers come
and go while orders wait.

The recordings (`tests/record_histories.py`) stand for the orders that are on their way when a new release comes.
"""

from __future__ import annotations

import asyncio
import gc
import json
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from temporalio import workflow
from temporalio.api.enums.v1 import EventType
from temporalio.client import WorkflowHistory, WorkflowUpdateStage
from temporalio.contrib.pydantic import pydantic_data_converter
from temporalio.worker import Replayer, UnsandboxedWorkflowRunner
from temporalio.workflow import NondeterminismError

from app.domain.steps import Step
from app.order.models import OrderInput, OrderResult
from app.order.workflows import OrderWorkflow
from app.shipping.models import ShippingInput, ShippingResult
from app.shipping.workflows import ShippingWorkflow
from tests.alerts.careless import ValidatedTwice
from tests.record_histories import EARLIER, FOLDER, SCENARIOS
from tests.shop import OFFICE, REFUSED, UNANSWERED, Shop, fresh_settings, open_shop

RECORDINGS = sorted(FOLDER.glob("*.json"))


def _recorded(file: Path) -> WorkflowHistory:
    history = json.loads(file.read_text())
    started = history["events"][0]["workflowExecutionStartedEventAttributes"]
    return WorkflowHistory.from_json(started["workflowId"], history)


# --- recordings


def test_every_scenario_is_recorded_for_the_order_and_for_the_shipment_it_has() -> None:
    recorded = {file.name for file in RECORDINGS}
    assert {f"{name}.order.json" for name in (*SCENARIOS, *EARLIER)} <= recorded
    assert {name.partition("@")[0] for name in EARLIER} <= SCENARIOS.keys()
    for file in RECORDINGS:
        has_shipment = "ChildWorkflowExecutionStarted" in file.read_text().replace("childW", "ChildW")
        if file.name.endswith(".order.json"):
            assert has_shipment == (file.name.replace(".order.", ".shipping.") in recorded), file.name


@pytest.mark.parametrize("file", RECORDINGS, ids=lambda file: file.stem)
async def test_a_recorded_history_replays(file: Path) -> None:
    replayer = Replayer(workflows=[OrderWorkflow, ShippingWorkflow], data_converter=pydantic_data_converter)
    await replayer.replay_workflow(_recorded(file))


@workflow.defn(name="OrderWorkflow")
class WithoutValidation(OrderWorkflow):
    """A careless change: a step is gone."""

    @workflow.init
    def __init__(self, order: OrderInput) -> None:
        super().__init__(order)

    @workflow.run
    async def run(self, order: OrderInput) -> OrderResult:
        return await super().run(order)

    async def _validate(self) -> None:
        self._step = Step.AWAITING_REVIEW


@workflow.defn(name="OrderWorkflow")
class WithoutWaiting(OrderWorkflow):
    """A careless change: no window, hence no timer."""

    @workflow.init
    def __init__(self, order: OrderInput) -> None:
        super().__init__(order)

    @workflow.run
    async def run(self, order: OrderInput) -> OrderResult:
        return await super().run(order)

    async def _await_review(self) -> None:
        self._step = Step.CHARGING


@workflow.defn(name="ShippingWorkflow")
class Unprepared(ShippingWorkflow):
    """A careless change in the child."""

    @workflow.init
    def __init__(self, shipping: ShippingInput) -> None:
        super().__init__(shipping)

    @workflow.run
    async def run(self, shipping: ShippingInput) -> ShippingResult:
        return await super().run(shipping)

    async def _prepare(self) -> None:
        self._step = Step.PREPARED


@pytest.mark.parametrize(
    ("careless", "recording"),
    [
        (WithoutValidation, "shipped.order"),
        (ValidatedTwice, "shipped.order"),
        (WithoutWaiting, "expired.order"),
        (WithoutWaiting, "cancelled_in_review.order"),
        (Unprepared, "shipped.shipping"),
    ],
)
async def test_a_change_that_would_break_orders_on_their_way_is_caught(careless: type, recording: str) -> None:
    # The sandbox would load this test module once more; it is not what is tested here.
    replayer = Replayer(
        workflows=[careless], data_converter=pydantic_data_converter, workflow_runner=UnsandboxedWorkflowRunner()
    )
    with pytest.raises(NondeterminismError):
        await replayer.replay_workflow(_recorded(FOLDER / f"{recording}.json"))


# --- workers that forget


class _Complaints(logging.Handler):
    """What the SDK or asyncio had to complain of; failed activities are told elsewhere and part of the plan."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.heard: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.name.startswith(("temporalio.worker", "temporalio.workflow", "asyncio")):
            self.heard.append(f"{record.name}: {record.getMessage()}")


@asynccontextmanager
async def _without_complaints() -> AsyncIterator[None]:
    """Fails when the block, or clearing up after it, leads to a warning: of tasks that remain after an eviction, of
    a deadlock, of a workflow task that failed, of a task that nobody awaited."""
    complaints = _Complaints()
    root = logging.getLogger()
    root.addHandler(complaints)
    try:
        yield
        gc.collect()
        await asyncio.sleep(0)
    finally:
        root.removeHandler(complaints)
    assert not complaints.heard


@pytest.fixture(scope="module")
async def shop(servers: Any, template: str) -> AsyncIterator[Shop]:
    """A shop without workers: these tests bring their own, most of which keep hardly a workflow in memory; hence
    without local steps (docs/decisions/0040-local-first.md)."""
    async with (
        fresh_settings(servers, template, local_steps=False) as settings,
        open_shop(settings, working=False) as opened,
    ):
        yield opened
        await opened.audit()


async def test_orders_live_their_whole_life_when_every_task_replays_it(shop: Shop) -> None:
    async with _without_complaints(), shop.serving(max_cached_workflows=0):
        reviewed, moved, cancelled = await shop.order(), await shop.order(address=None), await shop.order()
        refused = await shop.approved(address=REFUSED)
        await reviewed.reaches(Step.AWAITING_REVIEW)
        await reviewed.approve()
        await shop.service.change_address(moved.id, OFFICE)
        await moved.approve()
        async with shop.withholding(cancelled.payment_id):
            await cancelled.approve()
            await shop.charged(cancelled)
            await shop.service.cancel_now(cancelled.id)
        ends = await asyncio.gather(*(order.ends() for order in (reviewed, moved, cancelled, refused)))
    assert ends == [Step.SHIPPED, Step.SHIPPED, Step.CANCELLED, Step.SHIPPING_FAILED]


async def test_an_order_can_be_evicted_wherever_it_waits(shop: Shop) -> None:
    """One place in the cache and many orders: each task of one drives another out, from wherever that one waits."""
    async with _without_complaints(), shop.serving(max_cached_workflows=1):
        in_review = [await shop.order() for _ in range(2)]
        charging, with_carrier = await shop.order(), await shop.approved(address=UNANSWERED, attempts=10)
        async with shop.withholding(charging.payment_id):
            await charging.approve()
            await shop.charged(charging)
            await with_carrier.tells("attempt_failed")
            for order in in_review:
                await order.recorded(EventType.EVENT_TYPE_TIMER_STARTED)
            async with shop.locked(in_review[0]):
                change = await in_review[0].workflow.start_update(
                    OrderWorkflow.change_address, OFFICE, wait_for_stage=WorkflowUpdateStage.ACCEPTED
                )
                await in_review[1].approve()
                await in_review[1].reaches(Step.CHARGING, Step.CHARGED, Step.PREPARED, Step.SHIPPED)
            await change.result()
            # Taken as cancellations of the orders, whose workflows are not in memory.
            for order in (charging, with_carrier, in_review[0]):
                await order.workflow.cancel()
        ends = await asyncio.gather(*(order.ends() for order in (*in_review, with_carrier, charging)))
    assert ends == [Step.CANCELLED, Step.SHIPPED, Step.CANCELLED, Step.CANCELLED]


async def test_orders_parked_in_review_survive_any_number_of_restarts(shop: Shop) -> None:
    async with _without_complaints(), shop.serving():
        orders = [await shop.order() for _ in range(4)]
        await asyncio.gather(*(order.recorded(EventType.EVENT_TYPE_TIMER_STARTED) for order in orders))
        for _ in range(3):
            async with shop.closed():
                pass
        async with shop.closed():
            await orders[0].approve()
            await orders[1].cancel()
        await orders[2].approve()
        await shop.service.cancel_now(orders[3].id)
        ends = await asyncio.gather(*(order.ends() for order in orders))
    assert ends == [Step.SHIPPED, Step.CANCELLED, Step.SHIPPED, Step.CANCELLED]
    for order in orders:
        assert (await order.activities()).count("receive") == 1


async def test_a_restart_during_a_charge_does_not_cost_an_attempt(shop: Shop) -> None:
    async with _without_complaints(), shop.serving():
        order = await shop.approved("pay-slow")
        await shop.charged(order)
        async with shop.closed():
            # Closing waits for the attempt that runs: the reply comes a second after the charge.
            assert (await order.status())[0] is Step.CHARGED
        assert await order.ends() is Step.SHIPPED
    assert not await order.events("attempt_failed", "attempt_retried")
