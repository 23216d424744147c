"""Orders, payments, shipments and the timeline on PostgreSQL: what each statement does, and what the tables refuse."""

from __future__ import annotations

import asyncio
import base64
import json
import random
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from itertools import chain, pairwise, product
from typing import TYPE_CHECKING, Any

import asyncpg
import pytest

from app.db import timeline as events
from app.db.timeline import Attempt, AttemptLog
from app.domain.money import Money
from app.domain.steps import FINAL_STEPS, NEXT_STEPS, Step
from app.errors import IllegalTransition, InvalidRequest, OrderNotFound, OrderRejected, PaymentConflict, TrellisError
from app.order import repository as order_sql
from app.order.models import AddressChange, CloseOrder, Item, NoteRequest, OrderInput, StartOrder
from app.order.repository import OrderRepository
from app.payment import repository as payment_sql
from app.payment.gateway import Receipt
from app.payment.models import ChargeRequest, RefundRequest
from app.payment.repository import PaymentRepository
from app.reconcile.repository import LeftBehind
from app.shipping import repository as shipping_sql
from app.shipping.carrier import Handover
from app.shipping.models import Address
from app.shipping.repository import ShipmentRepository
from tests import databases

if TYPE_CHECKING:
    pass

HOME = Address(line1="1 Main St", city="Springfield", state="IL", zip="62701")
OFFICE = Address(line1="2 High St", city="Shelbyville", state="IL", zip="62565")
PRICE = Money(amount=Decimal("50.00"), currency="USD")
RECEIPT = Receipt(reference="ch_1", money=PRICE)

LEGAL = {(step, following) for step, after in NEXT_STEPS.items() for following in after}


@pytest.fixture
async def database_url(shared_database: str) -> AsyncIterator[str]:
    """A migrated database without orders."""
    yield shared_database
    await databases.empty(shared_database)


@pytest.fixture
def orders(pool: asyncpg.Pool) -> OrderRepository:
    return OrderRepository(pool)


@pytest.fixture
def payments(pool: asyncpg.Pool) -> PaymentRepository:
    return PaymentRepository(pool)


@pytest.fixture
def shipments(pool: asyncpg.Pool) -> ShipmentRepository:
    return ShipmentRepository(pool)


def asked(order_id: str = "o-1", **request: Any) -> OrderInput:
    return OrderInput(order_id=order_id, request=StartOrder(**{"payment_id": f"pay-{order_id}", **request}))


def charge_of(order_id: str = "o-1") -> ChargeRequest:
    return ChargeRequest(order_id=order_id, payment_id=f"pay-{order_id}", money=PRICE)


def refund_of(order_id: str = "o-1", close_as: Step = Step.CANCELLED) -> RefundRequest:
    return RefundRequest(
        order_id=order_id, payment_id=f"pay-{order_id}", money=PRICE, close_as=close_as, reason="returned"
    )


def attempt(number: int = 1, activity: str = "charge", order_id: str = "o-1") -> Attempt:
    return Attempt(order_id=order_id, activity=activity, activity_id="7", run_id="run-1", number=number)


async def put(pool: asyncpg.Pool, order_id: str, state: Step, **columns: Any) -> None:
    """An order in a state, without the way there."""
    values = {"id": order_id, "state": state, "review_deadline": datetime.now(UTC), **columns}
    places = ", ".join(f"${place}" for place in range(1, len(values) + 1))
    await pool.execute(f"INSERT INTO orders ({', '.join(values)}) VALUES ({places})", *values.values())


async def state_of(pool: asyncpg.Pool, order_id: str = "o-1") -> str | None:
    return await pool.fetchval("SELECT state FROM orders WHERE id = $1", order_id)


async def last_error(pool: asyncpg.Pool, order_id: str = "o-1") -> str | None:
    return await pool.fetchval("SELECT last_error FROM orders WHERE id = $1", order_id)


async def told(pool: asyncpg.Pool, order_id: str = "o-1") -> list[str]:
    return [
        row["type"] for row in await pool.fetch("SELECT type FROM events WHERE order_id = $1 ORDER BY id", order_id)
    ]


async def enter(pool: asyncpg.Pool, step: Step, order_id: str = "o-1", **facts: Any) -> events.Move | None:
    async with pool.acquire() as connection, connection.transaction():
        return await events.enter(connection, order_id, step, **facts)


async def record(pool: asyncpg.Pool, event: str, key: str, order_id: str = "o-1") -> None:
    async with pool.acquire() as connection, connection.transaction():
        await events.record(connection, order_id, event, {}, key=key)


async def broken_rule(pool: asyncpg.Pool, statement: str, *values: Any) -> str | None:
    """The constraint that refuses the statement; None if it was done."""
    try:
        await pool.execute(statement, *values)
    except asyncpg.IntegrityConstraintViolationError as refused:
        return refused.constraint_name
    return None


async def until_waiting_for_a_lock(pool: asyncpg.Pool) -> None:
    """Until some other session of this database waits for a row."""
    waits = (
        "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock')"
    )
    async with asyncio.timeout(10):
        while True:
            if await pool.fetchval(waits):
                return
            await asyncio.sleep(0.01)


# --- the moves ----------------------------------------------------------------------------------------------


async def test_every_legal_move_works_and_every_other_is_refused(pool: asyncpg.Pool) -> None:
    for step, following in product(Step, Step):
        order_id = f"{step}-{following}"
        await put(pool, order_id, step)
        if (step, following) in LEGAL:
            move = await enter(pool, following, order_id)
            assert move
            assert move.left is step
            assert await state_of(pool, order_id) == following
            assert await told(pool, order_id) == [following]
        else:
            with pytest.raises(IllegalTransition, match=f"{order_id} from {step} to {following}$"):
                await enter(pool, following, order_id)
            assert await state_of(pool, order_id) == step
            assert await told(pool, order_id) == []


async def test_every_other_move_is_refused_by_sql_too(pool: asyncpg.Pool) -> None:
    for step, following in product(Step, Step):
        order_id = f"{step}-{following}"
        await put(pool, order_id, step)
        broken = await broken_rule(pool, "UPDATE orders SET state = $2 WHERE id = $1", order_id, following)
        stays = step is following
        assert broken == (None if stays or (step, following) in LEGAL else "orders_moves"), order_id
        assert await state_of(pool, order_id) == (step if broken else following)


async def test_steps_in_code_and_in_the_tables_are_the_same(pool: asyncpg.Pool) -> None:
    source = await pool.fetchval("SELECT prosrc FROM pg_proc WHERE proname = 'orders_moves'")
    assert set(re.findall(r"\('(\w+)', '(\w+)'\)", source)) == LEGAL
    checks = await pool.fetch(
        "SELECT pg_get_constraintdef(oid) FROM pg_constraint WHERE conrelid = 'orders'::regclass AND contype = 'c'"
    )
    states = next(check[0] for check in checks if "'received'" in check[0])
    assert set(re.findall(r"'(\w+)'::text", states)) == set(Step)
    assert {step for step in Step if step.final} == FINAL_STEPS


