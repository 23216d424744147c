"""Activities, one attempt after another: what each writes, and that a repeat from any point adds nothing.

Payments run twice, against a database that is a few dictionaries behind asyncpg's interface and against PostgreSQL:
the first shows that nothing but the statements counts, the second that PostgreSQL agrees.
"""

from __future__ import annotations

import asyncio
import copy
import dataclasses
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Protocol

import asyncpg
import pytest
from temporalio.testing import ActivityEnvironment

from app.db import timeline
from app.db.pool import _prepare_connection
from app.domain.money import Money
from app.domain.steps import Step
from app.errors import (
    CarrierUnavailable,
    IllegalTransition,
    OrderNotFound,
    OrderRejected,
    PaymentConflict,
    PaymentDeclined,
    PaymentUnavailable,
    RefundRefused,
    ShipmentRefused,
    TooLate,
    TrellisError,
)
from app.order import repository as order_sql
from app.order.activities import OrderActivities
from app.order.models import AddressChange, CloseOrder, NoteRequest, OrderInput, StartOrder, address_digest
from app.order.repository import OrderRepository
from app.payment import repository as payment_sql
from app.payment.activities import PaymentActivities
from app.payment.gateway import Receipt, refund_key
from app.payment.models import ChargeRequest, RefundRequest
from app.payment.repository import PaymentRepository
from app.shipping import repository as shipping_sql
from app.shipping.activities import ShippingActivities
from app.shipping.carrier import Handover
from app.shipping.models import Address, Shipment
from app.shipping.repository import ShipmentRepository
from app.temporal.interceptors import translate
from tests import databases

if TYPE_CHECKING:
    pass

PRICE = Money(amount=Decimal("19.90"), currency="USD")
HOME = Address(line1="1 Main St", city="Springfield", state="IL", zip="62701")
OFFICE = Address(line1="2 High St", city="Shelbyville", state="IL", zip="62565")


# --- the point at which a process is gone -------------------------------------------------------------------


class Crash(Exception):
    """The process is gone before this step"""


