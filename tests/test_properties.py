"""Any story that orders can live through, drawn by Hypothesis, comes to a right end.

Temporal, PostgreSQL, workflows and activities are the real ones. Only provider and carrier are in memory, because the
story says what they answer, and the pauses between attempts are short. What people do, they do at a moment of the
story: while an activity runs, before or after it had its effect, or so long after the review opened.

By default each run draws the same stories. For others, and more of them:

    TRELLIS_TEST_EXAMPLES=500 python -m pytest tests/test_properties.py --hypothesis-seed=7
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import uuid
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import HealthCheck, event, example, given, settings
from hypothesis import strategies as st
from temporalio import activity
from temporalio.client import (
    WorkflowFailureError,
    WorkflowUpdateFailedError,
    WorkflowUpdateHandle,
    WorkflowUpdateStage,
)
from temporalio.common import RetryPolicy
from temporalio.service import RPCError, RPCStatusCode
from temporalio.worker import UnsandboxedWorkflowRunner

from app.domain.money import Money
from app.domain.steps import Step
from app.errors import CarrierUnavailable, PaymentDeclined, PaymentUnavailable, ShipmentRefused
from app.order.activities import OrderActivities
from app.order.models import Decided, Review, SignalPayload, StartOrder, Verdict
from app.order.repository import OrderRepository
from app.order.workflows import OrderWorkflow
from app.payment.activities import PaymentActivities
from app.payment.gateway import Receipt
from app.payment.repository import PaymentRepository
from app.shipping.activities import ShippingActivities
from app.shipping.carrier import Handover
from app.shipping.models import Address
from app.shipping.repository import ShipmentRepository
from app.temporal.worker import WorkerPart
from app.workflow import policies
from tests import books
from tests.shop import HOME, OFFICE, PATIENCE, Order, Shop, fresh_settings, open_shop, until

EXAMPLES = int(os.environ.get("TRELLIS_TEST_EXAMPLES", "0"))

#: Seconds of the review window, the shortest there is.
WINDOW = 1

#: Attempts at `dispatch`, and at asking a carrier that was given up for the parcel: few, because the server takes
#: about a second for each repetition, however short the pause.
DISPATCH_ATTEMPTS = 2
RECALL_ATTEMPTS = 2

# --- stories

#: Moments while an activity runs; it had its effect, or not yet.
MOMENTS = [
    f"{side} {activity}"
    for activity in ("receive", "validate", "charge", "prepare", "dispatch", "recall", "refund", "close")
    for side in ("before", "after")
]
ACTS = ["approve", "reject", "cancel", "cancel, answered", "cancel in Temporal", "address", "address, answered"]

UPDATES: dict[str, tuple[Any, Any]] = {
    "reject": (OrderWorkflow.review, Review(decision=Verdict.REJECT)),
    "cancel, answered": (OrderWorkflow.cancel_order, SignalPayload()),
    "address, answered": (OrderWorkflow.change_address, OFFICE),
}

#: What a partner does before it does what it is asked for: nothing, or it but without an answer.
TROUBLE = st.lists(st.sampled_from(["unavailable", "lost"]), max_size=2)


@dataclass(frozen=True, repr=False)
class Story:
    """What will happen."""

    #: So many seconds after the review opened, in this order; "restart" stops the workers and starts others.
    in_review: tuple[tuple[float, str], ...] = ((0.0, "approve"),)
    #: At these moments, the first time they come.
    meanwhile: tuple[tuple[str, str], ...] = ()
    address: Address | None = HOME
    charge: tuple[str, ...] = ()
    declined: bool = False
    dispatch: tuple[str, ...] = ()
    refused: bool = False
    recall: tuple[str, ...] = ()
    refund: tuple[str, ...] = ()
    #: The order's workflow is terminated when this moment comes: its shipment is on its own.
    orphaned: str | None = None
    #: On workers that keep no workflow in memory.
    forgetful: bool = False

    def __repr__(self) -> str:
        told = ((part, getattr(self, part.name)) for part in fields(self))
        return f"Story({', '.join(f'{part.name}={value!r}' for part, value in told if value != part.default)})"

    @property
    def acts(self) -> list[str]:
        """Everything that people do."""
        return [act for _, act in (*self.in_review, *self.meanwhile)]


def _stories() -> st.SearchStrategy[Story]:
    second = st.sampled_from([0.0, 0.05, 0.2, WINDOW - 0.05, WINDOW, WINDOW + 0.05])
    approved = st.just((0.0, "approve"))
    timed = st.tuples(second, st.sampled_from([*ACTS, "approve", "approve", "restart"]))
    return st.builds(
        Story,
        in_review=st.one_of(
            # Most orders are approved: further down the story there is more to see.
            st.tuples(approved),
            st.tuples(approved, timed),
            st.lists(timed, max_size=3).map(tuple),
        ).map(lambda acts: tuple(sorted(acts, key=lambda act: act[0]))),
        meanwhile=st.lists(st.tuples(st.sampled_from(MOMENTS), st.sampled_from(ACTS)), max_size=4).map(tuple),
        address=st.sampled_from([HOME, None]),
        charge=TROUBLE.map(tuple),
        declined=st.sampled_from([False, False, False, True]),
        dispatch=TROUBLE.map(tuple),
        refused=st.sampled_from([False, False, True]),
        recall=st.lists(st.just("unavailable"), max_size=RECALL_ATTEMPTS + 1).map(tuple),
        refund=TROUBLE.map(tuple),
        orphaned=st.sampled_from([None, None, None, None, "before dispatch", "after dispatch"]),
        forgetful=st.booleans(),
    )


# --- the world in which they happen


@dataclass
class Partners:
    """Provider and carrier, as careful as their contract says: idempotent by key, and the first to ask decides."""

    charges: dict[str, books.Charge] = field(default_factory=dict)
    refunds: dict[str, books.Refund] = field(default_factory=dict)
    parcels: dict[str, books.Parcel] = field(default_factory=dict)


@dataclass
class Life:
    """One order living through a story."""

    story: Story
    order: Order
    world: World
    calls: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    moments: set[str] = field(default_factory=set)
    #: Approvals that reached the workflow; whether they counted, the timeline says.
    approvals: int = 0
    updates: list[tuple[str, WorkflowUpdateHandle[Decided]]] = field(default_factory=list)
    answers: list[tuple[str, bool]] = field(default_factory=list)
    #: Updates sent from within local activities.
    sending: list[asyncio.Task[None]] = field(default_factory=list)

    def trouble(self, call: str) -> str | None:
        """What goes wrong with this attempt."""
        faults: tuple[str, ...] = getattr(self.story, call)
        self.calls[call] += 1
        return faults[self.calls[call] - 1] if self.calls[call] <= len(faults) else None

    async def comes(self, moment: str) -> None:
        """Everybody does what they do at this moment, the first time it comes."""
        if moment in self.moments:
            return
        self.moments.add(moment)
        for at, act in self.story.meanwhile:
            if at == moment:
                await self.act(act)
        if moment == self.story.orphaned:
            await _if_open(self.order.workflow.terminate("as an operator would"))

    async def act(self, act: str) -> None:
        """What somebody does."""
        workflow = self.order.workflow
        match act:
            case "approve":
                self.approvals += await _if_open(workflow.signal("approve"), done=True) is True
            case "cancel":
                await _if_open(workflow.signal("cancel"))
            case "address":
                await _if_open(workflow.signal("address", OFFICE))
            case "cancel in Temporal":
                await _if_open(workflow.cancel())
            case "restart":
                await self.world.restart(forgetful=self.story.forgetful)
            case _:
                await self._update(act, *UPDATES[act])

    async def _update(self, act: str, update: Any, argument: Any) -> None:
        # Not awaited to its end: the activity from within which it is sent may be what it waits for. And the workflow
        # does not even hear of it as long as a local one runs.
        sending = asyncio.create_task(self._send_update(act, update, argument))
        if activity.in_activity() and activity.info().is_local:
            self.sending.append(sending)
        else:
            await sending

    async def _send_update(self, act: str, update: Any, argument: Any) -> None:
        handle = await _if_open(
            self.order.workflow.start_update(update, argument, wait_for_stage=WorkflowUpdateStage.ACCEPTED)
        )
        if handle is not None:
            self.updates.append((act, handle))

    async def live(self) -> Step:
        """From the first second to the end; returns the step in the tables."""
        await until(self._is_open, "the review to open")
        passed = 0.0
        for second, act in self.story.in_review:
            await asyncio.sleep(second - passed)
            passed = second
            await self.act(act)
        try:
            # Twice: an attempt may be lost with a worker that is stopped, and is then waited for.
            async with asyncio.timeout(2 * PATIENCE):
                await self._end()
        except TimeoutError:
            pytest.fail(f"it is stuck at {await self.order.status()}: {self.story}")
        await asyncio.gather(*self.sending)
        self.answers = [(act, await _accepted(handle)) for act, handle in self.updates]
        step, _ = await self.order.status()
        assert step is not None
        return step

    async def _is_open(self) -> bool:
        return (await self.order.status())[0] not in {None, Step.RECEIVED}

    async def _end(self) -> None:
        try:
            await self.order.workflow.result()
        except WorkflowFailureError:
            # Terminated: its shipment sees to the end, which is a failure, too, when nothing was shipped.
            with contextlib.suppress(WorkflowFailureError):
                await self.order.shipment.result()


async def _if_open(call: Any, *, done: Any = None) -> Any:
    """The call's answer, or `done` for one that has none; None if the workflow has ended."""
    try:
        return await call or done
    except RPCError as error:
        if error.status is RPCStatusCode.NOT_FOUND:
            return None
        raise
    except WorkflowUpdateFailedError:
        return None