async def test_payments_move_forward_only(pool: asyncpg.Pool) -> None:
    statuses = ["INIT", "CHARGED", "FAILED", "REFUNDED"]
    forward = {("INIT", "CHARGED"), ("INIT", "FAILED"), ("CHARGED", "REFUNDED")}
    for before, after in product(statuses, statuses):
        payment_id = f"{before}-{after}"
        await put(pool, payment_id, Step.CHARGING)
        await pool.execute(
            "INSERT INTO payments (payment_id, order_id, status, amount, refund_reference) VALUES ($1, $1, $2, 5, $1)",
            payment_id,
            before,
        )
        broken = await broken_rule(pool, "UPDATE payments SET status = $2 WHERE payment_id = $1", payment_id, after)
        allowed = before == after or (before, after) in forward
        assert broken == (None if allowed else "payments_moves"), payment_id


async def test_entering_again_changes_nothing(pool: asyncpg.Pool) -> None:
    await put(pool, "o-1", Step.CHARGED)
    assert await enter(pool, Step.PREPARED)
    await enter(pool, Step.SHIPPED)
    since = await pool.fetchval("SELECT state_since FROM orders WHERE id = 'o-1'")
    for step in (Step.PREPARED, Step.SHIPPED):
        assert await enter(pool, step, payload={"other": 1}, error="other") is None
    assert await told(pool) == ["prepared", "shipped"]
    row = await pool.fetchrow("SELECT * FROM orders WHERE id = 'o-1'")
    assert (row["state"], row["state_since"], row["last_error"]) == ("shipped", since, None)


async def test_entering_tells_how_long_the_step_before_lasted(pool: asyncpg.Pool) -> None:
    await put(pool, "o-1", Step.CHARGED, state_since=datetime.now(UTC) - timedelta(hours=1))
    move = await enter(pool, Step.PREPARED)
    assert move
    assert 3600 <= move.seconds < 3700
    move = await enter(pool, Step.SHIPPED)
    assert move
    assert 0 <= move.seconds < 100


async def test_an_order_that_nobody_received_enters_nothing_and_has_no_timeline(pool: asyncpg.Pool) -> None:
    with pytest.raises(IllegalTransition, match="from nowhere to charged"):
        await enter(pool, Step.CHARGED, "nobody")
    await record(pool, "noted", "noted", "nobody")
    log = AttemptLog(pool)
    await log.failed(attempt(order_id="nobody"), "Error", "failed", retryable=True)
    await log.retried(attempt(2, order_id="nobody"))
    await log.recovered(attempt(2, order_id="nobody"))
    assert await told(pool, "nobody") == []


# --- state and event are one --------------------------------------------------------------------------------


async def _received(pool: asyncpg.Pool) -> None:
    await OrderRepository(pool).receive(asked(address=HOME), "run-1")


async def _at(pool: asyncpg.Pool, step: Step) -> None:
    """`o-1` at a step of the straight way, its payment as it is there."""
    way: list[tuple[Step, Callable[[], Awaitable[Any]]]] = [
        (Step.RECEIVED, lambda: _received(pool)),
        (Step.AWAITING_REVIEW, lambda: OrderRepository(pool).open_review(asked())),
        (Step.CHARGING, lambda: PaymentRepository(pool).begin_charge(charge_of())),
        (Step.CHARGED, lambda: PaymentRepository(pool).complete_charge(charge_of(), RECEIPT)),
        (Step.PREPARED, lambda: ShipmentRepository(pool).prepare("o-1")),
        (Step.SHIPPED, lambda: ShipmentRepository(pool).complete_dispatch("o-1", Handover(tracking="t"), pickup=False)),
    ]
    for passed, go in way:
        await go()
        if passed is step:
            return


CHANGES: dict[str, tuple[Step | None, Callable[[asyncpg.Pool], Awaitable[Any]]]] = {
    "receive": (None, _received),
    "open_review": (Step.RECEIVED, lambda pool: OrderRepository(pool).open_review(asked())),
    "close": (
        Step.AWAITING_REVIEW,
        lambda pool: OrderRepository(pool).close(CloseOrder(order_id="o-1", step=Step.EXPIRED, reason="late")),
    ),
    "change_address": (
        Step.CHARGED,
        lambda pool: OrderRepository(pool).change_address(AddressChange(order_id="o-1", address=OFFICE), "key"),
    ),
    "begin_charge": (Step.AWAITING_REVIEW, lambda pool: PaymentRepository(pool).begin_charge(charge_of())),
    "complete_charge": (Step.CHARGING, lambda pool: PaymentRepository(pool).complete_charge(charge_of(), RECEIPT)),
    "fail_charge": (Step.CHARGING, lambda pool: PaymentRepository(pool).fail_charge(charge_of(), "declined")),
    "complete_refund": (
        Step.CHARGED,
        lambda pool: PaymentRepository(pool).complete_refund(refund_of(), Receipt(reference="re_1", money=PRICE)),
    ),
    "prepare": (Step.CHARGED, lambda pool: ShipmentRepository(pool).prepare("o-1")),
    "complete_dispatch": (
        Step.PREPARED,
        lambda pool: ShipmentRepository(pool).complete_dispatch("o-1", Handover(tracking="t"), pickup=False),
    ),
    "failed attempt": (
        Step.CHARGING,
        lambda pool: AttemptLog(pool).failed(attempt(), "PaymentUnavailable", "503", retryable=True),
    ),
}


@pytest.mark.parametrize("change", CHANGES)
async def test_without_its_event_nothing_changes(pool: asyncpg.Pool, shared_database: str, change: str) -> None:
    before, make = CHANGES[change]
    if before:
        await _at(pool, before)
    was = await pool.fetchrow(TABLES)
    # NOT VALID leaves the rows that are there alone.
    await databases.as_owner(shared_database, "ALTER TABLE events ADD CONSTRAINT full_up CHECK (false) NOT VALID")
    try:
        with pytest.raises(asyncpg.CheckViolationError) as refused:
            await make(pool)
        assert refused.value.constraint_name == "full_up"
        assert await pool.fetchrow(TABLES) == was
    finally:
        await databases.as_owner(shared_database, "ALTER TABLE events DROP CONSTRAINT full_up")
    # And with it, it does: the same call was not refused for another reason.
    count = len(await told(pool))
    await make(pool)
    assert await pool.fetchrow(TABLES) != was
    assert len(await told(pool)) > count


async def test_twenty_writers_of_one_key_add_one_event(pool: asyncpg.Pool, orders: OrderRepository) -> None:
    await asyncio.gather(*(orders.receive(asked(), "run-1") for _ in range(20)))
    assert await told(pool) == ["received"]
    await asyncio.gather(*(orders.open_review(asked()) for _ in range(20)))
    assert await told(pool) == ["received", "awaiting_review"]
    await asyncio.gather(*(record(pool, "noted", "key") for _ in range(20)))
    log = AttemptLog(pool)
    await asyncio.gather(*(log.failed(attempt(), "Error", "failed", retryable=True) for _ in range(20)))
    await asyncio.gather(*(log.retried(attempt(2)) for _ in range(20)))
    assert (await told(pool))[2:] == ["noted", "attempt_failed", "attempt_retried"]


async def test_of_twenty_that_enter_one_step_one_makes_the_move(pool: asyncpg.Pool) -> None:
    await put(pool, "o-1", Step.PREPARED)
    moves = await asyncio.gather(*(enter(pool, Step.SHIPPED) for _ in range(20)))
    assert len([move for move in moves if move]) == 1
    assert await told(pool) == ["shipped"]