class Steps:
    """What an activity did to the world, in order, and where it is made to break off."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self._left: int | None = None

    def before(self, step: str) -> None:
        if self._left == 0:
            self._left = None
            raise Crash(step)
        if self._left is not None:
            self._left -= 1
        self.done.append(step)

    @contextmanager
    def statement(self, name: str | None, in_transaction: Callable[[], bool]) -> Iterator[None]:
        """A statement with this name, while the block runs it. None: it is no step.

        The reply to what ended a transaction - `COMMIT`, or a statement that is all there is of one - is a step of its
        own: before the first nothing has happened, and before the second all of it, and nobody was told.
        """
        if name is None:
            yield
            return
        self.before(name)
        yield
        if name not in NOTHING_TO_COMMIT and not in_transaction():
            self.before(reply_to(name))

    def crash_after(self, steps: int) -> None:
        self._left = steps

    def crash_never(self) -> None:
        self._left = None

    @contextmanager
    def listed(self) -> Iterator[list[str]]:
        """The steps of the block, known when it has ended."""
        self.done.clear()
        listed: list[str] = []
        yield listed
        listed += self.done


async def crash_everywhere(
    steps: Steps, attempt: Callable[[int], Awaitable[Any]], check: Callable[[int, Any], Awaitable[None]]
) -> list[str]:
    """For every step of `attempt`: crash before it, twice, then repeat undisturbed and check the outcome.

    Each round works on an order of its own, told by number. Returns the steps that were crashed at.
    """
    crashed: list[str] = []
    for number in range(100):
        before = len(crashed)
        for _ in range(2):
            steps.crash_after(number)
            try:
                await attempt(number)
            except Crash as crash:
                crashed.append(str(crash))
        steps.crash_never()
        if len(crashed) == before:
            return crashed
        await check(number, await attempt(number))
    raise AssertionError("it has more steps than were expected")


# --- two databases ------------------------------------------------------------------------------------------


class Database(Protocol):
    """What the tests ask of a database, PostgreSQL or not."""

    pool: Any

    async def put_order(self, order_id: str, state: Step = Step.AWAITING_REVIEW) -> None: ...
    async def order(self, order_id: str) -> tuple[str, str | None]: ...
    async def payment(self, payment_id: str) -> tuple[str, str, Decimal] | None: ...
    async def told(self, order_id: str) -> list[str]: ...
    async def open_transactions(self) -> int: ...


#: Statements outside a transaction that leave nothing behind.
NOTHING_TO_COMMIT = {"read payment", "ROLLBACK"}

LOCK_ORDER = "SELECT FROM orders WHERE id = $1 FOR NO KEY UPDATE"


def reply_to(name: str) -> str:
    """The step between what a statement has done and the news of it."""
    return f"reply to {name}"


def named(query: str, args: tuple[Any, ...]) -> str | None:
    """A name for a statement that tests speak of."""
    if query.rstrip(";") in {"BEGIN", "COMMIT", "ROLLBACK"}:
        return query.rstrip(";")
    return {
        LOCK_ORDER: "lock order",
        order_sql._OPEN_REVIEW: "open review, enter awaiting_review",
        payment_sql._CLAIM_AND_ENTER: "payment INIT, enter charging",
        payment_sql._SETTLE_AND_ENTER: "payment CHARGED, enter charged",
        shipping_sql._TAKEN: "tracking, enter shipped",
        payment_sql._CLAIM: "payment INIT",
        payment_sql._LOCK: "read payment",
        payment_sql._LOOK: "read payment",
        payment_sql._CHARGED: "payment CHARGED",
        payment_sql._FAILED: "payment FAILED",
        payment_sql._REFUNDED: "payment REFUNDED",
        timeline._ENTER: f"enter {args[1]}" if len(args) > 1 else "",
        timeline._RECORD: f"tell {args[1]}" if len(args) > 1 else "",
    }.get(query)


@dataclass
class Rows:
    """The content of the mocked database."""

    orders: dict[str, dict[str, Any]] = field(default_factory=dict)
    payments: dict[str, dict[str, Any]] = field(default_factory=dict)
    events: list[tuple[str, str, str]] = field(default_factory=list)


class MockedDatabase:
    """Dictionaries behind the part of asyncpg's pool that payments use: one transaction at a time, all or nothing.

    As in PostgreSQL, a statement that is given to the pool is a transaction of its own.
    """

    def __init__(self, steps: Steps) -> None:
        self.pool = self
        self.rows = Rows()
        self.steps = steps
        self.in_transaction = False
        self._turn = asyncio.Lock()

    # asyncpg's side

    @asynccontextmanager
    async def acquire(self) -> AsyncIterator[MockedConnection]:
        await asyncio.sleep(0)
        yield MockedConnection(self)

    async def execute(self, query: str, *args: Any) -> Any:
        with self.steps.statement(named(query, args), lambda: False):
            async with self.all_or_nothing():
                return await self.run(query, args)

    fetchrow = fetchval = execute

    @asynccontextmanager
    async def all_or_nothing(self) -> AsyncIterator[None]:
        """One transaction; the next one waits for its end."""
        async with self._turn:
            before, self.in_transaction = copy.deepcopy(self.rows), True
            try:
                yield
            except BaseException:
                self.rows = before
                raise
            finally:
                self.in_transaction = False

    async def run(self, query: str, args: tuple[Any, ...]) -> Any:
        """What the statement does. One that is not known here is a test's mistake, or news to it."""
        await asyncio.sleep(0)
        return {
            LOCK_ORDER: self._lock,
            payment_sql._CLAIM_AND_ENTER: self._claim_and_enter,
            payment_sql._SETTLE_AND_ENTER: self._settle_and_enter,
            payment_sql._CLAIM: self._claim,
            payment_sql._LOCK: self._payment,
            payment_sql._LOOK: self._payment,
            payment_sql._CHARGED: self._settle("INIT", "CHARGED"),
            payment_sql._FAILED: self._settle("INIT", "FAILED"),
            payment_sql._REFUNDED: self._settle("CHARGED", "REFUNDED"),
            timeline._ENTER: self._enter,
            timeline._ENTERED_BEFORE: self._happened,
            timeline._RECORD: self._record,
            "SELECT state FROM orders WHERE id = $1": lambda order_id: self.rows.orders[order_id]["state"],
        }[query](*args)

    def _lock(self, order_id: str) -> str:
        """Nothing to do: there is one transaction at a time."""
        return f"SELECT {int(order_id in self.rows.orders)}"

    def _claim_and_enter(
        self, order_id: str, step: Step, before: list[Step], payload: dict[str, Any], error: str | None, *claim: Any
    ) -> dict[str, Any] | None:
        payment_id, asked, currency = claim
        order = self.rows.orders.get(order_id)
        if order is None or order["state"] not in before:
            return None
        if self._claim(payment_id, order_id, asked, currency) == "INSERT 0 0":
            return None
        return self._enter(order_id, step, before, payload, error)

    def _settle_and_enter(
        self, order_id: str, step: Step, before: list[Step], payload: dict[str, Any], error: str | None, *charged: Any
    ) -> dict[str, Any] | None:
        moved = self._enter(order_id, step, before, payload, error)
        if moved:
            self._settle("INIT", "CHARGED")(*charged)
        return moved

    def _claim(self, payment_id: str, order_id: str, asked: Decimal, currency: str) -> str:
        taken = {payment["order_id"] for payment in self.rows.payments.values()}
        if payment_id in self.rows.payments or order_id in taken:
            return "INSERT 0 0"
        self.rows.payments[payment_id] = {
            "order_id": order_id,
            "status": "INIT",
            "amount": Decimal(0),
            "asked": asked,
            "currency": currency,
            "provider_reference": None,
        }
        return "INSERT 0 1"

    def _payment(self, payment_id: str) -> dict[str, Any] | None:
        payment = self.rows.payments.get(payment_id)
        return payment and {**payment, "state": self.rows.orders[payment["order_id"]]["state"]}

    def _settle(self, before: str, after: str) -> Callable[..., str]:
        def settle(payment_id: str, *facts: Any) -> str:
            payment = self.rows.payments.get(payment_id)
            if payment is None or payment["status"] != before:
                return "UPDATE 0"
            payment["status"] = after
            if after == "CHARGED":
                payment["amount"], payment["provider_reference"] = facts
            return "UPDATE 1"

        return settle

    def _enter(
        self, order_id: str, step: Step, before: list[Step], _payload: dict[str, Any], error: str | None
    ) -> dict[str, Any] | None:
        order = self.rows.orders.get(order_id)
        if order is None or order["state"] not in before:
            return None
        left = order["state"]
        order.update(state=step, last_error=error)
        self.rows.events.append((order_id, step, step))
        return {"left_step": left, "seconds": 0.0}

    def _happened(self, order_id: str, key: str) -> bool:
        return any((order_id, key) == (event[0], event[2]) for event in self.rows.events)

    def _record(self, order_id: str, event: str, _payload: dict[str, Any], key: str) -> None:
        if order_id in self.rows.orders and not self._happened(order_id, key):
            self.rows.events.append((order_id, event, key))

    # the tests' side

    async def put_order(self, order_id: str, state: Step = Step.AWAITING_REVIEW) -> None:
        self.rows.orders[order_id] = {"state": state, "last_error": None}

    async def order(self, order_id: str) -> tuple[str, str | None]:
        return self.rows.orders[order_id]["state"], self.rows.orders[order_id]["last_error"]

    async def payment(self, payment_id: str) -> tuple[str, str, Decimal] | None:
        payment = self.rows.payments.get(payment_id)
        return payment and (payment["order_id"], payment["status"], payment["amount"])

    async def told(self, order_id: str) -> list[str]:
        return [event[1] for event in self.rows.events if event[0] == order_id]

    async def open_transactions(self) -> int:
        return int(self.in_transaction)


class MockedConnection:
    """A connection of the mocked pool. Whatever is asked of it here is asked in a transaction."""

    def __init__(self, database: MockedDatabase) -> None:
        self._database = database
        self._in_transaction = False

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[None]:
        steps = self._database.steps
        async with self._database.all_or_nothing():
            steps.before("BEGIN")
            self._in_transaction = True
            try:
                yield
                steps.before("COMMIT")
            finally:
                self._in_transaction = False
        steps.before(reply_to("COMMIT"))

    async def execute(self, query: str, *args: Any) -> Any:
        assert self._in_transaction, query
        with self._database.steps.statement(named(query, args), lambda: True):
            return await self._database.run(query, args)

    fetchrow = fetchval = execute


