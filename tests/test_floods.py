"""What strangers can do to an order by calling too often, and what becomes of calls that are repeated for a reason."""

from __future__ import annotations

import asyncio
import copy
import json
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from temporalio.api.enums.v1 import EventType
from temporalio.client import WorkflowHistory
from temporalio.contrib.pydantic import pydantic_data_converter
from temporalio.worker import Replayer, WorkflowInstance, WorkflowInstanceDetails, WorkflowRunner

from app.domain.steps import Step
from app.errors import OrderLost, ServiceUnavailable, TooLate, TooManyChanges, TrellisError
from app.local.temporal import LocalTemporal
from app.order import budget
from app.order.budget import ChangeBudget
from app.order.models import Decided, Review, SignalPayload, Verdict
from app.order.service import OrderService
from app.order.workflows import MAX_ADDRESS_UPDATES, MAX_NOTES, OrderWorkflow
from app.shipping.models import Address
from app.shipping.workflows import ShippingWorkflow
from app.temporal import runner
from tests.shop import HOME, OFFICE, Order, Shop, at_zip, fresh_settings, open_shop
from tests.support import until

APPROVAL, REJECTION = Review(decision=Verdict.APPROVE), Review(decision=Verdict.REJECT)

#: What a history may have after any flood; Temporal terminates at 51,200 events.
MOST_EVENTS = 4000

HISTORIES = Path(__file__).parent / "histories"


@pytest.fixture(scope="module")
async def shop(servers: Any, template: str) -> AsyncIterator[Shop]:
    """One shop for the module."""
    async with fresh_settings(servers, template) as settings, open_shop(settings) as opened:
        yield opened


async def _flood(call: Callable[[int], Awaitable[Any]], times: int, at_once: int = 50) -> Counter[str]:
    """Call so often; what came of it."""
    turn, answers = asyncio.Semaphore(at_once), Counter[str]()

    async def one(number: int) -> None:
        async with turn:
            try:
                await call(number)
            except TrellisError as error:
                answers[type(error).__name__] += 1
            else:
                answers["taken"] += 1

    await asyncio.gather(*(one(number) for number in range(times)))
    return answers


async def _sent_to(order: Order) -> Address:
    found = await order.shop.ledger.find_parcel(order.id)
    assert found is not None
    return Address.model_validate_json(found[1] or "null")


async def _accepted_updates(order: Order) -> int:
    kind = EventType.EVENT_TYPE_WORKFLOW_EXECUTION_UPDATE_ACCEPTED
    return sum(event.event_type == kind for event in await order.history())


# --- floods


async def test_an_order_survives_a_thousand_signals_of_each_kind_while_nobody_works(shop: Shop) -> None:
    limit = shop.settings.changes_per_order
    async with shop.closed():
        order, cancelled = await shop.order(), await shop.order()
        await _flood(lambda number: order.send_to(at_zip(f"{number:05}")), limit - 1)
        await order.send_to(OFFICE)
        addresses = await _flood(lambda _: order.send_to(HOME), 1000 - limit)
        approvals = await _flood(lambda _: order.approve(), 1000)
        cancellations = await _flood(lambda _: cancelled.cancel(), 1000)
        await cancelled.approve()
    assert addresses == {"TooManyChanges": 1000 - limit}
    assert approvals == cancellations == {"taken": limit, "TooManyChanges": 1000 - limit}
    assert await order.ends() is Step.SHIPPED
    assert await cancelled.ends() is Step.CANCELLED
    # The latest of those that were taken, written once.
    assert await _sent_to(order) == OFFICE
    assert (await order.activities()).count("change_address") == 1
    assert len(await order.history()) < MOST_EVENTS


