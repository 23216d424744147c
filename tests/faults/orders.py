"""The customers, clerks and operators of a fault run: seeded orders, each with its own story, and what was promised."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from random import Random
from typing import Any, Final, Self

import httpx
from temporalio.client import Client
from temporalio.service import RPCError

from app.domain.steps import FINAL_STEPS

ADDRESS: Final = {"line1": "1 Main St", "city": "Springfield", "state": "IL", "zip": "62701"}

#: Seconds a caller keeps repeating a call that got no answer.
PATIENCE: Final = 90.0


@dataclass
class Promise:
    """What the API has said about one order."""

    order_id: str
    story: str
    accepted: bool = False
    #: 200 to `POST …/cancel`: nothing stays charged.
    cancelled: bool = False
    #: 200 to `POST …/review` with an approval: the order does not expire and is not rejected by the review.
    approved: bool = False
    #: An operator ended the workflow by force; any final step is right, as long as the books are.
    terminated: bool = False


@dataclass
class Customers:
    """Starts orders and acts on them. Everything random comes from one seeded source, in a fixed order."""

    url: str
    #: An API beside it that starts orders whose address is reviewed again when it changes after the approval.
    reviewing_url: str
    temporal: Client
    dice: Random
    prefix: str
    promises: dict[str, Promise] = field(default_factory=dict)
    answers: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    parked: list[str] = field(default_factory=list)
    _running: set[asyncio.Task[None]] = field(default_factory=set)
    _client: httpx.AsyncClient | None = None

    async def __aenter__(self) -> Self:
        limits = httpx.Limits(max_connections=200)
        self._client = httpx.AsyncClient(base_url=self.url, timeout=20, limits=limits, trust_env=False)
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)
        if self._client:
            await self._client.aclose()

    def begin(self, story: str | None = None) -> None:
        """Begin the next order's story, in the background."""
        name = story or self.dice.choices(list(STORIES), [weight for weight, _ in STORIES.values()])[0]
        number = len(self.promises) + 1
        promise = Promise(f"{self.prefix}-{number}", name)
        self.promises[promise.order_id] = promise
        dice = Random(self.dice.random())
        self.aside(self._live(STORIES[name][1], promise, dice))

    def aside(self, work: Coroutine[Any, Any, None]) -> None:
        """Something else that is done in the background, and waited for with the stories."""
        task = asyncio.create_task(work)
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def finished(self, seconds: float) -> None:
        """Wait until every story is told."""
        if self._running:
            await asyncio.wait(self._running, timeout=seconds)

    async def _live(self, story: Story, promise: Promise, dice: Random) -> None:
        try:
            await story(self, promise, dice)
        except TimeoutError:
            self.answers["gave up"] += 1
        except Exception as error:  # noqa: BLE001 - a story that breaks off proves nothing, and must not go unseen
            self.wrong.append(f"{promise.order_id}: the story {promise.story} broke off: {error!r}")

    # --- calls, repeated until somebody answers

    async def call(self, method: str, path: str, body: Any = None, *, base: str = "") -> int:
        """The status of an answer that is one: refused connections, lost replies and 503 are asked again."""
        assert self._client
        deadline, pause = time.monotonic() + PATIENCE, 0.2
        while True:
            try:
                response = await self._client.request(method, base + path, json=body)
            except httpx.HTTPError as error:
                self.answers[type(error).__name__] += 1
            else:
                self.answers[str(response.status_code)] += 1
                if response.status_code == 500:
                    self.wrong.append(f"500 to {method} {path}: {response.text[:200]}")
                if response.status_code not in {500, 503}:
                    return response.status_code
            if time.monotonic() > deadline:
                raise TimeoutError(path)
            await asyncio.sleep(pause)
            pause = min(pause * 2, 3.0)

    async def start(self, promise: Promise, payment_id: str | None = None, *, base: str = "", **more: Any) -> int:
        """`POST …/start`, with a generous review unless the story names its own."""
        body = {"payment_id": payment_id or f"pay-{promise.order_id}", "review_timeout_seconds": 60} | more
        status = await self.call("POST", f"/orders/{promise.order_id}/start", body, base=base)
        promise.accepted = promise.accepted or status == 202
        return status

    async def signal(self, promise: Promise, name: str, body: Any = None) -> int:
        """`POST …/signals/{name}`."""
        return await self.call("POST", f"/orders/{promise.order_id}/signals/{name}", body)

    async def review(self, promise: Promise, decision: str) -> int:
        """`POST …/review`, answered."""
        status = await self.call("POST", f"/orders/{promise.order_id}/review", {"decision": decision})
        promise.approved = promise.approved or (status == 200 and decision == "approve")
        return status

    async def cancel(self, promise: Promise) -> int:
        """`POST …/cancel`, answered."""
        status = await self.call("POST", f"/orders/{promise.order_id}/cancel", {})
        promise.cancelled = promise.cancelled or status == 200
        return status

    async def until(self, promise: Promise, *steps: str, seconds: float = 60) -> str:
        """Wait until the order is at one of the steps."""
        found = await self._seen(f"/orders/{promise.order_id}/status", lambda it: it.get("step") in steps, seconds)
        return str(found["step"])

    async def reviewed_again(self, promise: Promise, *, seconds: float = 90) -> bool:
        """Whether the order, which was approved, comes to another review; else it has ended or is being shipped."""
        past = {"prepared", *FINAL_STEPS}
        found = await self._seen(
            f"/orders/{promise.order_id}", lambda it: it.get("reopened_for") or it.get("step") in past, seconds
        )
        return bool(found.get("reopened_for"))

    async def _seen(self, path: str, enough: Callable[[dict[str, Any]], object], seconds: float) -> dict[str, Any]:
        """Ask until the answer is enough."""
        assert self._client
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            try:
                response = await self._client.get(path)
                found = response.json() if response.status_code == 200 else {}
            except (httpx.HTTPError, ValueError):
                found = {}
            if enough(found):
                return dict(found)
            await asyncio.sleep(0.3)
        raise TimeoutError(path)