class RealDatabase:
    """PostgreSQL; the pool's connections tell `Steps` of every statement before they run it, and of its reply."""

    def __init__(self, pool: asyncpg.Pool, onlooker: asyncpg.Pool) -> None:
        self.pool = pool
        self._onlooker = onlooker

    async def put_order(self, order_id: str, state: Step = Step.AWAITING_REVIEW) -> None:
        await self._onlooker.execute(
            "INSERT INTO orders (id, state, review_deadline) VALUES ($1, $2, now())", order_id, state
        )

    async def order(self, order_id: str) -> tuple[str, str | None]:
        row = await self._onlooker.fetchrow("SELECT state, last_error FROM orders WHERE id = $1", order_id)
        return row["state"], row["last_error"]

    async def payment(self, payment_id: str) -> tuple[str, str, Decimal] | None:
        row = await self._onlooker.fetchrow(
            "SELECT order_id, status, amount FROM payments WHERE payment_id = $1", payment_id
        )
        return row and tuple(row)

    async def told(self, order_id: str) -> list[str]:
        rows = await self._onlooker.fetch("SELECT type FROM events WHERE order_id = $1 ORDER BY id", order_id)
        return [row["type"] for row in rows]

    async def open_transactions(self) -> int:
        return await self._onlooker.fetchval(
            "SELECT count(*) FROM pg_stat_activity "
            "WHERE datname = current_database() AND pid <> pg_backend_pid() AND xact_start IS NOT NULL "
            "AND backend_type = 'client backend'"
        )


def watched(steps: Steps) -> type[asyncpg.Connection]:
    """A connection that tells `steps` of the statements it is about to run, and of the replies that come back."""

    class Watched(asyncpg.Connection):
        async def execute(self, query: str, *args: Any, **options: Any) -> str:
            with steps.statement(named(query, args), self.is_in_transaction):
                return await super().execute(query, *args, **options)

        async def fetchrow(self, query: str, *args: Any, **options: Any) -> Any:
            with steps.statement(named(query, args), self.is_in_transaction):
                return await super().fetchrow(query, *args, **options)

        async def fetchval(self, query: str, *args: Any, **options: Any) -> Any:
            with steps.statement(named(query, args), self.is_in_transaction):
                return await super().fetchval(query, *args, **options)

    return Watched


@asynccontextmanager
async def real_database(url: str, steps: Steps) -> AsyncIterator[RealDatabase]:
    pool = asyncpg.create_pool(url, min_size=0, max_size=20, init=_prepare_connection, connection_class=watched(steps))
    async with asyncpg.create_pool(url, min_size=1, max_size=1) as onlooker, pool:
        yield RealDatabase(pool, onlooker)


@pytest.fixture
def steps() -> Steps:
    return Steps()


@pytest.fixture
def mocked(steps: Steps) -> MockedDatabase:
    return MockedDatabase(steps)


@pytest.fixture
async def database_url(shared_database: str) -> AsyncIterator[str]:
    """A migrated database without orders."""
    yield shared_database
    await databases.empty(shared_database)


@pytest.fixture
async def postgresql(database_url: str, steps: Steps) -> AsyncIterator[RealDatabase]:
    async with real_database(database_url, steps) as real:
        yield real


@pytest.fixture(params=["mocked", "postgresql"])
def database(request: pytest.FixtureRequest) -> Database:
    return request.getfixturevalue(request.param)


# --- partners, with books of their own ----------------------------------------------------------------------


class Provider:
    """A payment provider that is idempotent by key, as `PaymentGateway` demands, and counts what really moved."""

    def __init__(self, steps: Steps, database: Database) -> None:
        self.taken: list[str] = []
        self.returned: list[str] = []
        self.calls: list[str] = []
        self.refusal: TrellisError | None = None
        self.transactions_seen: set[int] = set()
        self._steps = steps
        self._database = database

    async def charge(self, payment_id: str, money: Money) -> Receipt:
        return await self._move("ch", self.taken, payment_id, money)

    async def refund(self, payment_id: str, money: Money) -> Receipt:
        return await self._move("re", self.returned, refund_key(payment_id), money)

    async def _move(self, prefix: str, books: list[str], key: str, money: Money) -> Receipt:
        self._steps.before("provider is asked")
        self.calls.append(key)
        self.transactions_seen.add(await self._database.open_transactions())
        if self.refusal:
            raise self.refusal
        if key not in books:
            books.append(key)
        self._steps.before("provider answers")
        return Receipt(reference=f"{prefix}_{key}", money=money)

    async def find_charge(self, payment_id: str) -> Receipt | None:
        raise NotImplementedError

    async def find_refund(self, payment_id: str) -> Receipt | None:
        raise NotImplementedError


class Truck:
    """A carrier: the first of dispatch and recall decides, and both are safe to repeat."""

    def __init__(self, steps: Steps) -> None:
        self.taken: dict[str, Address | None] = {}
        self.recalled: set[str] = set()
        self.down = False
        self._steps = steps

    async def dispatch(self, order_id: str, address: Address | None) -> Handover:
        self._steps.before("carrier is asked")
        if self.down:
            raise CarrierUnavailable("503")
        if order_id in self.recalled:
            raise ShipmentRefused("recalled")
        self.taken.setdefault(order_id, address)
        self._steps.before("carrier answers")
        return Handover(tracking=f"tr_{order_id}")

    async def recall(self, order_id: str) -> Handover | None:
        self._steps.before("carrier is asked")
        if self.down:
            raise CarrierUnavailable("503")
        if order_id not in self.taken:
            self.recalled.add(order_id)
        self._steps.before("carrier answers")
        return Handover(tracking=f"tr_{order_id}") if order_id in self.taken else None


def run(activity: Callable[..., Awaitable[Any]], argument: Any, *, activity_id: str = "1") -> Awaitable[Any]:
    """One attempt of an activity."""
    environment = ActivityEnvironment()
    environment.info = dataclasses.replace(environment.info, activity_id=activity_id, workflow_run_id="run-1")
    return environment.run(activity, argument)


# --- charge -------------------------------------------------------------------------------------------------


@pytest.fixture
def provider(steps: Steps, database: Database) -> Provider:
    return Provider(steps, database)


