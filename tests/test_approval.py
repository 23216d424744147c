"""What an approval binds: the digest of what was looked at, and what becomes of another address afterwards."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from temporalio.api.enums.v1 import EventType
from temporalio.client import WorkflowUpdateStage

from app.domain.money import Money
from app.domain.steps import Step
from app.errors import ReviewOutdated, TooLate
from app.order.models import Decided, Item, OrderView, Review, ReviewTask, Verdict, approval_digest
from app.order.workflows import OrderWorkflow
from app.shipping.models import Address
from tests.shop import HOME, OFFICE, Order, Shop, at_zip, fresh_settings, open_shop, until


@pytest.fixture(scope="module")
async def shop(servers: Any, template: str) -> AsyncIterator[Shop]:
    """A shop where another address after the approval is reviewed again, unless an order says otherwise."""
    async with (
        fresh_settings(servers, template, address_after_review="review") as chosen,
        open_shop(chosen) as opened,
    ):
        yield opened
        await opened.audit()


async def _view(order: Order) -> OrderView:
    found = await order.shop.repository.view(order.id)
    assert found
    return found


async def _queued(order: Order) -> ReviewTask | None:
    """Its line in the queue of reviews."""
    page = await order.shop.repository.in_review(None, 200)
    return next((task for task in page.reviews if task.order_id == order.id), None)


async def _decide(order: Order, digest: str | None = None, decision: Verdict = Verdict.APPROVE) -> Decided:
    return await order.shop.service.review(order.id, Review(decision=decision, digest=digest, note="seen"))


async def _sent_to(order: Order) -> Address | None:
    """Where the carrier has taken the parcel to; None if it has not."""
    found = await order.shop.ledger.find_parcel(order.id)
    return Address.model_validate_json(found[1] or "null") if found and found[0].state == "taken" else None


# --- the digest


async def test_a_decision_on_what_has_changed_since_is_refused(shop: Shop) -> None:
    order = await shop.order()
    await order.reaches(Step.AWAITING_REVIEW)
    seen = await _queued(order)
    assert seen
    assert seen.digest == (await _view(order)).digest
    await shop.service.change_address(order.id, OFFICE)
    for decision in Verdict:
        with pytest.raises(ReviewOutdated):
            await _decide(order, seen.digest, decision)
    assert (await order.status())[0] is Step.AWAITING_REVIEW
    now = (await _view(order)).digest
    assert now != seen.digest
    (changed,) = await order.events("address_changed")
    assert changed.payload["digest"] == now
    await _decide(order, now)
    assert await order.ends() is Step.SHIPPED
    (charging,) = await order.events("charging")
    assert (charging.payload["digest"], charging.payload["note"]) == (now, "seen")


async def test_a_decision_with_a_digest_does_not_overtake_a_change_on_its_way(shop: Shop) -> None:
    """The change was accepted by the workflow; the row, which the digest is read from, does not show it yet."""
    order = await shop.order()
    await order.recorded(EventType.EVENT_TYPE_TIMER_STARTED)
    async with shop.locked(order):
        seen = (await _view(order)).digest
        change = await order.workflow.start_update(
            OrderWorkflow.change_address, OFFICE, wait_for_stage=WorkflowUpdateStage.ACCEPTED
        )
        with pytest.raises(ReviewOutdated, match="being changed"):
            await _decide(order, seen)
    await change.result()
    await _decide(order, (await _view(order)).digest)
    assert await order.ends() is Step.SHIPPED


def test_everything_that_is_approved_is_in_the_digest() -> None:
    item, total = Item(sku="a", quantity=1, unit_price="1.00"), Money(amount="1.00", currency="USD")
    said: list[tuple[Any, ...]] = [
        ("o-1", "p-1", [item], total, HOME),
        ("o-2", "p-1", [item], total, HOME),
        ("o-1", "p-2", [item], total, HOME),
        ("o-1", "p-1", [item.model_copy(update={"quantity": 2})], total, HOME),
        ("o-1", "p-1", [item, item], total, HOME),
        ("o-1", "p-1", [item], Money(amount="1.00", currency="EUR"), HOME),
        ("o-1", "p-1", [item], Money(amount="1.01", currency="USD"), HOME),
        ("o-1", "p-1", [item], total, OFFICE),
        ("o-1", "p-1", [item], total, None),
        ("o-1", "p-1", [item], total, Address.model_validate(HOME.model_dump() | {"country": "NO"})),
    ]
    assert len({approval_digest(*facts) for facts in said}) == len(said)


# --- another address after the approval


async def _approved_and_changed(shop: Shop, **more: Any) -> Order:
    """An order in its second review: charged, and its address is another than was approved."""
    order = await shop.order(**more)
    async with shop.withholding(order.payment_id):
        await order.approve()
        await shop.charged(order)
        await shop.service.change_address(order.id, OFFICE)
    await order.tells("review_reopened")
    return order


async def test_a_change_after_the_approval_is_reviewed_before_the_parcel_leaves(shop: Shop) -> None:
    order = await _approved_and_changed(shop)
    task = await _queued(order)
    assert task
    assert task.reopened_for == "address"
    assert (await order.status())[0] is Step.CHARGED
    assert await shop.ledger.find_parcel(order.id) is None
    (first,) = await order.events("charging")
    with pytest.raises(ReviewOutdated):
        await _decide(order, first.payload["digest"])
    answer = await _decide(order, task.digest)
    assert await order.ends() is Step.SHIPPED
    assert await _sent_to(order) == OFFICE
    (decided,) = await order.events("review_decided")
    assert decided.payload == {"decision": "approve", "digest": task.digest, "note": "seen"}
    assert await _queued(order) is None
    assert (await _view(order)).reopened_for is None
    # The same call again is the same decision; the opposite comes too late.
    assert await _decide(order, task.digest) == answer
    with pytest.raises(TooLate, match="shipped"):
        await _decide(order, task.digest, Verdict.REJECT)
    assert await order.events("review_decided") == [decided]
    assert not await shop.ledger.refunds_of(order.payment_id)


async def test_a_change_in_the_second_review_is_reviewed_too(shop: Shop) -> None:
    order = await _approved_and_changed(shop)
    await shop.service.change_address(order.id, at_zip("62799"))
    await order.approve()
    assert await order.ends() is Step.SHIPPED
    assert await _sent_to(order) == at_zip("62799")


@pytest.mark.parametrize("end", ["rejected", "cancelled", "cancelled and answered", "undecided"])
async def test_without_an_approval_of_the_new_address_the_money_goes_back(shop: Shop, end: str) -> None:
    order = await _approved_and_changed(shop, review=2 if end == "undecided" else 60)
    match end:
        case "rejected":
            await _decide(order, decision=Verdict.REJECT)
        case "cancelled":
            await order.cancel()
        case "cancelled and answered":
            assert (await shop.service.cancel_now(order.id)).step is Step.CANCELLED
    assert await order.ends() is Step.CANCELLED
    assert len(await shop.ledger.refunds_of(order.payment_id)) == 1
    assert await shop.ledger.find_parcel(order.id) is None
    assert await _queued(order) is None


async def test_an_address_that_is_changed_back_needs_no_second_review(shop: Shop) -> None:
    order = await shop.order()
    async with shop.withholding(order.payment_id):
        await order.approve()
        await shop.charged(order)
        await shop.service.change_address(order.id, OFFICE)
        await shop.service.change_address(order.id, HOME)
    assert await order.ends() is Step.SHIPPED
    assert not await order.events("review_reopened")


async def test_a_change_is_refused_once_the_parcel_is_made_ready(shop: Shop) -> None:
    async with shop.without_shipping():
        order = await shop.approved()
        await order.recorded(EventType.EVENT_TYPE_CHILD_WORKFLOW_EXECUTION_STARTED)
        with pytest.raises(TooLate, match="made ready"):
            await shop.service.change_address(order.id, OFFICE)
        await order.send_to(OFFICE)
        (ignored,) = await order.tells("address_ignored")
    assert ignored.payload == {"reason": "the parcel is being made ready"}
    assert await order.ends() is Step.SHIPPED
    assert await _sent_to(order) == HOME


@pytest.mark.parametrize("after_review", ["deny", "a value of tomorrow"])
async def test_a_change_after_the_approval_is_denied(shop: Shop, after_review: str) -> None:
    order = await shop.order(after_review=after_review)
    await shop.service.change_address(order.id, at_zip("62799"))
    async with shop.withholding(order.payment_id):
        await order.approve()
        await shop.charged(order)
        with pytest.raises(TooLate, match="approved for the address that it has"):
            await shop.service.change_address(order.id, OFFICE)
        await order.send_to(OFFICE)
        await order.tells("address_ignored")
    assert await order.ends() is Step.SHIPPED
    assert await _sent_to(order) == at_zip("62799")


# --- whatever the order of things

ACTS = ["look and approve", "look and approve", "approve", "office", "office, sent", "third", "back home", "pause"]


@settings(max_examples=3, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    stories=st.lists(
        st.lists(st.sampled_from([*ACTS, "reject", "cancel"]), min_size=2, max_size=8), min_size=6, max_size=6
    )
)
@example(
    stories=[
        ["approve", "office"],
        ["office", "approve"],
        ["approve", "office", "approve", "third", "approve"],
        ["look and approve", "pause", "office, sent", "look and approve", "back home", "look and approve"],
        ["look and approve", "office", "cancel"],
    ]
)
async def test_what_is_handed_over_was_approved_last(shop: Shop, stories: list[list[str]]) -> None:
    await asyncio.gather(*(_lives_through(shop, story) for story in stories))


async def _lives_through(shop: Shop, story: list[str]) -> None:
    order = await shop.order(review=120)
    await order.reaches(Step.AWAITING_REVIEW)
    # What a reviewer has looked at, and was told that it counts.
    approved: list[Address | None] = []
    racing = [asyncio.create_task(_act(order, act, approved)) for act in story if act != "pause" or await _pause()]

    async def ended() -> bool:
        if ((await order.status())[0] or Step.RECEIVED).final:
            return True
        await _act(order, "look and approve", approved)
        return False

    await asyncio.gather(*racing)
    await until(ended, f"{order.id} to end: {story}")
    end = await order.ends()
    handed_over, view = await _sent_to(order), await _view(order)
    assert (handed_over is not None) == (end is Step.SHIPPED), story
    if handed_over is None:
        return
    bound = [
        event.payload["digest"]
        for event in await order.events("charging", "review_decided")
        if event.payload.get("decision") != "reject"
    ]
    total = Money(amount=view.total, currency=view.currency)
    assert bound[-1] == approval_digest(order.id, view.payment_id, view.items, total, handed_over), story
    if "approve" not in story:
        assert approved[-1] == handed_over, story


async def _pause() -> bool:
    await asyncio.sleep(0.1)
    return False


async def _act(order: Order, act: str, approved: list[Address | None]) -> None:
    """What somebody does; it may be too late for it."""
    service = order.shop.service
    doing: dict[str, Callable[[], Awaitable[Any]]] = {
        "look and approve": lambda: _look_and_approve(order, approved),
        "approve": order.approve,
        "reject": lambda: _decide(order, decision=Verdict.REJECT),
        "cancel": order.cancel,
        "office": lambda: service.change_address(order.id, OFFICE),
        "office, sent": lambda: order.send_to(OFFICE),
        "third": lambda: service.change_address(order.id, at_zip("62799")),
        "back home": lambda: service.change_address(order.id, HOME),
    }
    with suppress(TooLate, ReviewOutdated):
        await doing[act]()


async def _look_and_approve(order: Order, approved: list[Address | None]) -> None:
    seen = await _view(order)
    await _decide(order, seen.digest)
    approved.append(seen.address)
