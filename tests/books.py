"""The auditor: what must be true of every order, whatever crashed, repeated or raced.

It reads three books that do not know each other - the product's tables, the partners' own ledger and Temporal - and
says where they disagree. It reads only, so it may be asked at any time, also of a system under load:

    assert not await audit(pool, temporal=client)                    # everything has come to its end
    assert not await audit(pool, temporal=client, may_be_open=True)  # while orders are on their way
"""

from __future__ import annotations

import asyncio
import json
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from itertools import pairwise
from typing import Any

import asyncpg
from temporalio.client import Client, WorkflowExecutionStatus
from temporalio.service import RPCError, RPCStatusCode

from app.domain.steps import NEXT_STEPS, Step
from app.order.models import OrderResult, order_workflow_id
from app.shipping.models import shipping_workflow_id

#: The payment's status that belongs to each state; None: no row at all.
PAYMENT_OF: dict[Step, set[str | None]] = {
    Step.RECEIVED: {None},
    Step.AWAITING_REVIEW: {None},
    Step.CHARGING: {"INIT"},
    Step.CHARGED: {"CHARGED"},
    Step.PREPARED: {"CHARGED"},
    Step.SHIPPED: {"CHARGED"},
    Step.REJECTED: {None},
    Step.EXPIRED: {None},
    Step.CANCELLED: {None, "REFUNDED"},
    # Without a row when the payment id turned out to be that of another order.
    Step.PAYMENT_FAILED: {None, "FAILED"},
    Step.SHIPPING_FAILED: {"REFUNDED"},
}

#: Payments that a charge at the provider must stand behind. INIT is in doubt: there may be one.
_CHARGES_OF: dict[str | None, set[int]] = {
    None: {0},
    "INIT": {0, 1},
    "FAILED": {0},
    "CHARGED": {1},
    "REFUNDED": {1},
}


@dataclass(frozen=True)
class Charge:
    """Money the provider took."""

    id: str
    payment: str
    key: str | None
    amount: Decimal
    currency: str


@dataclass(frozen=True)
class Refund:
    """Money the provider gave back."""

    id: str
    payment: str
    amount: Decimal
    currency: str


@dataclass(frozen=True)
class Parcel:
    """What the carrier knows of an order."""

    order_id: str
    state: str
    tracking: str | None
    address: Any


@dataclass(frozen=True)
class Execution:
    """What Temporal knows of an order."""

    status: WorkflowExecutionStatus | None
    result: Step | None
    shipment: WorkflowExecutionStatus | None

    @property
    def running(self) -> bool:
        """Somebody still works on the order."""
        return WorkflowExecutionStatus.RUNNING in (self.status, self.shipment)


@dataclass(frozen=True)
class Books:
    """Everything that was written down, by order or payment id."""

    orders: Mapping[str, asyncpg.Record] = field(default_factory=dict)
    events: Mapping[str, list[asyncpg.Record]] = field(default_factory=dict)
    payments: Mapping[str, asyncpg.Record] = field(default_factory=dict)
    charges: Mapping[str, list[Charge]] = field(default_factory=dict)
    refunds: Mapping[str, list[Refund]] = field(default_factory=dict)
    parcels: Mapping[str, Parcel] = field(default_factory=dict)
    executions: Mapping[str, Execution] = field(default_factory=dict)


async def audit(
    pool: asyncpg.Pool,
    *,
    ledger: asyncpg.Pool | None = None,
    temporal: Client | None = None,
    orders: Collection[str] | None = None,
    may_be_open: bool = False,
) -> list[str]:
    """Everything that is wrong, one sentence each.

    Args:
        pool: the product's database.
        ledger: the partners' database, if it is another one.
        temporal: to compare with the workflows, too.
        orders: only these; all if None.
        may_be_open: orders may be on their way, if somebody works on them.
    """
    return find_problems(await read(pool, ledger=ledger, temporal=temporal, orders=orders), may_be_open=may_be_open)


async def read(
    pool: asyncpg.Pool,
    *,
    ledger: asyncpg.Pool | None = None,
    temporal: Client | None = None,
    orders: Collection[str] | None = None,
) -> Books:
    """The books as they are now; the product's and, in the same database, the partners' in one snapshot."""
    wanted = [row["id"] for row in await pool.fetch(_IDS, None if orders is None else list(orders))]
    # Temporal first: an order that is at work now may be at its end in the tables, which is no contradiction.
    executions = {} if temporal is None else await read_executions(temporal, wanted)
    async with pool.acquire() as connection, connection.transaction(isolation="repeatable_read", readonly=True):
        own = Books(
            orders=_by("id", await connection.fetch(_ORDERS, wanted)),
            events=_grouped("order_id", await connection.fetch(_EVENTS, wanted)),
            payments=_by("order_id", await connection.fetch(_PAYMENTS, wanted)),
        )
        theirs = await read_ledger(connection) if ledger is None else Books()
    if ledger is not None:
        async with ledger.acquire() as connection, connection.transaction(isolation="repeatable_read", readonly=True):
            theirs = await read_ledger(connection)
    return Books(own.orders, own.events, own.payments, theirs.charges, theirs.refunds, theirs.parcels, executions)