@pytest.fixture
def payments(database: Database, provider: Provider) -> PaymentActivities:
    return PaymentActivities(PaymentRepository(database.pool), provider)


def charge_of(order_id: str, payment_id: str | None = None, money: Money = PRICE) -> ChargeRequest:
    return ChargeRequest(order_id=order_id, payment_id=payment_id or f"pay-{order_id}", money=money)


def refund_of(order_id: str, close_as: Step = Step.CANCELLED, payment_id: str | None = None) -> RefundRequest:
    return RefundRequest(
        order_id=order_id,
        payment_id=payment_id or f"pay-{order_id}",
        money=PRICE,
        close_as=close_as,
        reason="changed their mind",
    )


def alone(statement: str) -> list[str]:
    """The steps of a statement that is a transaction of its own."""
    return [statement, reply_to(statement)]


def together(*statements: str) -> list[str]:
    """The steps of statements that share a transaction."""
    return ["BEGIN", *statements, *alone("COMMIT")]


ASK = ["provider is asked", "provider answers"]
BEGIN_CHARGE = alone("payment INIT, enter charging")
CHARGE = [*BEGIN_CHARGE, *ASK, *alone("payment CHARGED, enter charged")]
#: What an attempt does that is not the first: the id is known, so it looks what became of it.
RESUME = [*BEGIN_CHARGE, *together("lock order", "payment INIT", "read payment", "enter charging")]
RESUMED_CHARGE = [*RESUME, *ASK, *alone("payment CHARGED, enter charged")]
FAIL_CHARGE = together("enter payment_failed", "payment FAILED")
REFUND = ["read payment", *ASK, *together("tell refunded", "payment REFUNDED", "enter cancelled")]


async def test_charge_claims_then_asks_then_writes_down(
    database: Database, payments: PaymentActivities, provider: Provider, steps: Steps
) -> None:
    await database.put_order("o-1")
    with steps.listed() as listed:
        receipt = await run(payments.charge, charge_of("o-1"))
    assert listed == CHARGE
    assert receipt.money == PRICE
    assert await database.payment("pay-o-1") == ("o-1", "CHARGED", PRICE.amount)
    assert await database.order("o-1") == (Step.CHARGED, None)
    assert await database.told("o-1") == ["charging", "charged"]


async def test_no_transaction_is_open_while_the_provider_is_asked(
    database: Database, payments: PaymentActivities, provider: Provider
) -> None:
    await database.put_order("o-1")
    await run(payments.charge, charge_of("o-1"))
    await run(payments.refund, refund_of("o-1"))
    assert provider.calls == ["pay-o-1", "pay-o-1:refund"]
    assert provider.transactions_seen == {0}


async def test_charge_twice_asks_the_provider_once(
    database: Database, payments: PaymentActivities, provider: Provider, steps: Steps
) -> None:
    await database.put_order("o-1")
    first = await run(payments.charge, charge_of("o-1"))
    with steps.listed() as listed:
        assert await run(payments.charge, charge_of("o-1")) == first
    assert listed == RESUME
    assert provider.calls == ["pay-o-1"]
    assert await database.told("o-1") == ["charging", "charged"]


async def test_charge_survives_a_crash_at_every_step(
    database: Database, payments: PaymentActivities, provider: Provider, steps: Steps
) -> None:
    # The second attempt of each round is not the first any more: it may crash later than that has steps.
    for number in range(len(RESUMED_CHARGE) + 1):
        await database.put_order(f"o-{number}")
    crashed = await charge_crashing_everywhere(database, payments, provider, steps)
    assert set(crashed) == {*CHARGE, *RESUME}


async def test_resumed_charge_survives_a_crash_at_every_step(
    database: Database, payments: PaymentActivities, provider: Provider, steps: Steps
) -> None:
    """The payment id was claimed and nobody knows what became of it: the way of every later attempt."""
    for number in range(len(RESUMED_CHARGE) + 1):
        await database.put_order(f"o-{number}")
        steps.crash_after(CHARGE.index("provider is asked"))
        with pytest.raises(Crash, match="provider is asked"):
            await run(payments.charge, charge_of(f"o-{number}"))
    crashed = await charge_crashing_everywhere(database, payments, provider, steps)
    assert set(crashed) == set(RESUMED_CHARGE)


async def charge_crashing_everywhere(
    database: Database, payments: PaymentActivities, provider: Provider, steps: Steps
) -> list[str]:
    """Crash the charges of the orders that were put down; each is charged once and told once in the end."""

    async def attempt(number: int) -> Receipt:
        return await run(payments.charge, charge_of(f"o-{number}"))

    async def check(number: int, receipt: Receipt) -> None:
        order_id, payment_id = f"o-{number}", f"pay-o-{number}"
        assert receipt == Receipt(reference=f"ch_{payment_id}", money=PRICE)
        assert provider.taken.count(payment_id) == 1
        assert await database.payment(payment_id) == (order_id, "CHARGED", PRICE.amount)
        assert await database.order(order_id) == (Step.CHARGED, None)
        assert await database.told(order_id) == ["charging", "charged"]

    return await crash_everywhere(steps, attempt, check)


async def test_crash_after_the_money_moved_repeats_the_same_key(
    database: Database, payments: PaymentActivities, provider: Provider, steps: Steps
) -> None:
    await database.put_order("o-1")
    steps.crash_after(CHARGE.index("provider answers"))
    with pytest.raises(Crash, match="provider answers"):
        await run(payments.charge, charge_of("o-1"))
    assert await database.payment("pay-o-1") == ("o-1", "INIT", 0)
    assert await database.order("o-1") == (Step.CHARGING, None)
    await run(payments.charge, charge_of("o-1"))
    assert provider.calls == ["pay-o-1", "pay-o-1"]
    assert provider.taken == ["pay-o-1"]
    assert await database.payment("pay-o-1") == ("o-1", "CHARGED", PRICE.amount)