async def _accepted(handle: WorkflowUpdateHandle[Decided]) -> bool:
    try:
        await handle.result()
    except (WorkflowUpdateFailedError, RPCError):
        return False
    return True


class World:
    """Workers and partners, for all stories."""

    def __init__(self, shop: Shop) -> None:
        self.partners = Partners()
        self.lives: dict[str, Life] = {}
        self.pool = shop.pool
        self._restarting = asyncio.Lock()
        # Two pairs of workers, each on its queues: ordinary ones, and such that keep no workflow in memory.
        self.shops = {forgetful: self._shop(shop, forgetful=forgetful) for forgetful in (False, True)}

    def _shop(self, shop: Shop, *, forgetful: bool) -> Shop:
        name = "forgetful" if forgetful else "ordinary"
        chosen = shop.settings.model_copy(
            update={
                "order_task_queue": f"{shop.settings.order_task_queue}-{name}",
                "shipping_task_queue": f"{shop.settings.shipping_task_queue}-{name}",
                "max_cached_workflows": 0 if forgetful else shop.settings.max_cached_workflows,
                "local_steps": not forgetful,
            }
        )
        return Shop(replace(shop.services, settings=chosen), shop.ledger)

    async def open(self) -> None:
        for shop in self.shops.values():
            await shop.open(parts=self._parts(shop))

    async def close(self) -> None:
        for shop in self.shops.values():
            await shop.close()

    async def restart(self, *, forgetful: bool) -> None:
        """Other workers, for every order that is on its way with these."""
        async with self._restarting:
            shop = self.shops[forgetful]
            await shop.close()
            await shop.open(parts=self._parts(shop))

    def _parts(self, shop: Shop) -> list[WorkerPart]:
        orders = OrderActivities(Orders(self))
        payments = PaymentActivities(PaymentRepository(self.pool), Provider(self))
        shipping = ShippingActivities(Shipments(self), Carrier(self))
        ordered, shipped = shop.parts()
        in_orders: list[Callable[..., Any]] = [
            orders.receive,
            orders.validate,
            orders.close,
            orders.change_address,
            orders.note,
            payments.charge,
            payments.refund,
        ]
        in_shipping: list[Callable[..., Any]] = [shipping.prepare, shipping.dispatch, shipping.recall]
        return [replace(ordered, activities=in_orders), replace(shipped, activities=in_shipping)]

    async def begin(self, story: Story) -> Life:
        """An order, just placed."""
        shop, unique = self.shops[story.forgetful], uuid.uuid4().hex[:12]
        life = Life(story, Order(f"o-{unique}", shop, f"pay-{unique}"), self)
        self.lives[life.order.id] = self.lives[life.order.payment_id] = life
        await shop.service.start(
            life.order.id,
            StartOrder(payment_id=life.order.payment_id, address=story.address, review_timeout_seconds=WINDOW),
        )
        return life

    async def audit(self, life: Life) -> list[str]:
        """What is wrong with it."""
        order, theirs = life.order, self.partners
        own = await books.read(self.pool, temporal=order.shop.client, orders=[order.id])
        return books.find_problems(
            replace(
                own,
                charges={key: [charge] for key, charge in theirs.charges.items() if key == order.payment_id},
                refunds={key: [refund] for key, refund in theirs.refunds.items() if key == order.payment_id},
                parcels={key: parcel for key, parcel in theirs.parcels.items() if key == order.id},
            )
        )