async def read_ledger(connection: Any) -> Books:
    """The sandbox partners' books; empty if nobody has asked them for anything yet."""
    if await connection.fetchval("SELECT to_regclass('sandbox.parcels') IS NULL"):
        return Books()
    return Books(
        charges=_grouped("payment", [Charge(**row) for row in await connection.fetch(_CHARGES)]),
        refunds=_grouped("payment", [Refund(**row) for row in await connection.fetch(_REFUNDS)]),
        parcels=_by("order_id", [Parcel(**row) for row in await connection.fetch(_PARCELS)]),
    )


async def read_executions(temporal: Client, orders: Collection[str]) -> dict[str, Execution]:
    """What Temporal says about orders and their shipments."""
    gate = asyncio.Semaphore(20)

    async def of(order_id: str) -> Execution:
        async with gate:
            handle = temporal.get_workflow_handle(order_workflow_id(order_id), result_type=OrderResult)
            status = await _status(temporal, handle.id)
            result = (await handle.result()).step if status is WorkflowExecutionStatus.COMPLETED else None
            return Execution(status, result, await _status(temporal, shipping_workflow_id(order_id)))

    return dict(zip(orders, await asyncio.gather(*map(of, orders)), strict=True))


async def _status(temporal: Client, workflow_id: str) -> WorkflowExecutionStatus | None:
    try:
        return (await temporal.get_workflow_handle(workflow_id).describe()).status
    except RPCError as error:
        if error.status is RPCStatusCode.NOT_FOUND:
            return None
        raise


def find_problems(books: Books, *, may_be_open: bool = False) -> list[str]:
    """Where the books are wrong or disagree."""
    problems = [
        f"{order_id} ({order['state']}): {problem}"
        for order_id, order in books.orders.items()
        for problem in _problems_of(books, order, may_be_open=may_be_open)
    ]
    # Two databases are not read in one snapshot: while orders are on their way, a charge may be newer than its row.
    return problems if may_be_open else problems + list(_strangers(books))


def _problems_of(books: Books, order: asyncpg.Record, *, may_be_open: bool) -> Iterator[str]:
    order_id, state = order["id"], Step(order["state"])
    yield from _timeline(order, books.events.get(order_id, []))
    yield from _money(order, books)
    yield from _goods(order, books)
    execution = books.executions.get(order_id)
    if not state.final and not may_be_open:
        yield "it did not come to an end"
    if execution is None:
        return
    if not state.final and not execution.running:
        yield f"nobody works on it: order {_name(execution.status)}, shipment {_name(execution.shipment)}"
    if execution.result is not None and execution.result is not state:
        yield f"the workflow's result is {execution.result}"
    if execution.status is WorkflowExecutionStatus.FAILED:
        yield "its workflow failed"


def _name(status: WorkflowExecutionStatus | None) -> str:
    return "unknown" if status is None else status.name


def _timeline(order: asyncpg.Record, events: list[asyncpg.Record]) -> Iterator[str]:
    """One event for each step entered, along the moves that exist, ending where the order is."""
    path = [Step(event["type"]) for event in events if event["type"] in set(Step)]
    if not path or path[0] is not Step.RECEIVED or events[0]["type"] != Step.RECEIVED:
        yield f"its timeline does not begin with received: {path}"
    for step, following in pairwise(path):
        if following not in NEXT_STEPS[step]:
            yield f"there is no way from {step} to {following}: {path}"
    if len(path) != len(set(path)):
        yield f"it entered a step twice: {path}"
    if path and path[-1] != order["state"]:
        yield f"its timeline ends at {path[-1]}"
    if any(earlier["ts"] > later["ts"] for earlier, later in pairwise(events)):
        yield "its events are not in the order of their times"


def _money(order: asyncpg.Record, books: Books) -> Iterator[str]:
    """Charged at most once; at the end the goods or the money; all books name the same sums."""
    payment = books.payments.get(order["id"])
    status = payment["status"] if payment else None
    if status not in PAYMENT_OF[Step(order["state"])]:
        yield f"its payment is {status}"
    told = [event["type"] for event in books.events.get(order["id"], [])].count("refunded")
    if told != (status == "REFUNDED"):
        yield f"{told} events tell of a refund, the payment is {status}"
    if payment is not None:
        charges = books.charges.get(payment["payment_id"], [])
        refunds = books.refunds.get(payment["payment_id"], [])
        yield from _movements(order, payment, charges, refunds)
        yield from _references(order, payment, charges, refunds)