@pytest.mark.parametrize("refusal", [PaymentDeclined("card_declined"), PaymentConflict("idempotency_key_reused")])
async def test_refusal_by_the_provider_fails_the_payment_once(
    database: Database, payments: PaymentActivities, provider: Provider, steps: Steps, refusal: TrellisError
) -> None:
    await database.put_order("o-1")
    provider.refusal = refusal
    with steps.listed() as listed, pytest.raises(type(refusal)) as caught:
        await run(payments.charge, charge_of("o-1"))
    assert listed == [*BEGIN_CHARGE, "provider is asked", *FAIL_CHARGE]
    assert translate(caught.value).non_retryable
    for _ in range(2):
        # The provider would say yes now, but nobody asks: the order has been told.
        provider.refusal = None
        with pytest.raises(PaymentDeclined, match="declined before") as repeated:
            await run(payments.charge, charge_of("o-1"))
        assert translate(repeated.value).non_retryable
    assert await database.payment("pay-o-1") == ("o-1", "FAILED", 0)
    assert await database.order("o-1") == (Step.PAYMENT_FAILED, str(refusal))
    assert await database.told("o-1") == ["charging", "payment_failed"]
    assert provider.calls == ["pay-o-1"]
    assert provider.taken == []


async def test_decline_survives_a_crash_at_every_step(
    database: Database, payments: PaymentActivities, provider: Provider, steps: Steps
) -> None:
    provider.refusal = PaymentDeclined("card_declined")
    for number in range(20):
        await database.put_order(f"o-{number}")

    async def attempt(number: int) -> str:
        with pytest.raises(PaymentDeclined) as caught:
            await run(payments.charge, charge_of(f"o-{number}"))
        return caught.value.title

    async def check(number: int, _: str) -> None:
        assert await database.payment(f"pay-o-{number}") == (f"o-{number}", "FAILED", 0)
        assert (await database.order(f"o-{number}"))[0] == Step.PAYMENT_FAILED
        assert await database.told(f"o-{number}") == ["charging", "payment_failed"]

    crashed = await crash_everywhere(steps, attempt, check)
    assert set(crashed) == {*BEGIN_CHARGE, "provider is asked", *FAIL_CHARGE, *RESUME}
    assert provider.taken == []


async def test_provider_that_is_down_leaves_the_payment_in_doubt(
    database: Database, payments: PaymentActivities, provider: Provider
) -> None:
    await database.put_order("o-1")
    provider.refusal = PaymentUnavailable("503")
    for _ in range(3):
        with pytest.raises(PaymentUnavailable) as caught:
            await run(payments.charge, charge_of("o-1"))
        assert not translate(caught.value).non_retryable
        assert await database.payment("pay-o-1") == ("o-1", "INIT", 0)
        assert await database.order("o-1") == (Step.CHARGING, None)
    provider.refusal = None
    await run(payments.charge, charge_of("o-1"))
    assert await database.told("o-1") == ["charging", "charged"]
    assert provider.taken == ["pay-o-1"]


@pytest.mark.parametrize(
    ("conflicting", "reason"),
    [
        (charge_of("o-2", "pay-o-1"), "belongs to another order"),
        (charge_of("o-2", "pay-o-1", Money(amount=Decimal("0.01"), currency="USD")), "belongs to another order"),
    ],
    ids=["same amount", "other amount"],
)
async def test_payment_id_of_another_order_charges_nothing(
    database: Database, payments: PaymentActivities, provider: Provider, conflicting: ChargeRequest, reason: str
) -> None:
    await database.put_order("o-1")
    await database.put_order("o-2")
    await run(payments.charge, charge_of("o-1"))
    for _ in range(2):
        with pytest.raises(PaymentConflict, match=reason) as caught:
            await run(payments.charge, conflicting)
        assert translate(caught.value).non_retryable
    assert provider.calls == ["pay-o-1"]
    assert (await database.order("o-2"))[0] == Step.PAYMENT_FAILED
    assert await database.told("o-2") == ["charging", "payment_failed"]
    # The one to whom it belongs is left alone.
    assert await database.order("o-1") == (Step.CHARGED, None)
    assert await database.payment("pay-o-1") == ("o-1", "CHARGED", PRICE.amount)


@pytest.mark.parametrize(
    "money",
    [Money(amount=Decimal("19.91"), currency="USD"), Money(amount=PRICE.amount, currency="EUR")],
    ids=["other amount", "other currency"],
)
async def test_another_amount_under_the_same_payment_id_charges_nothing(
    database: Database, payments: PaymentActivities, provider: Provider, money: Money
) -> None:
    await database.put_order("o-1")
    provider.refusal = PaymentUnavailable("503")
    with pytest.raises(PaymentUnavailable):
        await run(payments.charge, charge_of("o-1"))
    provider.refusal = None
    for _ in range(2):
        with pytest.raises(PaymentConflict, match="another amount") as caught:
            await run(payments.charge, charge_of("o-1", money=money))
        assert translate(caught.value).non_retryable
    assert provider.taken == []
    assert (await database.order("o-1"))[0] == Step.PAYMENT_FAILED


async def test_second_payment_of_an_order_charges_nothing(
    database: Database, payments: PaymentActivities, provider: Provider
) -> None:
    await database.put_order("o-1")
    await run(payments.charge, charge_of("o-1", "pay-1"))
    with pytest.raises((PaymentConflict, IllegalTransition)) as caught:
        await run(payments.charge, charge_of("o-1", "pay-2"))
    assert translate(caught.value).non_retryable
    assert provider.taken == ["pay-1"]
    assert await database.payment("pay-2") is None
    assert await database.order("o-1") == (Step.CHARGED, None)


async def test_twenty_attempts_at_once_charge_once(
    database: Database, payments: PaymentActivities, provider: Provider
) -> None:
    await database.put_order("o-1")
    receipts = await asyncio.gather(*(run(payments.charge, charge_of("o-1")) for _ in range(20)))
    assert {receipt.reference for receipt in receipts} == {"ch_pay-o-1"}
    assert provider.taken == ["pay-o-1"]
    assert await database.told("o-1") == ["charging", "charged"]
    assert await database.payment("pay-o-1") == ("o-1", "CHARGED", PRICE.amount)


async def test_twenty_orders_with_one_payment_id_charge_one_of_them(
    database: Database, payments: PaymentActivities, provider: Provider
) -> None:
    orders = [f"o-{number}" for number in range(20)]
    for order_id in orders:
        await database.put_order(order_id)
    outcomes = await asyncio.gather(
        *(run(payments.charge, charge_of(order_id, "pay-1")) for order_id in orders), return_exceptions=True
    )
    assert [type(outcome) for outcome in outcomes].count(Receipt) == 1
    assert {type(outcome) for outcome in outcomes} == {Receipt, PaymentConflict}
    assert provider.taken == ["pay-1"]
    states = [(await database.order(order_id))[0] for order_id in orders]
    assert sorted(states) == ["charged"] + ["payment_failed"] * 19