class Orders(OrderRepository):
    """The real one, with moments."""

    def __init__(self, world: World) -> None:
        super().__init__(world.pool)
        self._world = world

    async def receive(self, order: Any, run_id: str) -> None:
        life = self._world.lives[order.order_id]
        await life.comes("before receive")
        await super().receive(order, run_id)
        await life.comes("after receive")

    async def open_review(self, order: Any) -> None:
        life = self._world.lives[order.order_id]
        await life.comes("before validate")
        await super().open_review(order)
        await life.comes("after validate")

    async def close(self, request: Any, *, charging: bool = True) -> None:
        life = self._world.lives[request.order_id]
        await life.comes("before close")
        await super().close(request, charging=charging)
        await life.comes("after close")


class Shipments(ShipmentRepository):
    """The real one, with moments."""

    def __init__(self, world: World) -> None:
        super().__init__(world.pool)
        self._world = world

    async def prepare(self, order_id: str) -> None:
        life = self._world.lives[order_id]
        await life.comes("before prepare")
        await super().prepare(order_id)
        await life.comes("after prepare")


class Provider:
    """A payment provider that follows the story."""

    def __init__(self, world: World) -> None:
        self._world = world

    async def charge(self, payment_id: str, money: Money) -> Receipt:
        life, charges = self._world.lives[payment_id], self._world.partners.charges
        trouble = life.trouble("charge")
        await life.comes("before charge")
        if trouble == "unavailable":
            raise PaymentUnavailable("503")
        if life.story.declined and payment_id not in charges:
            raise PaymentDeclined("card_declined")
        charge = books.Charge(f"ch-{payment_id}", payment_id, payment_id, money.amount, money.currency)
        charges.setdefault(payment_id, charge)
        await life.comes("after charge")
        if trouble == "lost":
            raise PaymentUnavailable("ReadError")
        return Receipt(reference=charge.id, money=money)

    async def refund(self, payment_id: str, money: Money) -> Receipt:
        life, refunds = self._world.lives[payment_id], self._world.partners.refunds
        trouble = life.trouble("refund")
        await life.comes("before refund")
        if trouble == "unavailable":
            raise PaymentUnavailable("503")
        assert payment_id in self._world.partners.charges, "a refund without a charge"
        refund = refunds.setdefault(
            payment_id, books.Refund(f"re-{payment_id}", payment_id, money.amount, money.currency)
        )
        await life.comes("after refund")
        if trouble == "lost":
            raise PaymentUnavailable("ReadError")
        return Receipt(reference=refund.id, money=Money(amount=refund.amount, currency=refund.currency))

    async def find_charge(self, payment_id: str) -> Receipt | None:
        raise NotImplementedError

    async def find_refund(self, payment_id: str) -> Receipt | None:
        raise NotImplementedError