def _movements(
    order: asyncpg.Record, payment: asyncpg.Record, charges: list[Charge], refunds: list[Refund]
) -> Iterator[str]:
    """What the provider moved is what the payment says."""
    status, final = payment["status"], Step(order["state"]).final
    if len(charges) not in _CHARGES_OF[status]:
        yield f"the payment is {status}, and the provider charged {len(charges)} times"
    # Until the order's end, the provider may know of a refund that is not written down yet.
    if len(refunds) > len(charges) or (final and len(refunds) != (status == "REFUNDED")):
        yield f"the payment is {status}, and the provider refunded {len(refunds)} times"
    moved: list[Charge | Refund] = [*charges, *refunds]
    for movement in moved:
        if (movement.amount, movement.currency) != (order["total"], order["currency"]):
            yield f"the order is {order['total']} {order['currency']}, the provider moved {movement}"
    if any(charge.key != payment["payment_id"] for charge in charges):
        yield "the provider was asked with another idempotency key than the payment id"


def _references(
    order: asyncpg.Record, payment: asyncpg.Record, charges: list[Charge], refunds: list[Refund]
) -> Iterator[str]:
    """A settled payment names the provider's own movements, and the order's price."""
    status = payment["status"]
    if status not in {"CHARGED", "REFUNDED"}:
        return
    if (payment["amount"], payment["currency"]) != (order["total"], order["currency"]):
        yield f"the payment is {payment['amount']} {payment['currency']}, the order another sum"
    if [payment["provider_reference"]] != [charge.id for charge in charges]:
        yield "the payment names another charge than the provider"
    if status == "REFUNDED" and [payment["refund_reference"]] != [refund.id for refund in refunds]:
        yield "the payment names another refund than the provider"


def _goods(order: asyncpg.Record, books: Books) -> Iterator[str]:
    """The carrier has the parcel exactly when the order is shipped, and it goes where the order says."""
    parcel, state = books.parcels.get(order["id"]), Step(order["state"])
    taken = parcel is not None and parcel.state == "taken"
    if state is Step.SHIPPED and not taken:
        yield "the carrier does not have the parcel"
    if taken and state.final and state is not Step.SHIPPED and not _carrier_was_silent(order, books):
        yield "the carrier has the parcel"
    if parcel is not None and taken and state is Step.SHIPPED:
        if parcel.tracking != order["tracking"]:
            yield f"it is tracked as {order['tracking']}, the carrier calls it {parcel.tracking}"
        if parcel.address != order["address_json"]:
            yield "the parcel went to another address"


def _carrier_was_silent(order: asyncpg.Record, books: Books) -> bool:
    """The shipment gave up on a carrier that did not even answer whether it has the parcel: the one known doubt."""
    return any(
        event["type"] == Step.SHIPPING_FAILED and "asked for it back" in event["payload_json"].get("reason", "")
        for event in books.events.get(order["id"], [])
    )


def _strangers(books: Books) -> Iterator[str]:
    """Money that moved without a payment. Only a payment's own row may be followed by a charge."""
    known = {payment["payment_id"] for payment in books.payments.values()}
    wanted = {order["payment_id"] for order in books.orders.values()}
    for payment in (wanted & books.charges.keys()) - known:
        yield f"the provider charged {payment}, which is no payment here"


_IDS = "SELECT id FROM orders WHERE $1::text[] IS NULL OR id = ANY($1) ORDER BY created_at, id"
_ORDERS = "SELECT * FROM orders WHERE id = ANY($1) ORDER BY created_at, id"
_EVENTS = "SELECT * FROM events WHERE order_id = ANY($1) ORDER BY id"
_PAYMENTS = "SELECT * FROM payments WHERE order_id = ANY($1)"
_CHARGES = "SELECT id, payment, idempotency_key AS key, amount, currency FROM sandbox.charges"
_REFUNDS = """
SELECT refunds.id, charges.payment, refunds.amount, refunds.currency
FROM sandbox.refunds JOIN sandbox.charges ON charges.id = refunds.charge_id
"""
_PARCELS = "SELECT order_id, state, tracking, address FROM sandbox.parcels"


def _by(key: str, rows: list[Any]) -> dict[str, Any]:
    return {_get(row, key): row for row in rows}


def _grouped(key: str, rows: list[Any]) -> dict[str, list[Any]]:
    groups: dict[str, list[Any]] = defaultdict(list)
    for row in rows:
        groups[_get(row, key)].append(row)
    return groups


def _get(row: Any, key: str) -> str:
    value: str = row[key] if isinstance(row, asyncpg.Record) else getattr(row, key)
    return value


def as_text(books: Books, order_id: str) -> str:
    """One order's timeline, to be read by whoever looks for the reason of a failed test."""
    return "\n".join(
        f"{event['ts']:%H:%M:%S.%f} {event['type']} {json.dumps(event['payload_json'])}"
        for event in books.events.get(order_id, [])
    )