# --- refund -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("close_as", [Step.CANCELLED, Step.SHIPPING_FAILED])
async def test_refund_twice_gives_back_once(
    database: Database, payments: PaymentActivities, provider: Provider, close_as: Step
) -> None:
    await database.put_order("o-1")
    await run(payments.charge, charge_of("o-1"))
    for _ in range(2):
        await run(payments.refund, refund_of("o-1", close_as))
    assert provider.returned == ["pay-o-1:refund"]
    assert provider.calls == ["pay-o-1", "pay-o-1:refund"]
    assert await database.payment("pay-o-1") == ("o-1", "REFUNDED", PRICE.amount)
    why = "changed their mind" if close_as is Step.SHIPPING_FAILED else None
    assert await database.order("o-1") == (close_as, why)
    assert await database.told("o-1") == ["charging", "charged", "refunded", close_as]


async def test_refund_survives_a_crash_at_every_step(
    database: Database, payments: PaymentActivities, provider: Provider, steps: Steps
) -> None:
    for number in range(len(REFUND) + 1):
        await database.put_order(f"o-{number}")
        await run(payments.charge, charge_of(f"o-{number}"))

    async def attempt(number: int) -> None:
        await run(payments.refund, refund_of(f"o-{number}"))

    async def check(number: int, _: None) -> None:
        assert provider.returned.count(f"pay-o-{number}:refund") == 1
        assert await database.payment(f"pay-o-{number}") == (f"o-{number}", "REFUNDED", PRICE.amount)
        assert await database.order(f"o-{number}") == (Step.CANCELLED, None)
        assert await database.told(f"o-{number}") == ["charging", "charged", "refunded", "cancelled"]

    assert set(await crash_everywhere(steps, attempt, check)) == set(REFUND)


async def test_twenty_refunds_at_once_give_back_once(
    database: Database, payments: PaymentActivities, provider: Provider
) -> None:
    await database.put_order("o-1")
    await run(payments.charge, charge_of("o-1"))
    await asyncio.gather(*(run(payments.refund, refund_of("o-1")) for _ in range(20)))
    assert provider.returned == ["pay-o-1:refund"]
    assert await database.told("o-1") == ["charging", "charged", "refunded", "cancelled"]


async def test_refund_of_a_shipped_order_is_too_late(
    database: Database, payments: PaymentActivities, provider: Provider
) -> None:
    await database.put_order("o-1")
    await run(payments.charge, charge_of("o-1"))
    async with database.pool.acquire() as connection, connection.transaction():
        await timeline.enter(connection, "o-1", Step.PREPARED)
        await timeline.enter(connection, "o-1", Step.SHIPPED)
    with pytest.raises(TooLate) as caught:
        await run(payments.refund, refund_of("o-1"))
    assert translate(caught.value).non_retryable
    assert provider.returned == []
    assert await database.order("o-1") == (Step.SHIPPED, None)
    assert await database.payment("pay-o-1") == ("o-1", "CHARGED", PRICE.amount)


async def test_refund_that_the_provider_refuses_stays_open(
    database: Database, payments: PaymentActivities, provider: Provider
) -> None:
    await database.put_order("o-1")
    await run(payments.charge, charge_of("o-1"))
    provider.refusal = PaymentConflict("charge_not_found")
    with pytest.raises(RefundRefused) as caught:
        await run(payments.refund, refund_of("o-1"))
    # Somebody owes money here: it is tried again, and seen, until it is given back.
    assert not translate(caught.value).non_retryable
    assert await database.order("o-1") == (Step.CHARGED, None)
    assert await database.payment("pay-o-1") == ("o-1", "CHARGED", PRICE.amount)
    provider.refusal = None
    await run(payments.refund, refund_of("o-1"))
    assert await database.order("o-1") == (Step.CANCELLED, None)


async def test_refund_without_a_charge_gives_back_nothing(
    database: Database, payments: PaymentActivities, provider: Provider
) -> None:
    for order_id in ("never", "declined", "other"):
        await database.put_order(order_id)
    await run(payments.charge, charge_of("other"))
    provider.refusal = PaymentDeclined("card_declined")
    with pytest.raises(PaymentDeclined):
        await run(payments.charge, charge_of("declined"))
    provider.refusal = None
    for request in (refund_of("never"), refund_of("declined"), refund_of("never", payment_id="pay-other")):
        with pytest.raises(PaymentConflict) as caught:
            await run(payments.refund, request)
        assert translate(caught.value).non_retryable
    assert provider.returned == []
    assert await database.payment("pay-other") == ("other", "CHARGED", PRICE.amount)


# --- the steps that move no money, on PostgreSQL ------------------------------------------------------------


@dataclass
class Shop:
    """Orders and shipments on PostgreSQL, with a carrier of their own."""

    database: RealDatabase
    steps: Steps
    truck: Truck
    orders: OrderActivities
    shipping: ShippingActivities

    async def order_at(self, order_id: str, step: Step, address: Address | None = HOME) -> OrderInput:
        """An order that has gone the way to `step`."""
        order = OrderInput(order_id=order_id, request=StartOrder(payment_id=f"pay-{order_id}", address=address))
        await run(self.orders.receive, order)
        if step is not Step.RECEIVED:
            await run(self.orders.validate, order)
        path = [Step.CHARGING, Step.CHARGED, Step.PREPARED]
        for passed in path[: path.index(step) + 1] if step in path else []:
            async with self.database.pool.acquire() as connection, connection.transaction():
                await timeline.enter(connection, order_id, passed)
        return order

    async def row(self, order_id: str) -> asyncpg.Record:
        return await self.database.pool.fetchrow("SELECT * FROM orders WHERE id = $1", order_id)

    async def payload(self, order_id: str, event: str) -> Any:
        return await self.database.pool.fetchval(
            "SELECT payload_json FROM events WHERE order_id = $1 AND type = $2", order_id, event
        )


@pytest.fixture
def shop(postgresql: RealDatabase, steps: Steps) -> Shop:
    truck = Truck(steps)
    return Shop(
        postgresql,
        steps,
        truck,
        OrderActivities(OrderRepository(postgresql.pool)),
        ShippingActivities(ShipmentRepository(postgresql.pool), truck),
    )