Story = Callable[[Customers, Promise, Random], Awaitable[None]]

# --- the stories


async def plain(customers: Customers, promise: Promise, dice: Random) -> None:
    """Start, approve - before or after the review opens - and ship."""
    address = dice.choice([None, ADDRESS, ADDRESS | {"zip": "00001"}, ADDRESS | {"zip": "00004"}])
    items = [
        {
            "sku": "TEA-100",
            "quantity": dice.randint(1, 9),
            "unit_price": f"{dice.randint(1, 99)}.{dice.randint(10, 99)}",
        }
    ]
    await customers.start(promise, address=address, items=items, currency=dice.choice(["USD", "EUR"]))
    await asyncio.sleep(dice.random() * 0.5)
    if dice.random() < 0.5:
        await customers.signal(promise, "approve")
    else:
        await customers.review(promise, "approve")


def paying(kind: str) -> Story:
    """Like `plain`, with one of the provider's magic payment ids."""

    async def story(customers: Customers, promise: Promise, dice: Random) -> None:
        await customers.start(promise, payment_id=f"pay-{kind}-{promise.order_id}")
        await customers.signal(promise, "approve")

    return story


async def impatient(customers: Customers, promise: Promise, dice: Random) -> None:
    """Approves again and again; only the first one counts, and the timeline tells of the others."""
    await customers.start(promise)
    for _ in range(3):
        await customers.signal(promise, "approve")


async def expire(customers: Customers, promise: Promise, dice: Random) -> None:
    """Nobody decides; then somebody does, too late."""
    await customers.start(promise, review_timeout_seconds=1)
    await asyncio.sleep(1 + dice.random())
    await customers.signal(promise, "approve")


async def reject(customers: Customers, promise: Promise, dice: Random) -> None:
    """The clerk says no."""
    await customers.start(promise)
    await customers.review(promise, "reject")


async def cancel_early(customers: Customers, promise: Promise, dice: Random) -> None:
    """Cancelled before anybody decided."""
    await customers.start(promise)
    await asyncio.sleep(dice.random() * 0.3)
    await customers.signal(promise, "cancel")


async def cancel_charge(customers: Customers, promise: Promise, dice: Random) -> None:
    """Cancelled while the provider thinks about the charge."""
    kind = dice.choice(["pay-slow", "pay-refund-flaky", "pay-refund-lost", "pay-lost"])
    await customers.start(promise, payment_id=f"{kind}-{promise.order_id}", address=ADDRESS | {"zip": "00003"})
    await customers.signal(promise, "approve")
    await customers.until(promise, "charging", "charged", "prepared", "shipped", "cancelled")
    await asyncio.sleep(dice.random())
    if dice.random() < 0.5:
        await customers.cancel(promise)
    else:
        await customers.signal(promise, "cancel")


async def cancel_shipping(customers: Customers, promise: Promise, dice: Random) -> None:
    """Cancelled while the carrier thinks about the parcel, or cannot be reached."""
    await customers.start(promise, address=ADDRESS | {"zip": dice.choice(["00003", "00001", "00006"])})
    await customers.signal(promise, "approve")
    await customers.until(promise, "prepared", "shipped")
    await asyncio.sleep(dice.random() * 3)
    await customers.signal(promise, "cancel")


async def undeliverable(customers: Customers, promise: Promise, dice: Random) -> None:
    """The carrier will never take it."""
    await customers.start(promise, address=ADDRESS | {"zip": "00002"})
    await customers.signal(promise, "approve")


async def move_house(customers: Customers, promise: Promise, dice: Random) -> None:
    """The address changes, and changes again, while the order goes on."""
    await customers.start(promise, address=ADDRESS)
    path = f"/orders/{promise.order_id}/address"
    await asyncio.gather(
        customers.signal(promise, "address", ADDRESS | {"line1": "2 Elm St"}),
        customers.call("PUT", path, ADDRESS | {"line1": "3 Oak St"}),
        customers.signal(promise, "approve"),
    )
    await customers.call("PUT", path, ADDRESS | {"line1": "4 Fir St"})