async def test_of_twenty_that_end_an_order_in_two_ways_one_way_wins(pool: asyncpg.Pool) -> None:
    await put(pool, "o-1", Step.AWAITING_REVIEW)
    steps = [Step.EXPIRED, Step.REJECTED] * 10
    outcomes = await asyncio.gather(*(enter(pool, step) for step in steps), return_exceptions=True)
    winner = await state_of(pool)
    assert await told(pool) == [winner]
    for step, outcome in zip(steps, outcomes, strict=True):
        assert isinstance(outcome, IllegalTransition) == (step != winner)


TABLES = "SELECT (SELECT json_agg(orders) FROM orders)::text, (SELECT json_agg(payments) FROM payments)::text"


@asynccontextmanager
async def made_to_wait(pool: asyncpg.Pool, change: str) -> AsyncIterator[tuple[asyncpg.Connection, asyncio.Task[Any]]]:
    """A change that was asked for while somebody else has the order, in a transaction that ends with the block."""
    before, make = CHANGES[change]
    if before:
        await _at(pool, before)
    async with pool.acquire() as connection, connection.transaction():
        await events.lock(connection, "o-1")
        waiting = asyncio.create_task(make(pool))
        await until_waiting_for_a_lock(pool)
        yield connection, waiting


#: Changes that are one statement: where they lead, and the payment there.
MOVES = {
    "open_review": (Step.AWAITING_REVIEW, None),
    "close": (Step.EXPIRED, None),
    "begin_charge": (Step.CHARGING, ("INIT", 0, None)),
    "complete_charge": (Step.CHARGED, ("CHARGED", PRICE.amount, "ch_1")),
    "prepare": (Step.PREPARED, ("CHARGED", PRICE.amount, "ch_1")),
    "complete_dispatch": (Step.SHIPPED, ("CHARGED", PRICE.amount, "ch_1")),
}


@pytest.mark.parametrize("change", MOVES)
async def test_a_move_that_had_to_wait_for_a_changed_row_is_made_whole(pool: asyncpg.Pool, change: str) -> None:
    """PostgreSQL checks the statement again, for the row as it is by then; none of its parts may be lost by that."""
    step, payment = MOVES[change]
    async with made_to_wait(pool, change) as (connection, waiting):
        count = len(await told(pool))
        await connection.execute("UPDATE orders SET last_error = '503', customer_id = 'c-42' WHERE id = 'o-1'")
    await waiting
    row = await pool.fetchrow("SELECT * FROM orders WHERE id = 'o-1'")
    assert (row["state"], row["last_error"], row["customer_id"]) == (step, None, "c-42")
    assert (await told(pool))[count:] == [step]
    paid = await pool.fetchrow("SELECT status, amount, provider_reference FROM payments WHERE order_id = 'o-1'")
    assert (paid and tuple(paid)) == payment
    assert (row["review_deadline"] is not None) == (step is not Step.RECEIVED)
    assert row["tracking"] == ("t" if step is Step.SHIPPED else None)


@pytest.mark.parametrize("change", MOVES)
async def test_a_move_that_had_to_wait_until_it_was_too_late_leaves_nothing(pool: asyncpg.Pool, change: str) -> None:
    async with made_to_wait(pool, change) as (connection, waiting):
        await events.enter(connection, "o-1", Step.CANCELLED)
        was = await connection.fetchrow(TABLES)
        timeline = [row["type"] for row in await connection.fetch("SELECT type FROM events ORDER BY id")]
    with pytest.raises(IllegalTransition, match="o-1 from cancelled to"):
        await waiting
    assert await pool.fetchrow(TABLES) == was
    assert await told(pool) == timeline


TELLERS: dict[str, Callable[[asyncpg.Pool], Awaitable[Any]]] = {
    "enter": lambda pool: enter(pool, Step.SHIPPED),
    "record": lambda pool: record(pool, "noted", "second"),
    "failed": lambda pool: AttemptLog(pool).failed(attempt(), "Error", "failed", retryable=True),
    "retried": lambda pool: AttemptLog(pool).retried(attempt(2)),
}


@pytest.mark.parametrize("teller", TELLERS)
async def test_events_of_an_order_are_numbered_as_they_are_committed(pool: asyncpg.Pool, teller: str) -> None:
    """Whoever has read event 7 and asks for what follows must not miss one that is committed later as number 6."""
    await put(pool, "o-1", Step.PREPARED)
    async with pool.acquire() as connection:
        async with connection.transaction():
            await events.record(connection, "o-1", "first", {}, key="1")
            waiting = asyncio.create_task(TELLERS[teller](pool))
            await until_waiting_for_a_lock(pool)
            await events.record(connection, "o-1", "last of the first", {}, key="2")
        await waiting
    assert (await told(pool))[:2] == ["first", "last of the first"]
    assert len(await told(pool)) == 3


# --- order before payment -----------------------------------------------------------------------------------


async def _in_doubt(pool: asyncpg.Pool, order_id: str = "o-1") -> None:
    """An order that was closed by force while its charge was on its way."""
    await _claimed(pool, order_id)
    await OrderRepository(pool).close(CloseOrder(order_id=order_id, step=Step.CANCELLED, reason="gone"))


async def _claimed(pool: asyncpg.Pool, order_id: str) -> None:
    """An order whose charge has begun, and nobody knows what became of it."""
    await _in_review(pool, order_id)
    await PaymentRepository(pool).begin_charge(charge_of(order_id))


async def _charged(pool: asyncpg.Pool, order_id: str) -> None:
    await _claimed(pool, order_id)
    await PaymentRepository(pool).complete_charge(charge_of(order_id), receipt_of(order_id))


async def _in_review(pool: asyncpg.Pool, order_id: str) -> None:
    await OrderRepository(pool).receive(asked(order_id), "run-1")
    await OrderRepository(pool).open_review(asked(order_id))


def receipt_of(order_id: str, prefix: str = "ch") -> Receipt:
    return Receipt(reference=f"{prefix}-{order_id}", money=PRICE)


def charge_with(order_id: str, payment_of: str) -> ChargeRequest:
    """A charge under the payment id of another order."""
    return charge_of(order_id).model_copy(update={"payment_id": f"pay-{payment_of}"})


async def _refund(pool: asyncpg.Pool, order_id: str) -> None:
    """What the activity does, without its provider."""
    if await PaymentRepository(pool).begin_refund(refund_of(order_id)):
        await PaymentRepository(pool).complete_refund(refund_of(order_id), receipt_of(order_id, "re"))


def _charged_late(pool: asyncpg.Pool, order_id: str) -> Awaitable[None]:
    charge, refund = receipt_of(order_id), receipt_of(order_id, "re")
    return PaymentRepository(pool).complete_late(order_id, f"pay-{order_id}", charge, refund)