async def test_receive_writes_the_request_down_once(shop: Shop) -> None:
    order = await shop.order_at("o-1", Step.RECEIVED)
    await asyncio.gather(*(run(shop.orders.receive, order) for _ in range(20)))
    row = await shop.row("o-1")
    assert (row["state"], row["payment_id"], row["run_id"]) == ("received", "pay-o-1", "run-1")
    assert (row["total"], row["currency"], row["items_json"]) == (Decimal("50.00"), "USD", [])
    assert row["address_json"] == HOME.model_dump()
    assert row["request_hash"] == order.request.fingerprint
    assert await shop.database.told("o-1") == ["received"]
    assert await shop.payload("o-1", "received") == {"payment_id": "pay-o-1", "amount": "50.00", "currency": "USD"}


async def test_validate_opens_the_review_once_and_keeps_its_deadline(shop: Shop) -> None:
    order = await shop.order_at("o-1", Step.AWAITING_REVIEW)
    deadline = (await shop.row("o-1"))["review_deadline"]
    assert 0 < (deadline - datetime.now(UTC)).total_seconds() <= order.review_timeout_seconds
    await run(shop.orders.validate, order)
    row = await shop.row("o-1")
    assert (row["state"], row["review_deadline"]) == ("awaiting_review", deadline)
    assert await shop.database.told("o-1") == ["received", "awaiting_review"]


async def test_validate_survives_a_crash_at_every_step(shop: Shop) -> None:
    orders = [await shop.order_at(f"o-{number}", Step.RECEIVED) for number in range(3)]

    async def attempt(number: int) -> None:
        await run(shop.orders.validate, orders[number])

    async def check(number: int, _: None) -> None:
        row = await shop.row(f"o-{number}")
        assert (row["state"], row["review_deadline"] is not None) == ("awaiting_review", True)
        assert await shop.database.told(f"o-{number}") == ["received", "awaiting_review"]

    assert set(await crash_everywhere(shop.steps, attempt, check)) == set(alone("open review, enter awaiting_review"))


async def test_validate_rejects_a_payment_id_that_is_taken(shop: Shop) -> None:
    await shop.database.put_order("owner")
    provider = Provider(shop.steps, shop.database)
    payments = PaymentActivities(PaymentRepository(shop.database.pool), provider)
    await run(payments.charge, charge_of("owner", "pay-o-1"))
    order = await shop.order_at("o-1", Step.RECEIVED)
    for _ in range(2):
        with pytest.raises(OrderRejected) as caught:
            await run(shop.orders.validate, order)
        assert translate(caught.value).non_retryable
    assert await shop.database.order("o-1") == (Step.REJECTED, "pay-o-1 belongs to another order")
    assert await shop.database.told("o-1") == ["received", "rejected"]


@pytest.mark.parametrize("step", [Step.REJECTED, Step.EXPIRED, Step.CANCELLED])
async def test_close_is_told_once(shop: Shop, step: Step) -> None:
    await shop.order_at("o-1", Step.AWAITING_REVIEW)
    for _ in range(2):
        await run(shop.orders.close, CloseOrder(order_id="o-1", step=step, reason="because", note="really"))
    assert await shop.database.order("o-1") == (step, None)
    assert await shop.database.told("o-1") == ["received", "awaiting_review", step]
    assert await shop.payload("o-1", step) == {"reason": "because", "note": "really"}


async def test_closing_what_was_charged_is_refused(shop: Shop) -> None:
    await shop.order_at("o-1", Step.CHARGING)
    with pytest.raises(IllegalTransition) as caught:
        await run(shop.orders.close, CloseOrder(order_id="o-1", step=Step.EXPIRED, reason="late"))
    assert translate(caught.value).non_retryable
    assert await shop.database.order("o-1") == (Step.CHARGING, None)


async def test_note_is_told_once_per_activity(shop: Shop) -> None:
    await shop.order_at("o-1", Step.RECEIVED)
    note = NoteRequest(order_id="o-1", type="approve_ignored", payload={"reason": "late"})
    for activity_id in ("1", "1", "2"):
        await run(shop.orders.note, note, activity_id=activity_id)
    assert await shop.database.told("o-1") == ["received", "approve_ignored", "approve_ignored"]


async def test_address_change_is_told_once_per_activity(shop: Shop) -> None:
    await shop.order_at("o-1", Step.CHARGED)
    for _ in range(2):
        decision = await run(shop.orders.change_address, AddressChange(order_id="o-1", address=OFFICE))
        assert decision.accepted
    assert (await shop.row("o-1"))["address_json"] == OFFICE.model_dump()
    assert (await shop.database.told("o-1"))[-2:] == ["charged", "address_changed"]
    # The timeline is read by more people than the address.
    assert await shop.payload("o-1", "address_changed") == {"address": address_digest("o-1", OFFICE)}


async def test_address_of_a_closed_order_stays(shop: Shop) -> None:
    await shop.order_at("o-1", Step.AWAITING_REVIEW)
    await run(shop.orders.close, CloseOrder(order_id="o-1", step=Step.EXPIRED, reason="late"))
    decision = await run(shop.orders.change_address, AddressChange(order_id="o-1", address=OFFICE))
    assert not decision.accepted
    assert (await shop.row("o-1"))["address_json"] == HOME.model_dump()
    assert (await shop.database.told("o-1"))[-1] == "address_refused"


async def test_prepare_is_told_once(shop: Shop) -> None:
    await shop.order_at("o-1", Step.CHARGED)
    for _ in range(2):
        await run(shop.shipping.prepare, Shipment(order_id="o-1"))
    assert await shop.database.order("o-1") == (Step.PREPARED, None)
    assert (await shop.database.told("o-1"))[-2:] == ["charged", "prepared"]


ASK_CARRIER = ["carrier is asked", "carrier answers"]
DISPATCH = [*ASK_CARRIER, *alone("tracking, enter shipped")]
RECALL = [*ASK_CARRIER, *alone("tell recalled")]