class Carrier:
    """A carrier that follows the story."""

    def __init__(self, world: World) -> None:
        self._world = world

    async def dispatch(self, order_id: str, address: Address | None) -> Handover:
        life, parcels = self._world.lives[order_id], self._world.partners.parcels
        trouble = life.trouble("dispatch")
        await life.comes("before dispatch")
        if trouble == "unavailable":
            raise CarrierUnavailable("503")
        if life.story.refused and order_id not in parcels:
            raise ShipmentRefused("undeliverable")
        sent_to = address.model_dump() if address else None
        parcel = parcels.setdefault(order_id, books.Parcel(order_id, "taken", f"trk-{order_id}", sent_to))
        await life.comes("after dispatch")
        if parcel.tracking is None:
            raise ShipmentRefused("recalled")
        if trouble == "lost":
            raise CarrierUnavailable("ReadError")
        return Handover(tracking=parcel.tracking)

    async def recall(self, order_id: str) -> Handover | None:
        life, parcels = self._world.lives[order_id], self._world.partners.parcels
        trouble = life.trouble("recall")
        await life.comes("before recall")
        if trouble == "unavailable":
            raise CarrierUnavailable("503")
        parcel = parcels.setdefault(order_id, books.Parcel(order_id, "recalled", None, None))
        await life.comes("after recall")
        return Handover(tracking=parcel.tracking) if parcel.tracking else None