#: Everything that writes a payment: the order `o-1` as it finds it, and `o-2`, with the payment `pay-o-1`.
WRITERS: dict[str, tuple[Callable[[asyncpg.Pool], Awaitable[Any]], Callable[[asyncpg.Pool], Awaitable[Any]]]] = {
    "first charge": (
        lambda pool: _in_review(pool, "o-1"),
        lambda pool: PaymentRepository(pool).begin_charge(charge_of()),
    ),
    # Past the statement with which they begin: that has waited for the order, and let go of it.
    "later charge": (
        lambda pool: _claimed(pool, "o-1"),
        lambda pool: PaymentRepository(pool)._resume_charge(charge_of(), {}),
    ),
    "charge of another order": (
        lambda pool: _claimed(pool, "o-1"),
        lambda pool: PaymentRepository(pool)._resume_charge(charge_with("o-2", "o-1"), {}),
    ),
    "complete_charge": (
        lambda pool: _claimed(pool, "o-1"),
        lambda pool: PaymentRepository(pool).complete_charge(charge_of(), RECEIPT),
    ),
    "fail_charge": (
        lambda pool: _claimed(pool, "o-1"),
        lambda pool: PaymentRepository(pool).fail_charge(charge_of(), "declined"),
    ),
    "complete_refund": (
        lambda pool: _charged(pool, "o-1"),
        lambda pool: PaymentRepository(pool).complete_refund(refund_of(), receipt_of("o-1", "re")),
    ),
    "complete_late": (_in_doubt, lambda pool: _charged_late(pool, "o-1")),
    "never_charged": (_in_doubt, lambda pool: LeftBehind(pool).never_charged("o-1", "pay-o-1")),
}


@pytest.mark.parametrize("writer", WRITERS)
async def test_who_waits_for_an_order_does_not_hold_its_payment(pool: asyncpg.Pool, writer: str) -> None:
    """Whoever has the order can have the payment at once; so nobody who has the payment ever waits for the order."""
    before, write = WRITERS[writer]
    await before(pool)
    await _in_review(pool, "o-2")
    async with pool.acquire() as connection:
        whoever = connection.transaction()
        await whoever.start()
        await connection.execute("SELECT FROM orders FOR NO KEY UPDATE")
        waiting = asyncio.create_task(write(pool))
        try:
            await until_waiting_for_a_lock(pool)
            # An INSERT cannot be told not to wait. A new row is not to be seen by others, but its key is taken.
            await connection.execute("SET LOCAL lock_timeout = '300ms'")
            await connection.execute(
                "INSERT INTO payments (payment_id, order_id, status) VALUES ('pay-o-1', 'o-1', 'INIT') "
                "ON CONFLICT DO NOTHING"
            )
            assert await connection.fetch("SELECT FROM payments WHERE payment_id = 'pay-o-1' FOR UPDATE NOWAIT")
        finally:
            await whoever.rollback()
            (outcome,) = await asyncio.gather(waiting, return_exceptions=True)
    assert outcome is None or (writer == "charge of another order" and isinstance(outcome, PaymentConflict))


@dataclass(frozen=True)
class Contest:
    """Attempts that were taken for dead, their successors and the reconciler, all at one payment."""

    before: Callable[[asyncpg.Pool, str], Awaitable[Any]]
    attempts: Callable[[asyncpg.Pool, str], list[Awaitable[Any]]]
    #: The order's state and its payment's in the end.
    ends: set[tuple[Step, str]]


CONTESTS = {
    "the first charge": Contest(
        _in_review,
        lambda pool, order_id: [
            PaymentRepository(pool).begin_charge(charge_of(order_id)),
            _charge(pool, order_id),
        ],
        {(Step.CHARGED, "CHARGED")},
    ),
    "an interrupted charge": Contest(
        _claimed,
        lambda pool, order_id: [
            PaymentRepository(pool).begin_charge(charge_of(order_id)),
            PaymentRepository(pool).complete_charge(charge_of(order_id), receipt_of(order_id)),
        ],
        {(Step.CHARGED, "CHARGED")},
    ),
    "a charge that is declined": Contest(
        _claimed,
        lambda pool, order_id: [
            PaymentRepository(pool).begin_charge(charge_of(order_id)),
            PaymentRepository(pool).fail_charge(charge_of(order_id), "declined"),
        ],
        {(Step.PAYMENT_FAILED, "FAILED")},
    ),
    "a refund and late charges": Contest(
        _charged,
        lambda pool, order_id: [
            PaymentRepository(pool).begin_charge(charge_of(order_id)),
            PaymentRepository(pool).complete_charge(charge_of(order_id), receipt_of(order_id)),
            _refund(pool, order_id),
        ],
        {(Step.CANCELLED, "REFUNDED")},
    ),
    "reconciled: charged after all": Contest(
        _in_doubt,
        lambda pool, order_id: [
            PaymentRepository(pool).begin_charge(charge_of(order_id)),
            PaymentRepository(pool).complete_charge(charge_of(order_id), receipt_of(order_id)),
            _charged_late(pool, order_id),
            _refund(pool, order_id),
        ],
        {(Step.CANCELLED, "REFUNDED")},
    ),
    "reconciled: not charged": Contest(
        _in_doubt,
        lambda pool, order_id: [
            PaymentRepository(pool).begin_charge(charge_of(order_id)),
            PaymentRepository(pool).fail_charge(charge_of(order_id), "declined"),
            LeftBehind(pool).never_charged(order_id, f"pay-{order_id}"),
        ],
        {(Step.CANCELLED, "FAILED")},
    ),
    "two orders that ask for each other's payment": Contest(
        lambda pool, order_id: asyncio.gather(_claimed(pool, order_id), _claimed(pool, f"{order_id}-b")),
        lambda pool, order_id: [
            PaymentRepository(pool).begin_charge(charge_with(order_id, f"{order_id}-b")),
            PaymentRepository(pool).begin_charge(charge_with(f"{order_id}-b", order_id)),
            PaymentRepository(pool).complete_charge(charge_of(order_id), receipt_of(order_id)),
            PaymentRepository(pool).complete_charge(charge_of(f"{order_id}-b"), receipt_of(f"{order_id}-b")),
        ],
        {(Step.CHARGED, "CHARGED"), (Step.PAYMENT_FAILED, "INIT")},
    ),
}


async def _charge(pool: asyncpg.Pool, order_id: str) -> None:
    """What the activity does, without its provider."""
    if not await PaymentRepository(pool).begin_charge(charge_of(order_id)):
        await PaymentRepository(pool).complete_charge(charge_of(order_id), receipt_of(order_id))


@pytest.mark.parametrize("contest", CONTESTS)
async def test_attempts_at_one_payment_never_wait_for_each_other_in_a_circle(pool: asyncpg.Pool, contest: str) -> None:
    """Twelve at a time, many times: some are refused, as they came too late, and none is PostgreSQL's victim."""
    before, attempts, ends = CONTESTS[contest].before, CONTESTS[contest].attempts, CONTESTS[contest].ends
    dice = random.Random(contest)
    for number in range(25):
        order_id = f"o-{number}"
        await before(pool, order_id)
        asked_at_once = [attempt for _ in range(4) for attempt in attempts(pool, order_id)]
        dice.shuffle(asked_at_once)
        outcomes = await asyncio.gather(*asked_at_once, return_exceptions=True)
        assert [each for each in outcomes if isinstance(each, Exception) and not isinstance(each, TrellisError)] == []
        row = await pool.fetchrow(
            "SELECT state, status FROM orders JOIN payments ON order_id = id WHERE id = $1", order_id
        )
        assert tuple(row) in ends
        timeline = await told(pool, order_id)
        assert len(timeline) == len(set(timeline))