async def test_dispatch_hands_over_once(shop: Shop) -> None:
    await shop.order_at("o-1", Step.PREPARED)
    with shop.steps.listed() as listed:
        handover = await run(shop.shipping.dispatch, Shipment(order_id="o-1"))
    assert listed == DISPATCH
    with shop.steps.listed() as listed:
        assert await run(shop.shipping.dispatch, Shipment(order_id="o-1")) == handover
    assert listed == []
    assert shop.truck.taken == {"o-1": HOME}
    assert (await shop.row("o-1"))["tracking"] == handover.tracking
    assert await shop.database.order("o-1") == (Step.SHIPPED, None)
    assert (await shop.database.told("o-1"))[-2:] == ["prepared", "shipped"]
    assert await shop.payload("o-1", "shipped") == {"tracking": handover.tracking, "pickup": False}


async def test_dispatch_survives_a_crash_at_every_step(shop: Shop) -> None:
    for number in range(6):
        await shop.order_at(f"o-{number}", Step.PREPARED)

    async def attempt(number: int) -> Handover:
        return await run(shop.shipping.dispatch, Shipment(order_id=f"o-{number}"))

    async def check(number: int, handover: Handover) -> None:
        assert handover.tracking == f"tr_o-{number}" == (await shop.row(f"o-{number}"))["tracking"]
        assert await shop.database.order(f"o-{number}") == (Step.SHIPPED, None)
        assert (await shop.database.told(f"o-{number}"))[-2:] == ["prepared", "shipped"]

    assert set(await crash_everywhere(shop.steps, attempt, check)) == set(DISPATCH)


async def test_dispatch_goes_to_the_address_in_the_row_and_freezes_it(shop: Shop) -> None:
    await shop.order_at("o-1", Step.PREPARED)
    change = AddressChange(order_id="o-1", address=OFFICE)
    assert (await run(shop.orders.change_address, change, activity_id="before")).accepted
    shop.truck.down = True
    with pytest.raises(CarrierUnavailable) as caught:
        await run(shop.shipping.dispatch, Shipment(order_id="o-1"))
    assert not translate(caught.value).non_retryable
    frozen_at = (await shop.row("o-1"))["dispatch_started_at"]
    # The carrier may have the parcel already: nobody knows.
    back = AddressChange(order_id="o-1", address=HOME)
    assert not (await run(shop.orders.change_address, back, activity_id="after")).accepted
    shop.truck.down = False
    await run(shop.shipping.dispatch, Shipment(order_id="o-1"))
    assert shop.truck.taken == {"o-1": OFFICE}
    row = await shop.row("o-1")
    assert (row["address_json"], row["dispatch_started_at"]) == (OFFICE.model_dump(), frozen_at)
    assert (await shop.database.told("o-1"))[-3:] == ["address_changed", "address_refused", "shipped"]


async def test_order_without_an_address_is_picked_up(shop: Shop) -> None:
    await shop.order_at("o-1", Step.PREPARED, address=None)
    handover = await run(shop.shipping.dispatch, Shipment(order_id="o-1"))
    assert shop.truck.taken == {"o-1": None}
    assert await shop.payload("o-1", "shipped") == {"tracking": handover.tracking, "pickup": True}
    assert (await shop.row("o-1"))["address_json"] is None


async def test_recall_before_dispatch_is_told_once_and_stops_the_parcel(shop: Shop) -> None:
    await shop.order_at("o-1", Step.PREPARED)
    for _ in range(2):
        assert await run(shop.shipping.recall, Shipment(order_id="o-1")) is None
    assert (await shop.database.told("o-1"))[-2:] == ["prepared", "recalled"]
    with pytest.raises(ShipmentRefused) as caught:
        await run(shop.shipping.dispatch, Shipment(order_id="o-1"))
    assert translate(caught.value).non_retryable
    assert await shop.database.order("o-1") == (Step.PREPARED, None)
    assert shop.truck.taken == {}


async def test_recall_of_a_parcel_that_was_taken_in_silence_ships_the_order_once(shop: Shop) -> None:
    await shop.order_at("o-1", Step.PREPARED)
    shop.steps.crash_after(1)
    with pytest.raises(Crash, match="carrier answers"):
        await run(shop.shipping.dispatch, Shipment(order_id="o-1"))
    for _ in range(2):
        assert await run(shop.shipping.recall, Shipment(order_id="o-1")) == Handover(tracking="tr_o-1")
    assert await shop.database.order("o-1") == (Step.SHIPPED, None)
    assert (await shop.database.told("o-1"))[-2:] == ["prepared", "shipped"]


async def test_recall_survives_a_crash_at_every_step(shop: Shop) -> None:
    for number in range(6):
        await shop.order_at(f"o-{number}", Step.PREPARED)

    async def attempt(number: int) -> Handover | None:
        return await run(shop.shipping.recall, Shipment(order_id=f"o-{number}"))

    async def check(number: int, handover: Handover | None) -> None:
        assert handover is None
        assert (await shop.database.told(f"o-{number}"))[-2:] == ["prepared", "recalled"]

    assert set(await crash_everywhere(shop.steps, attempt, check)) == set(RECALL)


async def test_dispatch_and_recall_at_once_agree(shop: Shop) -> None:
    for number in range(10):
        order_id = f"o-{number}"
        await shop.order_at(order_id, Step.PREPARED)
        handed, back = await asyncio.gather(
            run(shop.shipping.dispatch, Shipment(order_id=order_id)),
            run(shop.shipping.recall, Shipment(order_id=order_id)),
            return_exceptions=True,
        )
        state, _ = await shop.database.order(order_id)
        told = await shop.database.told(order_id)
        if order_id in shop.truck.taken:
            assert handed == back == Handover(tracking=f"tr_{order_id}")
            assert (state, told.count("shipped"), told.count("recalled")) == (Step.SHIPPED, 1, 0)
        else:
            assert (type(handed), back) == (ShipmentRefused, None)
            assert (state, told.count("shipped"), told.count("recalled")) == (Step.PREPARED, 0, 1)


async def test_shipping_an_order_that_nobody_received_is_refused(shop: Shop) -> None:
    for activity, expected in (
        (shop.shipping.prepare, IllegalTransition),
        (shop.shipping.dispatch, OrderNotFound),
        (shop.shipping.recall, OrderNotFound),
    ):
        with pytest.raises(expected) as caught:
            await run(activity, Shipment(order_id="nobody"))
        assert translate(caught.value).non_retryable
    assert shop.truck.taken == {}
    assert shop.truck.recalled == set()