async def test_an_order_survives_a_thousand_signals_of_each_kind_while_it_is_worked_on(shop: Shop) -> None:
    limit = shop.settings.changes_per_order
    order = await shop.order()
    await order.reaches(Step.AWAITING_REVIEW)
    addresses = await _flood(lambda number: order.send_to(at_zip(f"{number:05}")), 1000)
    updates = await _flood(lambda number: shop.service.change_address(order.id, at_zip(f"9{number:04}")), 80, at_once=8)
    assert addresses == {"taken": limit, "TooManyChanges": 1000 - limit}
    assert updates == {"taken": MAX_ADDRESS_UPDATES, "TooManyChanges": 80 - MAX_ADDRESS_UPDATES}
    async with shop.withholding(order.payment_id):
        assert (await shop.service.review(order.id, APPROVAL)).step is Step.CHARGING
        await shop.charged(order)
        approvals = await _flood(lambda _: order.approve(), 1000)
        reviews = await _flood(lambda number: shop.service.review(order.id, _approval(number)), 30, at_once=8)
        rejections = await _flood(lambda _: shop.service.review(order.id, REJECTION), 30, at_once=8)
    assert approvals == {"taken": limit, "TooManyChanges": 1000 - limit}
    assert (reviews, rejections) == ({"taken": 30}, {"TooLate": 30})
    assert await order.ends() is Step.SHIPPED
    assert await _accepted_updates(order) == MAX_ADDRESS_UPDATES + 1
    assert len(await order.history()) < MOST_EVENTS
    # What is closed is refused as such, however often.
    assert await _flood(lambda _: order.approve(), 150) == {"TooLate": 150}


def _approval(number: int) -> Review:
    return Review(decision=Verdict.APPROVE, note=f"the {number}th")


async def test_a_flood_of_approvals_does_not_hide_that_a_cancellation_was_refused(shop: Shop) -> None:
    order = await shop.order()
    async with shop.withholding(order.id):
        await order.approve()
        await shop.taken(order)
        await _flood(lambda _: order.workflow.signal(OrderWorkflow.approve, SignalPayload()), MAX_NOTES + 30)
        await order.tells("approve_ignored", MAX_NOTES)
        await order.cancel()
    assert await order.ends() is Step.SHIPPED
    assert len(await order.events("cancel_refused")) == 1
    assert len(await order.events("approve_ignored")) == MAX_NOTES