# --- last_error ---------------------------------------------------------------------------------------------


async def test_last_error_shows_the_latest_attempt_and_is_cleared_by_the_next_step(pool: asyncpg.Pool) -> None:
    await put(pool, "o-1", Step.CHARGING)
    log = AttemptLog(pool)
    await log.failed(attempt(1), "PaymentUnavailable", "503", retryable=True)
    assert await last_error(pool) == "503"
    await log.failed(attempt(2), "PaymentUnavailable", "504", retryable=True)
    assert await last_error(pool) == "504"
    await enter(pool, Step.CHARGED)
    assert await last_error(pool) is None


async def test_last_error_is_cleared_by_a_success_that_moves_nothing(pool: asyncpg.Pool) -> None:
    await put(pool, "o-1", Step.CHARGED, last_error="503")
    await AttemptLog(pool).recovered(attempt(2))
    assert await last_error(pool) is None


async def test_last_error_of_a_closed_order_says_why_for_ever(pool: asyncpg.Pool) -> None:
    log = AttemptLog(pool)
    for step in sorted(FINAL_STEPS):
        await put(pool, step, step, last_error="why")
        await log.failed(attempt(order_id=step), "Error", "an afterthought", retryable=True)
        assert await last_error(pool, step) == "why"
        await log.recovered(attempt(2, order_id=step))
        assert await last_error(pool, step) == "why"
        # It is told nevertheless.
        assert await told(pool, step) == ["attempt_failed"]


async def test_failing_for_good_sets_last_error(pool: asyncpg.Pool) -> None:
    await put(pool, "o-1", Step.CHARGING)
    await enter(pool, Step.PAYMENT_FAILED, error="card_declined")
    assert await last_error(pool) == "card_declined"


async def test_attempts_are_told_with_the_error_that_made_them_necessary(pool: asyncpg.Pool) -> None:
    await put(pool, "o-1", Step.CHARGING)
    log = AttemptLog(pool)
    await log.failed(attempt(1), "PaymentUnavailable", "503", retryable=True)
    await log.retried(attempt(2))
    # The second attempt left no word: it ran out of time, or its worker died.
    await log.retried(attempt(3))
    rows = await pool.fetch("SELECT type, payload_json FROM events ORDER BY id")
    assert [tuple(row) for row in rows] == [
        (
            "attempt_failed",
            {
                "activity": "charge",
                "attempt": 1,
                "error_type": "PaymentUnavailable",
                "message": "503",
                "retryable": True,
            },
        ),
        ("attempt_retried", {"activity": "charge", "attempt": 2, "error_type": "PaymentUnavailable"}),
        ("attempt_retried", {"activity": "charge", "attempt": 3, "error_type": "TimedOut"}),
    ]


# --- orders -------------------------------------------------------------------------------------------------


async def test_view_shows_all_that_was_received(orders: OrderRepository, payments: PaymentRepository) -> None:
    items = [Item(sku="TEA-100", quantity=2, unit_price=Decimal("12.50"))]
    order = asked(items=items, currency="EUR", address=HOME, customer_id="c-42")
    await orders.receive(order, "run-1")
    view = await orders.view("o-1")
    assert view
    assert (view.order_id, view.workflow_id, view.run_id) == ("o-1", "order/o-1", "run-1")
    assert (view.step, view.last_error, view.customer_id) == (Step.RECEIVED, None, "c-42")
    assert (view.items, view.address) == (items, HOME)
    assert (view.total, view.currency, view.payment_id) == (Decimal("25.00"), "EUR", "pay-o-1")
    assert (view.payment, view.tracking, view.review_deadline) == (None, None, None)
    assert view.created_at <= view.step_since <= datetime.now(UTC) + timedelta(seconds=5)


async def test_view_follows_the_order_to_its_end(
    pool: asyncpg.Pool, orders: OrderRepository, payments: PaymentRepository, shipments: ShipmentRepository
) -> None:
    await _at(pool, Step.AWAITING_REVIEW)
    view = await orders.view("o-1")
    assert view
    assert view.review_deadline
    assert view.payment is None
    await payments.begin_charge(charge_of())
    view = await orders.view("o-1")
    assert view
    assert view.payment
    assert (view.payment.status, view.payment.amount, view.payment.provider_reference) == ("INIT", 0, None)
    await payments.complete_charge(charge_of(), RECEIPT)
    await shipments.prepare("o-1")
    await shipments.complete_dispatch("o-1", Handover(tracking="t-1"), pickup=False)
    view = await orders.view("o-1")
    assert view
    assert view.payment
    assert (view.payment.status, view.payment.amount, view.payment.provider_reference) == ("CHARGED", 50, "ch_1")
    assert (view.step, view.tracking) == (Step.SHIPPED, "t-1")


async def test_amounts_are_written_with_the_digits_of_their_currency(
    pool: asyncpg.Pool, orders: OrderRepository, payments: PaymentRepository
) -> None:
    for currency, price, digits in (("JPY", "50", "50"), ("USD", "0.5", "0.50")):
        order_id, money = f"o-{currency}", Money(amount=Decimal(price), currency=currency)
        item = Item(sku="TEA", quantity=1, unit_price=money.amount)
        await orders.receive(asked(order_id, items=[item], currency=currency), "run-1")
        await orders.open_review(asked(order_id))
        page = await orders.in_review(None, 1)
        (waiting,) = json.loads(page.model_dump_json())["reviews"]
        assert (waiting["total"], waiting["items"][0]["unit_price"]) == (digits, digits)
        charge = ChargeRequest(order_id=order_id, payment_id=f"pay-{order_id}", money=money)
        await payments.begin_charge(charge)
        await payments.complete_charge(charge, Receipt(reference=f"ch-{currency}", money=money))
        view = await orders.view(order_id)
        assert view
        written = json.loads(view.model_dump_json())
        assert (written["total"], written["payment"]["amount"]) == (digits, digits)
        (listed, *_) = json.loads((await orders.newest(None, None, 1)).model_dump_json())["orders"]
        assert listed["total"] == digits


async def test_unknown_orders_are_none(orders: OrderRepository) -> None:
    assert await orders.view("nobody") is None
    assert await orders.status("nobody") is None
    assert await orders.find_start("nobody", "nothing") is None
    assert (await orders.events("nobody")).events == []


async def test_status_is_step_and_last_error(pool: asyncpg.Pool, orders: OrderRepository) -> None:
    await put(pool, "o-1", Step.CHARGING, last_error="503")
    status = await orders.status("o-1")
    assert status
    assert status.model_dump() == {"order_id": "o-1", "step": "charging", "last_error": "503"}


async def test_find_start_prefers_the_order_over_its_payment(orders: OrderRepository) -> None:
    await orders.receive(asked("a", payment_id="pay-a"), "run-a")
    await orders.receive(asked("b", payment_id="pay-b"), "run-b")
    for order_id, payment_id, expected in (
        ("a", "pay-a", "a"),
        ("a", "pay-b", "a"),
        ("b", "pay-a", "b"),
        ("c", "pay-a", "a"),
        ("c", "pay-b", "b"),
    ):
        found = await orders.find_start(order_id, payment_id)
        assert found
        assert (found["id"], found["run_id"]) == (expected, f"run-{expected}")
        assert found["request_hash"] == asked(expected, payment_id=f"pay-{expected}").request.fingerprint