async def second_review(customers: Customers, promise: Promise, dice: Random) -> None:
    """The address changes after the approval, where that asks for another review; the clerk decides once more."""
    slow = f"pay-slow-{promise.order_id}"
    await customers.start(
        promise, payment_id=slow, address=ADDRESS, review_timeout_seconds=120, base=customers.reviewing_url
    )
    # Signals: unlike updates they need no worker that answers, and so both are there while the charge is made.
    await customers.signal(promise, "approve")
    await customers.signal(promise, "address", ADDRESS | {"line1": "5 Ash St"})
    if not await customers.reviewed_again(promise):
        return
    if dice.random() < 0.7:
        await customers.signal(promise, "approve")
    else:
        await customers.review(promise, dice.choice(["approve", "reject"]))


async def duel(customers: Customers, promise: Promise, dice: Random) -> None:
    """Approval, cancellation, address and the timer, all at once."""
    await customers.start(promise, review_timeout_seconds=1)
    await asyncio.sleep(0.7 + dice.random() * 0.6)
    calls: list[Awaitable[int]] = [
        customers.review(promise, "approve"),
        customers.signal(promise, "approve"),
        customers.signal(promise, "address", ADDRESS),
    ]
    if dice.random() < 0.7:
        calls.append(customers.cancel(promise))
    dice.shuffle(calls)
    await asyncio.gather(*calls)


async def crowd(customers: Customers, promise: Promise, dice: Random) -> None:
    """Fifty starts of one order at the same moment, every third with another request."""
    bodies: list[dict[str, Any]] = [{} if number % 3 else {"currency": "EUR"} for number in range(50)]
    dice.shuffle(bodies)
    statuses = await asyncio.gather(*(customers.start(promise, **body) for body in bodies))
    winners = {bodies[number].get("currency") for number, status in enumerate(statuses) if status == 202}
    if len(winners) > 1 or not set(statuses) <= {202, 409}:
        customers.wrong.append(f"{promise.order_id}: 50 starts got {Counter(statuses)}, accepted {winners}")
    await customers.signal(promise, "approve")


async def same_payment(customers: Customers, promise: Promise, dice: Random) -> None:
    """Two orders with one payment id: at most one of them is charged."""
    other = Promise(f"{promise.order_id}-b", promise.story)
    customers.promises[other.order_id] = other
    payment_id = f"pay-{promise.order_id}"
    await asyncio.gather(*(customers.start(one, payment_id=payment_id) for one in (promise, other)))
    await asyncio.gather(*(customers.signal(one, "approve") for one in (promise, other) if one.accepted))


async def terminated(customers: Customers, promise: Promise, dice: Random) -> None:
    """An operator ends the workflow by force, anywhere between the start and the parcel's handover."""
    zip_code = dice.choice(["00003", "00002", "62701"])
    payment_id = f"{dice.choice(['pay-slow', 'pay'])}-{promise.order_id}"
    await customers.start(promise, payment_id=payment_id, address=ADDRESS | {"zip": zip_code})
    when = dice.choice(["at once", "awaiting_review", "charging", "charged", "prepared"])
    if when not in {"at once", "awaiting_review"}:
        await customers.signal(promise, "approve")
    if when != "at once":
        await customers.until(promise, when, "prepared", "shipped", "shipping_failed")
    promise.terminated = True
    try:
        await customers.temporal.get_workflow_handle(f"order/{promise.order_id}").terminate("by the fault run")
    except RPCError:
        pass  # it was too late, or Temporal is down: then it simply goes on


async def park(customers: Customers, promise: Promise, dice: Random) -> None:
    """Waits in review until the workers have been changed under it."""
    await customers.start(promise, review_timeout_seconds=600)
    customers.parked.append(promise.order_id)


#: The stories that lead to the failpoints of an activity.
LEADS_TO: Final = {
    "receive": ("reject",),
    "validate": ("reject",),
    "close": ("reject", "cancel_early"),
    "change_address": ("move_house",),
    "reopen_review": ("second_review",),
    "settle_review": ("second_review",),
    "note": ("impatient",),
    "charge": ("plain", "pay-decline"),
    "refund": ("undeliverable", "cancel_charge"),
    "prepare": ("plain",),
    "dispatch": ("plain",),
    "recall": ("undeliverable", "cancel_shipping"),
}

#: Every story with its share.
STORIES: Final[dict[str, tuple[float, Story]]] = {
    "plain": (24, plain),
    "pay-flaky": (4, paying("flaky")),
    "pay-lost": (4, paying("lost")),
    "pay-slow": (2, paying("slow")),
    "pay-decline": (5, paying("decline")),
    "impatient": (5, impatient),
    "expire": (5, expire),
    "reject": (4, reject),
    "cancel_early": (5, cancel_early),
    "cancel_charge": (11, cancel_charge),
    "cancel_shipping": (11, cancel_shipping),
    "undeliverable": (5, undeliverable),
    "move_house": (8, move_house),
    "second_review": (5, second_review),
    "duel": (5, duel),
    "crowd": (0.5, crowd),
    "same_payment": (2, same_payment),
    "terminated": (4, terminated),
    "park": (2, park),
}