async def test_replicas_together_leave_room_in_a_history(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of them has an allowance of its own, but they all see how long the history is."""
    monkeypatch.setitem(budget.ROOM, "address", 60)
    replicas = [OrderService(shop.settings, shop.repository, shop.client) for _ in range(3)]
    async with shop.closed():
        order = await shop.order()
        taken = Counter[str]()
        for replica in replicas:
            taken += await _flood(lambda _, to=replica: to.signal_address(order.id, OFFICE), 90, at_once=5)
        assert 60 <= taken["taken"] < 100
        await order.cancel()
    assert await order.ends() is Step.CANCELLED


async def test_signals_beyond_what_temporal_takes_are_refused_and_the_order_can_still_be_decided(
    servers: Any, template: str, tmp_path: Path
) -> None:
    limits = {"history.maximumSignalsPerExecution": 5}
    server = LocalTemporal(tmp_path / "temporal", log=tmp_path / "log", dynamic_config=limits, durable=False)
    await server.start()
    try:
        async with (
            fresh_settings(servers, template, temporal_address=server.address) as settings,
            open_shop(settings) as small,
        ):
            order = await small.order()
            await order.reaches(Step.AWAITING_REVIEW)
            assert await _flood(lambda _: order.send_to(OFFICE), 8, at_once=1) == {"taken": 5, "TooManyChanges": 3}
            with pytest.raises(TooManyChanges):
                await order.approve()
            await small.service.review(order.id, APPROVAL)
            assert await order.ends() is Step.SHIPPED
    finally:
        await server.kill()


class _Stopwatch(WorkflowRunner):
    """Workflows whose longest activation is timed, in seconds of the processor."""

    def __init__(self) -> None:
        self.longest = 0.0
        self._inner = runner.runner()

    def prepare_workflow(self, defn: Any) -> None:
        self._inner.prepare_workflow(defn)

    def create_instance(self, det: WorkflowInstanceDetails) -> WorkflowInstance:
        instance = self._inner.create_instance(det)
        activate = instance.activate

        def timed(act: Any) -> Any:
            began = time.thread_time()
            try:
                return activate(act)
            finally:
                self.longest = max(self.longest, time.thread_time() - began)

        instance.activate = timed  # type: ignore[method-assign]
        return instance


async def test_thousands_of_buffered_signals_fit_into_one_workflow_task(caplog: pytest.LogCaptureFixture) -> None:
    """The SDK gives up a task that takes 2 s, and would do so at every attempt."""
    history = json.loads((HISTORIES / "approved_early.order.json").read_text())["events"]
    began, scheduled, approve, address, started = history[:5]
    events = [began, scheduled, *(copy.deepcopy(each) for _ in range(2500) for each in (approve, address)), started]
    for number, event in enumerate(events, start=1):
        event["eventId"] = str(number)
    watch = _Stopwatch()
    replayer = Replayer(
        workflows=[OrderWorkflow, ShippingWorkflow],
        data_converter=pydantic_data_converter,
        workflow_runner=watch,
        debug_mode=True,  # without the limit of 2 s, which a busy machine may exceed for reasons of its own
    )
    with caplog.at_level(logging.INFO):
        await replayer.replay_workflow(WorkflowHistory.from_json("order/flood", {"events": events}))
    assert len(caplog.records) < 10
    assert 0 < watch.longest < 2


# --- the API's allowance


def test_an_allowance_is_used_up_and_comes_back() -> None:
    now = 0.0
    allowance = ChangeBudget(4, lambda: now)
    assert [allowance.spend("o-1", "approve").count for _ in range(4)] == [1, 2, 3, 4]
    assert allowance.spend("o-1", "approve").wait == 900
    # Every order has its own, and every kind of change.
    assert allowance.spend("o-1", "cancel").wait == allowance.spend("o-2", "approve").wait == 0
    now = 899.0
    assert allowance.spend("o-1", "approve").wait == 1
    now = 900.0
    assert allowance.spend("o-1", "approve").wait == 0
    assert allowance.spend("o-1", "approve").wait == 900
    now = 10 * 3600.0
    assert allowance.spend("o-1", "approve").count == 1


def test_what_did_not_reach_the_order_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "_REMEMBERED", 2)
    allowance = ChangeBudget(1, lambda: 0.0)
    allowance.spend("o-1", "approve")
    allowance.give_back("o-1", "approve")
    assert allowance.spend("o-1", "approve").wait == 0
    assert allowance.spend("o-1", "approve").wait == 3600
    for other in ("o-2", "o-3"):
        allowance.spend(other, "approve")
    assert allowance.spend("o-1", "approve").wait == 0


# --- repeats


async def test_a_call_that_was_not_answered_in_time_is_repeated_as_one(shop: Shop) -> None:
    """Also more often than Temporal takes updates at once."""
    impatient = OrderService(shop.settings.model_copy(update={"update_timeout": 0.2}), shop.repository, shop.client)
    async with shop.closed():
        reviewed, moved, cancelled = await shop.order(), await shop.order(), await shop.order()
        for _ in range(12):
            calls = (
                impatient.review(reviewed.id, APPROVAL),
                impatient.change_address(moved.id, OFFICE),
                impatient.cancel_now(cancelled.id),
            )
            answers = await asyncio.gather(*calls, return_exceptions=True)
            assert [type(answer) for answer in answers] == [ServiceUnavailable] * 3
    service = shop.service
    assert (await _answered(lambda: service.review(reviewed.id, APPROVAL))).step is Step.CHARGING
    assert (await _answered(lambda: service.cancel_now(cancelled.id))).step is Step.CANCELLED
    await _answered(lambda: service.change_address(moved.id, OFFICE))
    await moved.approve()
    assert [await each.ends() for each in (reviewed, moved, cancelled)] == [Step.SHIPPED, Step.SHIPPED, Step.CANCELLED]
    assert await _accepted_updates(reviewed) == await _accepted_updates(cancelled) == 1
    assert await _sent_to(moved) == OFFICE


async def _answered(call: Callable[[], Awaitable[Decided]]) -> Decided:
    """The answer, asked for again as 503 says."""

    async def ask() -> Decided | None:
        try:
            return await call()
        except ServiceUnavailable:
            return None

    answer: Decided = await until(ask, "an answer", timeout=60)
    return answer


@pytest.mark.parametrize("before", ["by an update", "by a signal"])
async def test_the_same_approval_again_gets_the_same_answer(shop: Shop, before: str) -> None:
    order = await shop.order()
    await order.reaches(Step.AWAITING_REVIEW)
    answer = Decided(order_id=order.id, step=Step.CHARGING)
    async with shop.withholding(order.payment_id):
        if before == "by an update":
            assert await shop.service.review(order.id, APPROVAL) == answer
        else:
            await order.approve()
        await shop.charged(order)
        for review in (APPROVAL, APPROVAL, _approval(2)):
            assert await shop.service.review(order.id, review) == answer
        with pytest.raises(TooLate, match="charging"):
            await shop.service.review(order.id, REJECTION)
        await order.approve()
    assert await order.ends() is Step.SHIPPED
    for review in (APPROVAL, _approval(2)):
        assert await shop.service.review(order.id, review) == answer
    with pytest.raises(TooLate, match="shipped"):
        await shop.service.review(order.id, REJECTION)


async def test_the_same_rejection_again_gets_the_same_answer(shop: Shop) -> None:
    order = await shop.order()
    answer = Decided(order_id=order.id, step=Step.REJECTED)
    assert await shop.service.review(order.id, REJECTION) == answer
    assert await shop.service.review(order.id, REJECTION) == answer
    assert await order.ends() is Step.REJECTED
    for review in (REJECTION, Review(decision=Verdict.REJECT, note="again")):
        assert await shop.service.review(order.id, review) == answer
    with pytest.raises(TooLate, match="rejected"):
        await shop.service.review(order.id, APPROVAL)


@pytest.mark.parametrize("before", ["by an update", "by a signal", "while it closes"])
async def test_the_same_cancellation_again_gets_the_same_answer(shop: Shop, before: str) -> None:
    order = await shop.order()
    await order.reaches(Step.AWAITING_REVIEW)
    answer = Decided(order_id=order.id, step=Step.CANCELLED)
    if before == "by an update":
        assert await shop.service.cancel_now(order.id) == answer
    else:
        await order.cancel()
    if before == "by a signal":
        assert await order.ends() is Step.CANCELLED
    for _ in range(2):
        assert await shop.service.cancel_now(order.id) == answer
    assert await order.ends() is Step.CANCELLED
    assert await shop.service.cancel_now(order.id) == answer
    with pytest.raises(TooLate, match="cancelled"):
        await shop.service.review(order.id, APPROVAL)


async def test_an_order_that_validation_rejected_was_not_rejected_by_a_review(shop: Shop) -> None:
    orders = await shop.orders_with_one_payment()
    for order in orders:
        await order.approve()
    ends = {await order.ends(): order for order in orders}
    if Step.REJECTED in ends:
        with pytest.raises(TooLate):
            await shop.service.review(ends[Step.REJECTED].id, REJECTION)


async def test_an_address_may_be_changed_there_and_back(shop: Shop) -> None:
    order = await shop.order()
    for address in (HOME, OFFICE, HOME):
        await shop.service.change_address(order.id, address)
    assert len(await order.events("address_changed")) == 3
    for _ in range(3):
        await shop.service.change_address(order.id, OFFICE, key="one call")
    assert len(await order.events("address_changed")) == 4
    await order.approve()
    assert await order.ends() is Step.SHIPPED
    assert await _sent_to(order) == OFFICE


# --- lost workflows


async def test_a_lost_workflow_is_told_as_what_it_is(shop: Shop) -> None:
    order = await shop.order()
    await order.reaches(Step.AWAITING_REVIEW)
    await order.workflow.terminate()
    service = shop.service
    for call in (
        *(order.approve() for _ in range(2)),
        order.cancel(),
        order.send_to(OFFICE),
        service.review(order.id, APPROVAL),
        service.cancel_now(order.id),
        service.change_address(order.id, OFFICE),
    ):
        with pytest.raises(OrderLost, match="awaiting_review") as caught:
            await call
        assert (caught.value.status, caught.value.retry_after) == (503, 60)


async def test_an_order_that_was_lost_before_it_was_written_down_is_told_as_lost(shop: Shop) -> None:
    async with shop.closed():
        order = await shop.order()
        await order.workflow.terminate()
    with pytest.raises(OrderLost, match="received"):
        await order.approve()


async def test_a_workflow_lost_while_it_is_asked_is_told_as_lost(shop: Shop) -> None:
    patient = OrderService(shop.settings.model_copy(update={"update_timeout": 20.0}), shop.repository, shop.client)
    order = await shop.order()
    await order.reaches(Step.AWAITING_REVIEW)
    async with shop.locked(order):
        asking = asyncio.create_task(patient.change_address(order.id, OFFICE))
        await order.recorded(EventType.EVENT_TYPE_WORKFLOW_EXECUTION_UPDATE_ACCEPTED)
        await order.workflow.terminate()
        with pytest.raises(OrderLost):
            await asking