async def test_a_payment_id_of_another_order_is_rejected(
    pool: asyncpg.Pool, orders: OrderRepository, payments: PaymentRepository
) -> None:
    await _at(pool, Step.CHARGING)
    await orders.receive(asked("o-2", payment_id="pay-o-1"), "run-2")
    with pytest.raises(OrderRejected, match="pay-o-1 belongs to another order"):
        await orders.open_review(asked("o-2", payment_id="pay-o-1"))
    assert await state_of(pool, "o-2") == "rejected"
    assert await last_error(pool, "o-2") == "pay-o-1 belongs to another order"


async def test_address_is_taken_until_dispatch_starts(
    pool: asyncpg.Pool, orders: OrderRepository, shipments: ShipmentRepository
) -> None:
    for step in Step:
        await put(pool, step, step)
        assert await orders.change_address(AddressChange(order_id=step, address=HOME), "1") is not step.final
        parcel = await shipments.begin_dispatch(step)
        assert parcel.address == (None if step.final else HOME)
        assert not await orders.change_address(AddressChange(order_id=step, address=OFFICE), "2")
        assert (await shipments.begin_dispatch(step)).address == parcel.address
        taken = "address_refused" if step.final else "address_changed"
        assert await told(pool, step) == [taken, "address_refused"]


async def test_address_change_that_comes_late_does_not_undo_a_newer_one(
    pool: asyncpg.Pool, orders: OrderRepository
) -> None:
    await put(pool, "o-1", Step.CHARGED)
    assert await orders.change_address(AddressChange(order_id="o-1", address=HOME), "first")
    assert await orders.change_address(AddressChange(order_id="o-1", address=OFFICE), "second")
    assert await orders.change_address(AddressChange(order_id="o-1", address=HOME), "first")
    view = await orders.view("o-1")
    assert view
    assert view.address == OFFICE
    assert await told(pool) == ["address_changed", "address_changed"]


async def test_dispatch_waits_for_an_address_that_is_being_changed(
    pool: asyncpg.Pool, shipments: ShipmentRepository
) -> None:
    await put(pool, "o-1", Step.PREPARED, address_json=HOME.model_dump())
    async with pool.acquire() as connection:
        async with connection.transaction():
            await connection.execute("UPDATE orders SET address_json = $1 WHERE id = 'o-1'", OFFICE.model_dump())
            dispatch = asyncio.create_task(shipments.begin_dispatch("o-1"))
            await until_waiting_for_a_lock(pool)
        assert (await dispatch).address == OFFICE


async def test_events_past_the_last_one_seen(pool: asyncpg.Pool, orders: OrderRepository) -> None:
    for order_id in ("a", "b", "c"):
        await put(pool, order_id, Step.CHARGED)
        for number in range(3):
            await orders.note(NoteRequest(order_id=order_id, type=f"{order_id}{number}"), f"{number}")
    mine = (await orders.events("a")).events
    assert [event.type for event in mine] == ["a0", "a1", "a2"]
    assert [event.type for event in (await orders.events("a", mine[0].id)).events] == ["a1", "a2"]
    assert (await orders.events("a", mine[-1].id)).events == []
    theirs = (await orders.events("b")).events
    news = await orders.events_of_many({"a": mine[1].id, "b": theirs[0].id, "nobody": 0})
    assert [(order_id, event.type) for order_id, event in news] == [("a", "a2"), ("b", "b1"), ("b", "b2")]
    assert await orders.events_of_many({}) == []


# --- pages --------------------------------------------------------------------------------------------------


async def page_through(
    turn: Callable[[str | None], Awaitable[Any]], between: Callable[[], Awaitable[None]]
) -> list[list[str]]:
    """The ids on each page, with something happening between two pages."""
    pages, after = [], None
    for _ in range(100):
        page = await turn(after)
        rows = page.orders if hasattr(page, "orders") else page.reviews
        pages.append([row.order_id for row in rows])
        after = page.next
        if after is None:
            return pages
        await between()
    raise AssertionError("the pages never end")