@pytest.fixture(scope="module")
async def world(servers: Any, template: str) -> AsyncIterator[World]:
    """One world for all stories; orders do not disturb each other."""
    async with (
        fresh_settings(servers, template, dispatch_attempts=DISPATCH_ATTEMPTS) as chosen,
        open_shop(chosen, working=False) as shop,
    ):
        made = World(shop)
        with _soon():
            await made.open()
            yield made
            await made.close()


@contextlib.contextmanager
def _soon() -> Iterator[None]:
    """The real policies, with short pauses, and little patience where there is a limit; and workflows outside the
    sandbox, which is loaded anew for every workflow, and for every task of those that are kept nowhere."""

    def hurried(options: policies.ActivityOptions) -> policies.ActivityOptions:
        soon = RetryPolicy(
            initial_interval=timedelta(milliseconds=10),
            maximum_interval=timedelta(milliseconds=10),
        )
        # A task that the server gave to a worker which was just stopping is repeated after this time, not before.
        in_time = min(options["start_to_close_timeout"], timedelta(seconds=15))
        return options | {"retry_policy": soon, "start_to_close_timeout": in_time}

    with pytest.MonkeyPatch.context() as patch:
        for name in ("DATABASE", "PAYMENT", "DISPATCH", "RECALL"):
            patch.setattr(policies, name, hurried(getattr(policies, name)))
        patch.setattr("app.temporal.runner.runner", lambda **_: UnsandboxedWorkflowRunner())
        patch.setattr(policies, "RECALL_SILENCES", RECALL_ATTEMPTS)
        yield


# --- what must hold


@pytest.mark.timeout(60 * EXAMPLES or 300)
@settings(
    max_examples=EXAMPLES or 4,
    derandomize=not EXAMPLES,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
@given(stories=st.lists(_stories(), min_size=4, max_size=14))
@example(
    stories=[
        Story(),
        Story(in_review=()),
        Story(in_review=((0.1, "approve"), (0.1, "cancel"))),
        Story(dispatch=("unavailable", "lost"), recall=("unavailable", "unavailable")),
        Story(meanwhile=(("after dispatch", "cancel, answered"),)),
        Story(meanwhile=(("before dispatch", "cancel, answered"),), dispatch=("unavailable", "unavailable")),
        Story(orphaned="before dispatch", refused=True, refund=("lost",)),
        Story(orphaned="before dispatch", meanwhile=(("before prepare", "cancel"),)),
    ]
)
async def test_every_story_comes_to_one_right_end(world: World, stories: list[Story]) -> None:
    ends = await asyncio.gather(*(_lives_through(world, story) for story in stories), return_exceptions=True)
    for wrong in filter(None, ends):
        raise wrong


async def _lives_through(world: World, story: Story) -> None:
    life = await world.begin(story)
    end = await life.live()
    event(f"ends {end}")
    problems = await world.audit(life)
    assert not problems, f"{problems}\n{story}\n{await _timeline(life)}"
    _as_answered(life, end)
    await _as_told(life, end)


async def _timeline(life: Life) -> str:
    return books.as_text(await books.read(life.world.pool, orders=[life.order.id]), life.order.id)


def _as_answered(life: Life, end: Step) -> None:
    """An update that was taken is what happened."""
    for act, taken in life.answers:
        if act == "cancel, answered" and taken:
            assert end is not Step.SHIPPED
        if act == "reject" and taken:
            assert end in {Step.REJECTED, Step.CANCELLED}


async def _as_told(life: Life, end: Step) -> None:
    """Where nobody else interferes, approval and story decide the end."""
    story, events = life.story, await life.order.events()
    if "approve" not in story.acts:
        assert not life.calls["charge"]
    if any(act.startswith(("cancel", "reject")) for act in story.acts) or story.orphaned:
        return
    ignored = [event.type for event in events].count("approve_ignored")
    counted = life.approvals > ignored
    assert end is (_fate(story) if counted else Step.EXPIRED), f"{story}\n{await _timeline(life)}"


def _fate(story: Story) -> Step:
    if story.declined:
        return Step.PAYMENT_FAILED
    for trouble in (*story.dispatch, None)[:DISPATCH_ATTEMPTS]:
        if trouble == "unavailable":
            continue
        if story.refused:
            return Step.SHIPPING_FAILED
        if trouble is None or len(story.recall) < RECALL_ATTEMPTS:
            return Step.SHIPPED
    return Step.SHIPPING_FAILED