async def test_pages_of_orders_are_complete_and_stable_while_orders_come_in(
    pool: asyncpg.Pool, orders: OrderRepository
) -> None:
    start = datetime(2026, 1, 1, tzinfo=UTC)
    # Three at each moment, so that pages end between orders of the same age.
    for number in range(50):
        await put(pool, f"o-{number:02}", Step.SHIPPED, created_at=start + timedelta(microseconds=number // 3))
    expected = [f"o-{number:02}" for number in reversed(range(50))]
    came = 0

    async def come_in() -> None:
        nonlocal came
        came += 1
        await put(pool, f"new-{came}", Step.RECEIVED)

    pages = await page_through(lambda after: orders.newest(None, after, 7), come_in)
    assert [*chain(*pages)] == expected
    assert [len(page) for page in pages] == [7] * 7 + [1]
    assert came == 7
    # Moves do not disturb the pages of one step either.
    in_step = await page_through(lambda after: orders.newest(Step.SHIPPED, after, 10), come_in)
    assert [*chain(*in_step)] == expected
    assert [len(page) for page in in_step] == [10] * 5
    assert {row.order_id for row in (await orders.newest(Step.RECEIVED, None, 200)).orders} == {
        f"new-{number}" for number in range(1, came + 1)
    }
    assert (await orders.newest(Step.CHARGED, None, 10)).model_dump() == {"orders": [], "next": None}


async def test_pages_of_reviews_are_complete_and_stable_while_orders_come_and_go(
    pool: asyncpg.Pool, orders: OrderRepository
) -> None:
    start = datetime.now(UTC) + timedelta(hours=1)
    for number in range(20):
        deadline = start + timedelta(seconds=number // 3)
        await put(pool, f"o-{number:02}", Step.AWAITING_REVIEW, review_deadline=deadline)
    await put(pool, "decided", Step.CHARGING, review_deadline=start)
    came = 0

    async def come_and_go() -> None:
        nonlocal came
        came += 1
        await put(pool, f"urgent-{came}", Step.AWAITING_REVIEW, review_deadline=start - timedelta(minutes=came))
        await enter(pool, Step.CHARGING, f"o-{came - 1:02}")  # one that was on an earlier page

    pages = await page_through(lambda after: orders.in_review(after, 6), come_and_go)
    assert [*chain(*pages)] == [f"o-{number:02}" for number in range(20)]
    page = await orders.in_review(None, 200)
    assert [row.order_id for row in page.reviews[:3]] == ["urgent-3", "urgent-2", "urgent-1"]
    assert all(one.review_deadline <= other.review_deadline for one, other in pairwise(page.reviews))
    assert 3400 < page.reviews[0].seconds_left < 3600


def cursor(position: bytes) -> str:
    return base64.urlsafe_b64encode(position).decode()


BAD_CURSORS = {
    "empty": "",
    "not base64": "x",
    "not ASCII": "é",
    "not JSON": cursor(b"what?"),
    "a number": cursor(b"5"),
    "an object": cursor(b'{"a":1,"b":2}'),
    "too short": cursor(b'["2026-01-01T00:00:00+00:00"]'),
    "no moment": cursor(b'["soon","o-1"]'),
    "no time zone": cursor(b'["2026-01-01T00:00:00","o-1"]'),
    "before time": cursor(b'["0001-01-01T00:00:00+14:00","o-1"]'),
    "after time": cursor(b'["9999-12-31T23:59:59-14:00","o-1"]'),
    "NUL": cursor(b'["2026-01-01T00:00:00+00:00","o\\u0000"]'),
    "half a character": cursor(b'["2026-01-01T00:00:00+00:00","\\ud800"]'),
    "no id": cursor(b'["2026-01-01T00:00:00+00:00",{}]'),
    "deep": cursor(b"[" * 40_000),
}


async def test_bad_cursor_is_an_invalid_request(orders: OrderRepository) -> None:
    for what, after in BAD_CURSORS.items():
        for turn in (lambda after: orders.newest(None, after, 10), lambda after: orders.in_review(after, 10)):
            outcome = (await asyncio.gather(turn(after), return_exceptions=True))[0]
            assert isinstance(outcome, InvalidRequest), f"{what}: {outcome!r}"
            assert str(outcome) == "The request is not valid: after: not a cursor from an earlier page"


# --- shipments ----------------------------------------------------------------------------------------------


async def test_a_shipment_needs_an_order(shipments: ShipmentRepository) -> None:
    with pytest.raises(OrderNotFound):
        await shipments.begin_dispatch("nobody")
    with pytest.raises(IllegalTransition):
        await shipments.prepare("nobody")


async def test_begin_dispatch_knows_a_parcel_that_was_taken(pool: asyncpg.Pool, shipments: ShipmentRepository) -> None:
    await _at(pool, Step.PREPARED)
    assert (await shipments.begin_dispatch("o-1")).handover is None
    await shipments.complete_dispatch("o-1", Handover(tracking="t-1"), pickup=False)
    await shipments.complete_dispatch("o-1", Handover(tracking="t-1"), pickup=False)
    parcel = await shipments.begin_dispatch("o-1")
    assert (parcel.handover, parcel.address) == (Handover(tracking="t-1"), HOME)
    assert (await told(pool))[-2:] == ["prepared", "shipped"]


async def test_a_recall_is_told_once_and_moves_nothing(pool: asyncpg.Pool, shipments: ShipmentRepository) -> None:
    await put(pool, "o-1", Step.PREPARED)
    for _ in range(2):
        await shipments.complete_recall("o-1")
    assert await told(pool) == ["recalled"]
    assert await state_of(pool) == "prepared"


# --- what the tables refuse ---------------------------------------------------------------------------------

CHECK, UNIQUE, FOREIGN = asyncpg.CheckViolationError, asyncpg.UniqueViolationError, asyncpg.ForeignKeyViolationError

REFUSED = {
    "order id empty": (CHECK, "INSERT INTO orders (id, state) VALUES ('', 'received')"),
    "order id with a slash": (CHECK, "INSERT INTO orders (id, state) VALUES ('a/b', 'received')"),
    "order id with a line break": (CHECK, "INSERT INTO orders (id, state) VALUES (E'a\n', 'received')"),
    "order id too long": (CHECK, "INSERT INTO orders (id, state) VALUES (repeat('a', 65), 'received')"),
    "order twice": (UNIQUE, "INSERT INTO orders (id, state) VALUES ('o-1', 'received')"),
    "unknown state": (CHECK, "INSERT INTO orders (id, state) VALUES ('o-2', 'lost')"),
    "review without deadline": (CHECK, "INSERT INTO orders (id, state) VALUES ('o-2', 'awaiting_review')"),
    "address that is none": (CHECK, "UPDATE orders SET address_json = '[]'"),
    "items that are none": (CHECK, "UPDATE orders SET items_json = '{}'"),
    "negative total": (CHECK, "UPDATE orders SET total = -1"),
    "currency in small letters": (CHECK, "UPDATE orders SET currency = 'usd'"),
    "payment of no order": (FOREIGN, "INSERT INTO payments (payment_id, order_id, status) VALUES ('p', 'x', 'INIT')"),
    "payment id twice": (UNIQUE, "INSERT INTO payments (payment_id, order_id, status) VALUES ('p-1', 'o-0', 'INIT')"),
    "second payment": (UNIQUE, "INSERT INTO payments (payment_id, order_id, status) VALUES ('p', 'o-1', 'INIT')"),
    "unknown status": (CHECK, "INSERT INTO payments (payment_id, order_id, status) VALUES ('p', 'o-0', 'OK')"),
    "negative amount": (CHECK, "UPDATE payments SET amount = -1"),
    "charged for nothing": (CHECK, "UPDATE payments SET status = 'CHARGED', amount = 0"),
    "charged another amount": (CHECK, "UPDATE payments SET status = 'CHARGED', amount = 49.99"),
    "refunded without a receipt": (
        CHECK,
        "INSERT INTO payments (payment_id, order_id, status, amount) VALUES ('p', 'o-0', 'REFUNDED', 5)",
    ),
    "asked for nothing": (CHECK, "UPDATE payments SET asked = 0"),
    "payment currency in small letters": (CHECK, "UPDATE payments SET currency = 'usd'"),
    "receipt of another payment": (
        UNIQUE,
        "INSERT INTO payments (payment_id, order_id, status, provider_reference) VALUES ('p', 'o-0', 'INIT', 'ch_1')",
    ),
    "payload that is none": (CHECK, "INSERT INTO events (order_id, type, payload_json) VALUES ('o-1', 'x', '[]')"),
    "event twice": (UNIQUE, "INSERT INTO events (order_id, type, key) VALUES ('o-1', 'x', 'k')"),
    "event with a number of its own": (
        asyncpg.GeneratedAlwaysError,
        "INSERT INTO events (id, order_id, type) VALUES (7, 'o-1', 'x')",
    ),
    "event updated": (asyncpg.InsufficientPrivilegeError, "UPDATE events SET type = 'y'"),
    "event updated, none found": (asyncpg.InsufficientPrivilegeError, "UPDATE events SET type = 'y' WHERE false"),
    "event deleted": (asyncpg.InsufficientPrivilegeError, "DELETE FROM events"),
    "events truncated": (asyncpg.InsufficientPrivilegeError, "TRUNCATE events"),
    "events merged": (
        asyncpg.InsufficientPrivilegeError,
        "INSERT INTO events (order_id, type, key) VALUES ('o-1', 'x', 'k') "
        "ON CONFLICT (order_id, key) DO UPDATE SET type = 'y'",
    ),
}


async def test_what_the_tables_refuse(pool: asyncpg.Pool) -> None:
    await put(pool, "o-0", Step.CHARGING)
    await put(pool, "o-1", Step.CHARGING)
    await pool.execute(
        "INSERT INTO payments (payment_id, order_id, status, asked, provider_reference) "
        "VALUES ('p-1', 'o-1', 'INIT', 50, 'ch_1')"
    )
    await pool.execute("INSERT INTO events (order_id, type, key) VALUES ('o-1', 'x', 'k')")
    everything = (
        "SELECT (SELECT json_agg(o ORDER BY id) FROM orders o)::text, (SELECT json_agg(p) FROM payments p)::text, "
        "(SELECT json_agg(e) FROM events e)::text"
    )
    before = await pool.fetchrow(everything)
    for what, (refusal, statement) in REFUSED.items():
        outcome = (await asyncio.gather(pool.execute(statement), return_exceptions=True))[0]
        assert isinstance(outcome, refusal), f"{what}: {outcome!r}"
    assert await pool.fetchrow(everything) == before


async def test_payments_go_with_their_order_and_its_timeline_stays(pool: asyncpg.Pool) -> None:
    await _at(pool, Step.CHARGED)
    before = await told(pool)
    await pool.execute("DELETE FROM orders WHERE id = 'o-1'")
    assert await pool.fetchval("SELECT count(*) FROM payments") == 0
    assert await told(pool) == before != []


async def test_published_columns_have_their_names_and_types(pool: asyncpg.Pool) -> None:
    rows = await pool.fetch(
        "SELECT table_name, column_name, data_type FROM information_schema.columns WHERE table_schema = 'public'"
    )
    columns = {(row["table_name"], row["column_name"]): row["data_type"] for row in rows}
    published = {
        "orders": {"id": "text", "state": "text", "address_json": "jsonb", "created_at": "timestamp with time zone"},
        "payments": {
            "payment_id": "text",
            "order_id": "text",
            "status": "text",
            "amount": "numeric",
            "created_at": "timestamp with time zone",
        },
        "events": {
            "id": "bigint",
            "order_id": "text",
            "type": "text",
            "payload_json": "jsonb",
            "ts": "timestamp with time zone",
        },
    }
    for table, expected in published.items():
        assert {name: columns.get((table, name)) for name in expected} == expected
    moments = {key: kind for key, kind in columns.items() if kind.startswith("timestamp")}
    assert set(moments.values()) == {"timestamp with time zone"}


# --- indexes ------------------------------------------------------------------------------------------------

#: The types of the first five parameters of what `events.moving` makes.
MOVING = "text, text, text[], jsonb, text"

#: Statement, parameter types and values, and the indexes that must carry it.
PLANS: dict[str, tuple[str, str, str, set[str]]] = {
    "newest": (order_sql._NEWEST, "text, timestamptz, text, int", "NULL, NULL, NULL, 51", {"orders_newest"}),
    "newest, a later page": (
        order_sql._NEWEST,
        "text, timestamptz, text, int",
        "NULL, now() - interval '4900 s', 'o-1', 51",
        {"orders_newest"},
    ),
    "newest in a step": (
        order_sql._NEWEST,
        "text, timestamptz, text, int",
        "'charging', NULL, NULL, 51",
        {"orders_newest_in_state"},
    ),
    "reviews": (
        order_sql._IN_REVIEW,
        "timestamptz, text, int",
        "NULL, NULL, 51",
        {"orders_in_review", "orders_newest_in_state", "orders_of_customer"},
    ),
    "reviews, a later page": (
        order_sql._IN_REVIEW,
        "timestamptz, text, int",
        "now(), 'o-1', 51",
        {"orders_in_review", "orders_newest_in_state", "orders_of_customer"},
    ),
    "start": (order_sql._FIND_START, "text, text", "'o-7', 'p-9'", {"orders_pkey", "orders_payment"}),
    "payment's owner": (order_sql._PAYMENT_OWNER, "text, text", "'p-7', 'o-9'", {"payments_pkey"}),
    "payment": (payment_sql._LOOK, "text", "'p-7'", {"payments_pkey", "orders_pkey"}),
    "payment to lock": (payment_sql._LOCK, "text", "'p-7'", {"payments_pkey", "orders_pkey"}),
    "status": (order_sql._STATUS, "text", "'o-7'", {"orders_pkey"}),
    "view": (order_sql._VIEW, "text", "'o-7'", {"orders_pkey", "payments_order_id_key", "events_order_id_key_key"}),
    "events": (order_sql._EVENTS, "text, bigint", "'o-7', 0", {"events_order_id_key_key"}),
    "events of many": (
        order_sql._EVENTS_OF_MANY,
        "text[], bigint[]",
        "ARRAY['o-7', 'o-9'], ARRAY[0, 0]",
        {"events_order_id_key_key"},
    ),
    "dispatch": (shipping_sql._FREEZE, "text", "'o-7'", {"orders_pkey"}),
    # `o-7` is shipped: it does not move, as often as it is asked.
    "move": (events._ENTER, MOVING, "'o-7', 'prepared', ARRAY['charged'], '{}', NULL", {"orders_pkey"}),
    "review to open": (
        order_sql._OPEN_REVIEW,
        f"{MOVING}, float, text",
        "'o-7', 'awaiting_review', ARRAY['received'], '{}', NULL, 10, 'p-7'",
        {"orders_pkey", "payments_pkey"},
    ),
    "charge to begin": (
        payment_sql._CLAIM_AND_ENTER,
        f"{MOVING}, text, numeric, text",
        "'o-7', 'charging', ARRAY['awaiting_review'], '{}', NULL, 'p-7', 50, 'USD'",
        {"orders_pkey"},
    ),
    "charge to write down": (
        payment_sql._SETTLE_AND_ENTER,
        f"{MOVING}, text, numeric, text",
        "'o-7', 'charged', ARRAY['charging'], '{}', NULL, 'p-7', 50, 'ch_7'",
        {"orders_pkey", "payments_pkey"},
    ),
    "handover to write down": (
        shipping_sql._TAKEN,
        f"{MOVING}, text",
        "'o-7', 'shipped', ARRAY['prepared'], '{}', NULL, 't-7'",
        {"orders_pkey"},
    ),
}


@asynccontextmanager
async def many_orders(url: str) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(url)
    try:
        await connection.execute("""
            INSERT INTO orders (id, state, payment_id, created_at, review_deadline, customer_id)
            SELECT 'o-' || n, CASE WHEN n % 50 = 0 THEN 'awaiting_review' WHEN n < 5 THEN 'charging' ELSE 'shipped' END,
                   'p-' || n, now() - n * interval '1 s', now() + n * interval '1 s',
                   CASE WHEN n % 3 > 0 THEN 'c-' || n % 500 END
            FROM generate_series(1, 5000) AS n;
            INSERT INTO payments (payment_id, order_id, status)
            SELECT 'p-' || n, 'o-' || n, 'INIT' FROM generate_series(1, 5000) AS n;
            INSERT INTO events (order_id, type)
            SELECT 'o-' || n, type FROM generate_series(1, 5000) AS n, (VALUES ('x'), ('y')) AS two (type);
            ANALYZE;
        """)
        yield connection
    finally:
        await connection.close()


async def test_statements_use_their_indexes_also_when_the_plan_is_kept(database_url: str) -> None:
    async with many_orders(database_url) as connection:
        for name, (statement, types, values, expected) in PLANS.items():
            await connection.execute(f"PREPARE asked ({types}) AS {statement}")
            # After five executions PostgreSQL may settle for one plan for all values.
            for _ in range(6):
                await connection.execute(f"EXECUTE asked ({values})")
            rows = await connection.fetch(f"EXPLAIN EXECUTE asked ({values})")
            plan = "\n".join(row[0] for row in rows)
            await connection.execute("DEALLOCATE asked")
            used = set(re.findall(r"(?:using|Bitmap Index Scan on) (\w+)", plan))
            assert used == expected, f"{name}:\n{plan}"
            assert "Seq Scan" not in plan, f"{name}:\n{plan}"
