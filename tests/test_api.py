"""The HTTP contract, over a real port: what is taken, what is refused and how, and what a server that is down does."""

from __future__ import annotations

import asyncio
import functools
import json
import re
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import asyncpg
import httpx
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from temporalio.api.common.v1 import WorkflowExecution
from temporalio.api.workflowservice.v1 import DeleteWorkflowExecutionRequest
from temporalio.client import Client
from temporalio.service import RPCError, RPCStatusCode

from app.api import MAX_BODY_BYTES, MAX_FAULTS, create_app
from app.db.pool import migrate
from app.domain.steps import Step
from app.local.postgres import LocalPostgres
from app.local.process import free_port
from app.local.temporal import LocalTemporal
from app.main import create
from app.order.bodies import ReviewBody, StartOrderBody
from app.order.feed import EventFeed
from app.order.models import NoteRequest, OrderInput, StartOrder, order_workflow_id
from app.order.repository import OrderRepository
from app.settings import Settings
from app.shipping.models import AddressBody
from tests.support import serving, until, until_step
from tests.telemetry import environment, started, until_ready

if TYPE_CHECKING:
    from conftest import Servers

HOME = {"line1": "1 Main St", "city": "Springfield", "state": "IL", "zip": "62701"}
OFFICE = {"line1": "2 High St", "city": "Shelbyville", "state": "IL", "zip": "62565"}

JSON = {"Content-Type": "application/json"}
LIVE = {"Accept": "text/event-stream"}


def new_id(prefix: str = "o") -> str:
    """Workflow ids are for ever, and the tests share a Temporal."""
    return f"{prefix}-{uuid.uuid4().hex[:12]}"


# --- the product, once for all tests that do not need it for themselves -------------------------------------


@pytest.fixture(scope="module")
def shared_settings(servers: Servers, shared_database: str) -> Settings:
    return Settings(
        database_url=shared_database,
        temporal_address=servers.temporal_address,
        sandbox=True,
        order_task_queue=new_id("orders"),
        shipping_task_queue=new_id("shipping"),
        graceful_shutdown_timeout=5,
        dispatch_attempts=3,
    )


@pytest.fixture(scope="module")
async def shop(shared_settings: Settings) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the whole product: API and workers."""
    async with serving(create(shared_settings)) as url, httpx.AsyncClient(base_url=url, timeout=30) as client:
        yield client


@pytest.fixture(scope="module")
async def counter(shared_settings: Settings) -> AsyncIterator[httpx.AsyncClient]:
    """A client of an API behind which nobody works: what it starts stays as it was started."""
    nobody = shared_settings.model_copy(update={"order_task_queue": new_id("nobody"), "update_timeout": 0.3})
    async with serving(create_app(nobody)) as url, httpx.AsyncClient(base_url=url, timeout=30) as client:
        yield client


@pytest.fixture(scope="module")
async def temporal(servers: Servers) -> Client:
    return await Client.connect(servers.temporal_address)


@functools.cache
def documented() -> dict[str, Any]:
    """The OpenAPI document."""
    return create_app(Settings()).openapi()


def statuses_of(method: str, path: str) -> set[int]:
    """The statuses that OpenAPI documents for a call; empty for a call that there is none of."""
    for template, operations in documented()["paths"].items():
        if re.fullmatch(re.sub(r"{\w+}", "[^/]+", template), path) and method.lower() in operations:
            return {int(status) for status in operations[method.lower()]["responses"]}
    return set()


def problem(answer: httpx.Response, status: int, code: str = "") -> dict[str, Any]:
    """The body of an answer that is a problem, as documented."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    body = answer.json()
    assert body["status"] == status
    assert body["title"]
    assert body["code"] == (code or body["code"])
    known = statuses_of(answer.request.method, answer.request.url.path)
    assert not known or status in known, f"{answer.request.method} {answer.request.url.path} documents only {known}"
    return body


def fields(answer: httpx.Response) -> dict[str, str]:
    """The fields at fault and the rule each has broken."""
    body = problem(answer, 422, "InvalidRequest")
    assert all(fault["field"] in body["detail"] for fault in body["errors"][:5])
    return {fault["field"]: fault["rule"] for fault in body["errors"]}


async def exists(temporal: Client, order_id: str) -> bool:
    """Whether Temporal knows the order's workflow."""
    return not await forgotten(temporal, f"order/{order_id}")


async def forgotten(temporal: Client, workflow_id: str) -> bool:
    """Whether Temporal does not know the workflow, or no longer."""
    try:
        await temporal.get_workflow_handle(workflow_id).describe()
    except RPCError as error:
        if error.status is RPCStatusCode.NOT_FOUND:
            return True
        raise
    return False


async def accepted(client: httpx.AsyncClient, order_id: str | None = None, **request: Any) -> str:
    """Start an order; its id."""
    order_id = order_id or new_id()
    body = {"payment_id": f"pay-{order_id}", "review_timeout_seconds": 3600, **request}
    answer = await client.post(f"/orders/{order_id}/start", json=body)
    assert answer.status_code == 202, answer.text
    return order_id


async def in_review(client: httpx.AsyncClient, **request: Any) -> str:
    """An order that waits for its review; its id."""
    order_id = await accepted(client, **request)
    await until_step(client, order_id, "awaiting_review")
    return order_id


async def types_of(client: httpx.AsyncClient, order_id: str) -> list[str]:
    """The order's timeline, as types."""
    answer = await client.get(f"/orders/{order_id}/events")
    assert answer.status_code == 200
    return [event["type"] for event in answer.json()["events"]]


async def until_told(client: httpx.AsyncClient, order_id: str, event: str) -> None:
    async def told() -> bool:
        return event in await types_of(client, order_id)

    await until(told, f"{event} in the timeline")


#: Every call on one order, with a body that is valid.
CALLS: dict[str, tuple[str, str, Any]] = {
    "start": ("POST", "/start", {"payment_id": "pay-1"}),
    "approve": ("POST", "/signals/approve", None),
    "cancel": ("POST", "/signals/cancel", {}),
    "address": ("POST", "/signals/address", HOME),
    "status": ("GET", "/status", None),
    "view": ("GET", "", None),
    "events": ("GET", "/events", None),
    "review": ("POST", "/review", {"decision": "approve"}),
    "cancel, answered": ("POST", "/cancel", None),
    "address, answered": ("PUT", "/address", HOME),
}


async def call(client: httpx.AsyncClient, name: str, order_id: str) -> httpx.Response:
    method, path, body = CALLS[name]
    return await client.request(method, f"/orders/{order_id}{path}", json=body)


# --- what is refused ----------------------------------------------------------------------------------------

BAD_IDS = {
    "space": "%20",
    "line break": "o-1%0A",
    "NUL": "%00",
    "letter of another alphabet": "%C3%A9",
    "not UTF-8": "%FF",
    "question mark": "o%3F1",
    "colon": "o:1",
    "too long": "o" * 65,
}


@pytest.mark.parametrize("name", CALLS)
async def test_bad_order_id_is_refused_by_every_call(counter: httpx.AsyncClient, name: str) -> None:
    for what, order_id in BAD_IDS.items():
        rule = fields(await call(counter, name, order_id))["path.id"]
        assert ("at most 64 characters" if what == "too long" else "should match pattern") in rule, what


async def test_empty_order_id_is_another_path(counter: httpx.AsyncClient) -> None:
    for name in CALLS:
        if name == "view":
            continue  # `GET /orders/` is the list's address with a slash too many
        problem(await call(counter, name, ""), 404, "NotFound")


async def test_longest_order_id_and_payment_id_are_taken(counter: httpx.AsyncClient, temporal: Client) -> None:
    order_id = new_id("A.b_").ljust(64, "9")
    await accepted(counter, order_id, payment_id="p" * 128)
    assert await exists(temporal, order_id)


ITEM = {"sku": "TEA", "quantity": 1, "unit_price": "1.00"}


def with_item(**changes: Any) -> dict[str, Any]:
    return {"payment_id": "pay-1", "items": [ITEM | changes]}


def with_price(price: str) -> bytes:
    """Where JSON has a number."""
    return raw('{"payment_id": "p", "items": [{"sku": "a", "quantity": 1, "unit_price": ' + price + "}]}")


def raw(body: str) -> bytes:
    return body.encode()


PRICE = "body.items.0.unit_price"

#: Bodies of a start: the field at fault and a part of the rule.
BAD_STARTS: dict[str, tuple[Any, str, str]] = {
    "no body": (b"", "body", "required"),
    "null": (raw("null"), "body", "dictionary"),
    "a list": ([], "body", "dictionary"),
    "not JSON": (raw("payment_id=pay-1"), "body.0", "JSON"),
    "JSON that breaks off": (raw('{"payment_id": "pay-1"'), "body.22", "JSON"),
    "not UTF-8": (b'{"payment_id": "\xff"}', "body", "JSON"),
    "too deep": (raw("[" * 60_000), "body", "JSON"),
    "number without end": (raw('{"payment_id": "pay-1", "x": %s}' % ("9" * 5000)), "body", "JSON"),
    "no payment id": ({}, "body.payment_id", "required"),
    "payment id null": ({"payment_id": None}, "body.payment_id", "string"),
    "payment id empty": ({"payment_id": ""}, "body.payment_id", "at least 1 character"),
    "payment id too long": ({"payment_id": "p" * 129}, "body.payment_id", "at most 128 characters"),
    "payment id with a space": ({"payment_id": "pay 1"}, "body.payment_id", "match pattern"),
    "payment id with a line break": ({"payment_id": "pay-1\n"}, "body.payment_id", "match pattern"),
    "payment id is a number": ({"payment_id": 1}, "body.payment_id", "string"),
    "payment id is half a character": (raw('{"payment_id": "\\ud800"}'), "body.payment_id", "string"),
    "payment id NaN": (raw('{"payment_id": NaN}'), "body.payment_id", "string"),
    "unknown field": ({"payment_id": "pay-1", "amount": "5.00"}, "body.amount", "not permitted"),
    "items null": ({"payment_id": "pay-1", "items": None}, "body.items", "list"),
    "no items at all": ({"payment_id": "pay-1", "items": []}, "body.items", "at least 1 item"),
    "too many items": ({"payment_id": "pay-1", "items": [ITEM] * 101}, "body.items", "at most 100 items"),
    "payment id twice": (raw('{"payment_id": "pay-1", "payment_id": "pay-2"}'), "body", "`payment_id` is there more"),
    "the same value twice": (raw('{"payment_id": "p", "payment\\u005fid": "p"}'), "body", "`payment_id` is there more"),
    "price twice": (with_price('"1.00", "unit_price": "2.00"'), "body", "`unit_price` is there more than once"),
    "line twice": (
        raw('{"payment_id": "p", "address": {"line1": "a", "line1": "b", "city": "c", "state": "d", "zip": "e"}}'),
        "body",
        "`line1` is there more than once",
    ),
    "unknown key twice": (raw('{"payment_id": "p", "a": {"b": [{"c": 1, "c": 1}]}}'), "body", "`c` is there more"),
    "UTF-16": ('{"payment_id": "pay-1"}'.encode("utf-16"), "body", "JSON"),
    "unknown field of an item": (with_item(colour="red"), "body.items.0.colour", "not permitted"),
    "no sku": ({"payment_id": "pay-1", "items": [{"quantity": 1, "unit_price": "1"}]}, "body.items.0.sku", "required"),
    "no quantity": (
        {"payment_id": "pay-1", "items": [{"sku": "TEA", "unit_price": "1"}]},
        "body.items.0.quantity",
        "required",
    ),
    "no price": ({"payment_id": "pay-1", "items": [{"sku": "TEA", "quantity": 1}]}, PRICE, "required"),
    "quantity null": (with_item(quantity=None), "body.items.0.quantity", "integer"),
    "a currency of its own": (with_item(currency="EUR"), "body.items.0.currency", "not permitted"),
    "currency null": ({"payment_id": "pay-1", "currency": None}, "body.currency", "string"),
    "quantity 0": (with_item(quantity=0), "body.items.0.quantity", "greater than or equal to 1"),
    "quantity negative": (with_item(quantity=-1), "body.items.0.quantity", "greater than or equal to 1"),
    "quantity too large": (with_item(quantity=10_001), "body.items.0.quantity", "less than or equal to 10000"),
    "quantity a half": (with_item(quantity=0.5), "body.items.0.quantity", "integer"),
    "quantity a text": (with_item(quantity="1"), "body.items.0.quantity", "integer"),
    "quantity true": (with_item(quantity=True), "body.items.0.quantity", "integer"),
    "quantity Infinity": (
        raw('{"payment_id": "p", "items": [{"sku": "a", "quantity": Infinity, "unit_price": "1"}]}'),
        "body.items.0.quantity",
        "integer",
    ),
    "price with three decimals": (with_item(unit_price="1.001"), PRICE, "2 decimal places"),
    "price with many decimals": (with_price("1e-999999999"), PRICE, "2 decimal places"),
    "price that a float would round": (with_price("19.99999999999999999"), PRICE, "2 decimal places"),
    "price with an underscore": (with_item(unit_price="1_000"), PRICE, "not a decimal number"),
    "price in digits of another script": (with_item(unit_price="\u0661\u0662"), PRICE, "not a decimal number"),
    "price with spaces": (with_item(unit_price=" 12 "), PRICE, "not a decimal number"),
    "price with a line feed": (with_item(unit_price="12\n"), PRICE, "not a decimal number"),
    "price with an exponent": (with_item(unit_price="5E+1"), PRICE, "not a decimal number"),
    "price with a plus": (with_item(unit_price="+5"), PRICE, "not a decimal number"),
    "price true": (with_item(unit_price=True), PRICE, "not a decimal number"),
    "price negative": (with_item(unit_price="-0.01"), PRICE, "greater than or equal to 0"),
    "price too large": (with_item(unit_price="1000000.01"), PRICE, "less than or equal to 1000000.00"),
    "price enormous": (with_price("1e999999999"), PRICE, "less than or equal to 1000000.00"),
    "price beyond every decimal": (with_price("1e9999999999999999999"), "body", "JSON"),
    "price NaN as a text": (with_item(unit_price="NaN"), PRICE, "not a decimal number"),
    "price infinite as a text": (with_item(unit_price="-Infinity"), PRICE, "not a decimal number"),
    "price NaN": (with_price("NaN"), PRICE, "finite"),
    "price Infinity": (with_price("Infinity"), PRICE, "finite"),
    "price beyond a double": (with_price("1e999"), PRICE, "less than or equal to 1000000.00"),
    "price of words": (with_item(unit_price="ten"), PRICE, "decimal"),
    "price null": (with_item(unit_price=None), PRICE, "Decimal"),
    "nothing to pay": (with_item(unit_price="0.00"), "body.items", "more than 0"),
    "total over the limit": (with_item(unit_price="600000", quantity=2), "body.items", "at most 1000000.00"),
    "half a yen": (with_item(unit_price="0.5") | {"currency": "JPY"}, PRICE, "JPY has 0 digits"),
    "unknown currency": ({"payment_id": "pay-1", "currency": "XXX"}, "body.currency", "unknown currency"),
    "currency whose upper case is one": ({"payment_id": "p", "currency": "u\u017fd"}, "body.currency", "match pattern"),
    "currency is a number": ({"payment_id": "pay-1", "currency": 840}, "body.currency", "string"),
    "review window 0": (
        {"payment_id": "p", "review_timeout_seconds": 0},
        "body.review_timeout_seconds",
        "or equal to 1",
    ),
    "review window of a month and a second": (
        {"payment_id": "p", "review_timeout_seconds": 30 * 86400 + 1},
        "body.review_timeout_seconds",
        "less than or equal to 2592000",
    ),
    "review window NaN": (
        raw('{"payment_id": "p", "review_timeout_seconds": NaN}'),
        "body.review_timeout_seconds",
        "integer",
    ),
    "customer id with a space": ({"payment_id": "p", "customer_id": "Jane Doe"}, "body.customer_id", "match pattern"),
    "address is a text": ({"payment_id": "p", "address": "1 Main St"}, "body.address", "dictionary"),
}


@pytest.mark.parametrize("name", BAD_STARTS)
async def test_bad_start_is_refused_and_starts_nothing(counter: httpx.AsyncClient, temporal: Client, name: str) -> None:
    body, field, rule = BAD_STARTS[name]
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    order_id = new_id()
    faults = fields(await counter.post(f"/orders/{order_id}/start", content=content, headers=JSON))
    assert list(faults) == [field]
    assert rule in faults[field]
    assert not await exists(temporal, order_id)
    # The status asks the tables first.
    problem(await counter.get(f"/orders/{order_id}/status"), 404, "OrderNotFound")


@asynccontextmanager
async def priced(settings: Settings, **changes: Any) -> AsyncIterator[httpx.AsyncClient]:
    """A client of an API with a payment provider of its own, behind which nobody works."""
    changes |= {"payment_url": "http://127.0.0.1:9/payments", "order_task_queue": new_id("nobody")}
    async with (
        serving(create_app(settings.model_copy(update=changes))) as url,
        httpx.AsyncClient(base_url=url, timeout=30) as client,
    ):
        yield client


def test_the_demo_price_is_on_by_itself_only_where_the_sandbox_takes_the_payments() -> None:
    assert Settings().demo_price_in_force == Decimal("50.00")
    assert Settings(demo_price=0).demo_price_in_force is None
    assert Settings(payment_url="https://p.example.com").demo_price_in_force is None
    assert Settings(payment_url="https://p.example.com", demo_price="9.90").demo_price_in_force == Decimal("9.90")


async def test_a_decision_on_what_has_changed_is_a_conflict(shop: httpx.AsyncClient) -> None:
    order_id = await in_review(shop, address=HOME)
    (task,) = [
        task for task in (await shop.get("/reviews?limit=200")).json()["reviews"] if task["order_id"] == order_id
    ]
    assert task["digest"] == (await shop.get(f"/orders/{order_id}")).json()["digest"]
    assert (await shop.put(f"/orders/{order_id}/address", json=OFFICE)).status_code == 200
    review, decision = f"/orders/{order_id}/review", {"decision": "approve", "digest": task["digest"]}
    problem(await shop.post(review, json=decision), 409, "ReviewOutdated")
    assert "pattern" in fields(await shop.post(review, json=decision | {"digest": "abc"}))["body.digest"]
    now = (await shop.get(f"/orders/{order_id}")).json()["digest"]
    assert (await shop.post(review, json=decision | {"digest": now})).status_code == 200


async def test_an_order_without_items_needs_a_price_for_it(shared_settings: Settings, temporal: Client) -> None:
    order_id = new_id()
    start, body = f"/orders/{order_id}/start", {"payment_id": f"pay-{order_id}"}
    async with priced(shared_settings) as client:
        for without in (body, body | {"currency": "EUR"}):
            assert "TRELLIS_DEMO_PRICE" in fields(await client.post(start, json=without))["body.items"]
        assert not await exists(temporal, order_id)
        assert await accepted(client, items=[ITEM])
    async with priced(shared_settings, demo_price=Decimal("12.50")) as client:
        assert "JPY" in fields(await client.post(start, json=body | {"currency": "JPY"}))["body.items"]
        assert not await exists(temporal, order_id)
        assert (await client.post(start, json=body)).status_code == 202


async def test_the_same_start_is_the_same_order_also_where_its_price_is_gone(
    shared_settings: Settings, shop: httpx.AsyncClient
) -> None:
    order_id = await in_review(shop)
    body = {"payment_id": f"pay-{order_id}", "review_timeout_seconds": 3600}
    async with priced(shared_settings) as client:
        again = await client.post(f"/orders/{order_id}/start", json=body)
    assert again.json() == (await shop.post(f"/orders/{order_id}/start", json=body)).json()


@pytest.mark.parametrize("path", ["start", "signals/approve", "signals/address", "review", "cancel"])
async def test_a_body_that_does_not_say_it_is_json_is_told_how(counter: httpx.AsyncClient, path: str) -> None:
    """What `curl -d` sends unless told otherwise."""
    form = {"content-type": "application/x-www-form-urlencoded"}
    answer = await counter.post(f"/orders/{new_id()}/{path}", content=b'{"payment_id":"pay-1"}', headers=form)
    assert fields(answer) == {"body": "not read as JSON: send the header `Content-Type: application/json`"}


async def test_every_fault_is_named(counter: httpx.AsyncClient) -> None:
    body = {
        "items": [ITEM | {"quantity": 0}, ITEM | {"unit_price": "-1"}],
        "currency": "XXX",
        "address": {"line1": "", "city": "x"},
        "gift": True,
    }
    faults = fields(await counter.post(f"/orders/{new_id()}/start", json=body))
    assert set(faults) == {
        "body.payment_id",
        "body.items.0.quantity",
        "body.items.1.unit_price",
        "body.currency",
        "body.address.line1",
        "body.address.state",
        "body.address.zip",
        "body.gift",
    }


async def test_every_price_that_does_not_fit_its_currency_is_named(counter: httpx.AsyncClient) -> None:
    items = [ITEM | {"unit_price": price} for price in ("0.5", "1", "1.50")]
    body = {"payment_id": "pay-1", "items": items, "currency": "JPY"}
    assert fields(await counter.post(f"/orders/{new_id()}/start", json=body)) == {
        "body.items.0.unit_price": "JPY has 0 digits after the decimal point",
        "body.items.2.unit_price": "JPY has 0 digits after the decimal point",
    }


async def test_prices_are_read_as_they_are_written(counter: httpx.AsyncClient, temporal: Client) -> None:
    for price, read in (
        ("9.99", "9.99"),
        ('"9.99"', "9.99"),
        ("12", "12.00"),
        ('"12.500"', "12.50"),
        ("5e1", "50.00"),
        ("999999.99", "999999.99"),
    ):
        order_id = new_id()
        content = b"\xef\xbb\xbf" + with_price(price).replace(b'"p"', f'"pay-{order_id}"'.encode())
        answer = await counter.post(f"/orders/{order_id}/start", content=content, headers=JSON)
        assert answer.status_code == 202, answer.text
        history = await temporal.get_workflow_handle(order_workflow_id(order_id)).fetch_history()
        started = history.events[0].workflow_execution_started_event_attributes.input.payloads[0].data
        assert json.loads(started)["request"]["items"][0]["unit_price"] == read


async def test_what_is_repeated_of_a_request_can_be_seen_and_has_a_limit(counter: httpx.AsyncClient) -> None:
    body = {"payment_id": "p", **{f"\u202e{'x' * 100}{number}": 1 for number in range(400)}}
    answer = await counter.post(f"/orders/{new_id()}/start", json=body)
    assert answer.status_code == 422
    assert len(answer.json()["errors"]) == MAX_FAULTS
    assert answer.json()["errors"][0]["field"] == "body.\ufffd" + "x" * 63
    assert "\u202e" not in answer.text
    twice = await counter.post(f"/orders/{new_id()}/start", content=b'{"\\u202e":1,"\\u202e":2}', headers=JSON)
    assert fields(twice) == {"body": "the key `\ufffd` is there more than once"}


def padded(size: int) -> bytes:
    """A valid start of exactly so many bytes."""
    return b'{"payment_id": "pay-1"}'.ljust(size)


async def chunks(body: bytes) -> AsyncIterator[bytes]:
    """A body that does not say how long it is."""
    for start in range(0, len(body), 10_000):
        yield body[start : start + 10_000]


@pytest.mark.parametrize("sent", [lambda body: body, chunks], ids=["announced", "chunked"])
async def test_body_over_64_kib_is_refused(
    counter: httpx.AsyncClient, temporal: Client, sent: Callable[[bytes], Any]
) -> None:
    order_id = new_id()
    too_large = padded(MAX_BODY_BYTES + 1)
    for method, path in (("POST", "/start"), ("POST", "/signals/approve"), ("PUT", "/address"), ("POST", "/review")):
        answer = await counter.request(method, f"/orders/{order_id}{path}", content=sent(too_large), headers=JSON)
        assert problem(answer, 413, "BodyTooLarge")["detail"] == "at most 65536 bytes"
    assert not await exists(temporal, order_id)
    largest = await counter.post(f"/orders/{order_id}/start", content=sent(padded(MAX_BODY_BYTES)), headers=JSON)
    assert largest.status_code == 202


#: A soft hyphen, a space without width, turns of the direction, a byte order mark, a tag, line breaks of Unicode, and
#: what is private or means nothing.
UNREADABLE = "\u00ad\u200b\u202e\u2066\u2069\u200f\u061c\ufeff\U000e0041\u2028\u2029\ue000\uffff\U000f0000"

BAD_ADDRESSES: dict[str, tuple[Any, str, str]] = {
    **{f"no {field}": ({k: v for k, v in HOME.items() if k != field}, field, "required") for field in HOME},
    **{f"blank {field}": (HOME | {field: " \t "}, field, "at least 1 character") for field in HOME},
    **{f"{field} null": (HOME | {field: None}, field, "string") for field in HOME},
    **{f"NUL in {field}": (HOME | {field: "a\x00b"}, field, "U+0000") for field in HOME},
    "line break": (HOME | {"line1": "1 Main St\nBack door"}, "line1", "U+000A"),
    "escape": (HOME | {"city": "\x1b[31mred"}, "city", "U+001B"),
    "C1 control": (HOME | {"city": "a\x85b"}, "city", "U+0085"),
    **{f"U+{ord(char):04X}": (HOME | {"city": f"a{char}b"}, "city", f"U+{ord(char):04X}") for char in UNREADABLE},
    "joiners alone": (HOME | {"zip": "\u200d\u200c"}, "zip", "nothing of it can be seen"),
    "a filler alone": (HOME | {"zip": "\u3164"}, "zip", "nothing of it can be seen"),
    "line1 too long": (HOME | {"line1": "x" * 201}, "line1", "at most 200"),
    "city too long": (HOME | {"city": "x" * 101}, "city", "at most 100"),
    "state too long": (HOME | {"state": "x" * 65}, "state", "at most 64"),
    "zip too long": (HOME | {"zip": "x" * 17}, "zip", "at most 16"),
    "zip is a number": (HOME | {"zip": 62701}, "zip", "string"),
    "unknown field": (HOME | {"country": "US"}, "country", "not permitted"),
    "a list": ([HOME], "", "dictionary"),
    "no body": (None, "", "required"),
}


async def test_bad_address_is_refused_and_changes_nothing(shop: httpx.AsyncClient) -> None:
    order_id = await in_review(shop, address=HOME)
    for what, (address, field, rule) in BAD_ADDRESSES.items():
        place = f"body.{field}".rstrip(".")
        for method, path in (("POST", "signals/address"), ("PUT", "address")):
            faults = fields(await shop.request(method, f"/orders/{order_id}/{path}", json=address))
            assert list(faults) == [place], what
            assert rule in faults[place], what
        if address is not None:
            other = f"/orders/{new_id()}/start"
            faults = fields(await shop.post(other, json={"payment_id": "pay-1", "address": address}))
            assert list(faults) == [place.replace("body", "body.address")], what
    assert (await shop.get(f"/orders/{order_id}")).json()["address"] == HOME
    assert await types_of(shop, order_id) == ["received", "awaiting_review"]


async def test_addresses_of_the_world_are_taken(shop: httpx.AsyncClient) -> None:
    order_id = await in_review(shop)
    for address in (
        {"line1": "〒100-8111 千代田1-1", "city": "東京", "state": "東京都", "zip": "100-8111"},
        # With the joiners that some scripts and emoji are written with.
        {"line1": "नेहरू मार्ग क्\u200d", "city": "👩\u200d🌾 Farm", "state": "-", "zip": "0"},
        {"line1": "x" * 200, "city": "x" * 100, "state": "x" * 64, "zip": "x" * 16},
    ):
        answer = await shop.put(f"/orders/{order_id}/address", json={key: f" {text} " for key, text in address.items()})
        assert answer.json() == {"order_id": order_id, "step": "awaiting_review"}
        assert (await shop.get(f"/orders/{order_id}")).json()["address"] == address


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "body.decision"),
        ({"decision": "maybe"}, "body.decision"),
        ({"decision": "approve", "note": "x" * 501}, "body.note"),
        ({"decision": "approve", "note": "a\x00b"}, "body.note"),
        ({"decision": "approve", "note": "paid\u202ediap"}, "body.note"),
        ({"decision": "approve", "note": "\u200d"}, "body.note"),
        ({"decision": "approve", "note": None}, "body.note"),
        ({"decision": "approve", "by": "Jane"}, "body.by"),
        ("approve", "body"),
    ],
)
async def test_bad_review_is_refused(counter: httpx.AsyncClient, body: Any, field: str) -> None:
    assert list(fields(await counter.post(f"/orders/{new_id()}/review", json=body))) == [field]


@pytest.mark.parametrize("path", ["signals/approve", "signals/cancel", "cancel"])
async def test_calls_without_a_body_take_none_or_an_empty_one(counter: httpx.AsyncClient, path: str) -> None:
    order_id = new_id()
    assert list(fields(await counter.post(f"/orders/{order_id}/{path}", json={"reason": "late"}))) == ["body.reason"]
    assert list(fields(await counter.post(f"/orders/{order_id}/{path}", json=[]))) == ["body"]
    await accepted(counter, order_id)
    for content in (b"", b"{}", b"null"):
        answer = await counter.post(f"/orders/{order_id}/{path}", content=content, headers=JSON if content else {})
        # Nobody works here, so an update stays without an answer.
        assert answer.status_code == (202 if "signals" in path else 503)


async def test_bad_queries_are_refused(counter: httpx.AsyncClient) -> None:
    for path, field in (
        ("/orders?limit=0", "query.limit"),
        ("/orders?limit=201", "query.limit"),
        ("/orders?limit=ten", "query.limit"),
        ("/orders?limit=1_0", "query.limit"),
        ("/orders?limit=%2010%20", "query.limit"),
        ("/orders?limit=10.0", "query.limit"),
        ("/orders?limit=%D9%A1", "query.limit"),
        ("/orders?step=lost", "query.step"),
        ("/reviews?limit=0", "query.limit"),
    ):
        assert list(fields(await counter.get(path))) == [field]
    for path in ("/orders?after=x", "/orders?after=", "/reviews?after=WyJ4Il0="):
        assert problem(await counter.get(path), 422)["detail"] == "after: not a cursor from an earlier page"


async def test_a_parameter_that_a_call_does_not_have_is_refused(counter: httpx.AsyncClient) -> None:
    for path, field in (
        ("/orders?customer=c-1", "query.customer"),
        ("/orders?Step=shipped", "query.Step"),
        ("/orders/o-1?fields=step", "query.fields"),
        ("/orders/o-1/status?verbose=", "query.verbose"),
        ("/orders/o-1/events?after=1", "query.after"),
        ("/reviews?step=shipped", "query.step"),
        ("/reviews?limit=1&limit=2", "query.limit"),
    ):
        assert list(fields(await counter.get(path))) == [field]
    answer = await counter.post("/orders/o-1/signals/approve?force=true")
    assert fields(answer) == {"query.force": "there is no such parameter"}
    assert len((await counter.get(f"/orders?{'x' * 2000}=1")).text) < 500


async def test_the_root_leads_to_the_documentation(counter: httpx.AsyncClient) -> None:
    answer = await counter.get("/")
    assert answer.status_code == 307
    assert answer.headers["location"] == "/docs"


async def test_unknown_path_and_method_are_problems_too(counter: httpx.AsyncClient) -> None:
    for path in ("/order", "/orders/o-1/start/now", "/orders/o-1/signals/refund", "/orders/a%2Fb/status"):
        problem(await counter.get(path), 404, "NotFound")
    for method, path, allowed in (
        ("DELETE", "/orders/o-1", {"GET"}),
        ("GET", "/orders/o-1/start", {"POST"}),
        ("POST", "/orders/o-1/address", {"PUT"}),
        ("PATCH", "/orders", {"GET"}),
    ):
        answer = await counter.request(method, path)
        problem(answer, 405, "MethodNotAllowed")
        assert set(answer.headers["allow"].split(", ")) == allowed


async def test_no_answer_repeats_what_was_sent(shop: httpx.AsyncClient) -> None:
    canary = "Kanarienvogel"
    order_id = await in_review(shop)
    sent: list[tuple[str, str, bytes]] = []
    for field in HOME:
        for broken in (f"{canary}\x00", canary * 20, [canary], {canary: 1}):
            address = dict.fromkeys(HOME, canary) | {field: broken}
            body = json.dumps(address).encode()
            sent += [("POST", "signals/address", body), ("PUT", "address", body)]
            sent += [("POST", "start", json.dumps({"payment_id": "p", "address": address}).encode())]
    sent += [
        ("POST", "signals/address", f'{{"line1": "{canary}", "city": NaN}}'.encode()),
        ("POST", "signals/address", f'{{"line1": "{canary}'.encode()),
        ("POST", "signals/address", canary.encode() + b"\xff"),
        ("POST", "signals/address", canary.encode() * 10_000),
        ("POST", "review", json.dumps({"decision": canary}).encode()),
        ("POST", "review", json.dumps({"decision": "approve", "note": canary * 100}).encode()),
        ("POST", "start", json.dumps({"payment_id": canary + " "}).encode()),
        ("POST", "start", json.dumps({"payment_id": "p", "currency": canary}).encode()),
        ("POST", "start", json.dumps({"payment_id": "p", "customer_id": canary + "!"}).encode()),
        ("POST", "start", json.dumps({"payment_id": "p", "items": [ITEM | {"unit_price": canary}]}).encode()),
    ]
    for method, path, content in sent:
        answer = await shop.request(method, f"/orders/{order_id}/{path}", content=content, headers=JSON)
        problem(answer, answer.status_code)
        assert answer.status_code in {413, 422}, content
        assert canary not in answer.text
        assert canary not in str(answer.headers)
    for path in (f"/orders/{canary}!/status", f"/orders?after={canary}", f"/orders?step={canary}", f"/{canary}"):
        assert canary not in (await shop.get(path)).text
    answer = await shop.get(f"/orders/{order_id}/events", headers=LIVE | {"Last-Event-ID": canary})
    assert canary not in answer.text


json_like = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.decimals().map(str),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=10,
)
#: Requests in which any part may be anything, often enough what it should be.
start_like = st.fixed_dictionaries(
    {"payment_id": st.just("pay-1") | json_like},
    optional={
        "items": json_like
        | st.lists(
            st.fixed_dictionaries(
                {
                    "sku": st.just("TEA") | json_like,
                    "quantity": st.integers() | json_like,
                    "unit_price": st.decimals(places=2, allow_nan=False, allow_infinity=False).map(str) | json_like,
                }
            ),
            max_size=3,
        ),
        "currency": st.sampled_from(["USD", "JPY"]) | json_like,
        "address": st.fixed_dictionaries({name: st.text(max_size=20) | json_like for name in HOME}) | json_like,
        "review_timeout_seconds": st.integers() | json_like,
        "customer_id": json_like,
        "surprise": json_like,
    },
)


@hypothesis_settings(
    max_examples=120,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(body=start_like | json_like)
async def test_no_body_breaks_the_start(counter: httpx.AsyncClient, body: Any) -> None:
    order_id = new_id()
    content = json.dumps(body).encode("utf-8", "surrogatepass")
    answer = await counter.post(f"/orders/{order_id}/start", content=content, headers=JSON)
    if answer.status_code == 202:
        assert answer.json()["order_id"] == order_id
    else:
        assert fields(answer)


# --- orders that nobody knows -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in CALLS if name != "start"])
async def test_unknown_order_is_not_found(counter: httpx.AsyncClient, name: str) -> None:
    order_id = new_id()
    assert problem(await call(counter, name, order_id), 404, "OrderNotFound")["detail"] == order_id


async def test_unknown_order_has_no_live_timeline(counter: httpx.AsyncClient) -> None:
    problem(await counter.get(f"/orders/{new_id()}/events", headers=LIVE), 404, "OrderNotFound")


# --- start --------------------------------------------------------------------------------------------------


async def test_start_again_is_the_same_order(counter: httpx.AsyncClient, temporal: Client) -> None:
    order_id = new_id()
    body = {"payment_id": "pay-1", "items": [ITEM], "address": HOME}
    first = await counter.post(f"/orders/{order_id}/start", json=body)
    assert first.status_code == 202
    description = await temporal.get_workflow_handle(f"order/{order_id}").describe()
    assert first.json() == {
        "order_id": order_id,
        "workflow_id": f"order/{order_id}",
        "run_id": description.run_id,
    }
    # The same request, written differently.
    same = {
        "items": [{"unit_price": 1, "quantity": 1, "sku": "TEA"}],
        "currency": "USD",
        "customer_id": None,
        "address": HOME | {"city": "  Springfield "},
        "payment_id": "pay-1",
    }
    for again in (body, same):
        answer = await counter.post(f"/orders/{order_id}/start", json=again)
        assert (answer.status_code, answer.json()) == (202, first.json())


@pytest.mark.parametrize(
    "change",
    [
        {"payment_id": "pay-2"},
        {"items": [ITEM]},
        {"currency": "EUR"},
        {"address": HOME},
        {"review_timeout_seconds": 7},
        {"customer_id": "c-1"},
    ],
    ids=lambda change: next(iter(change)),
)
async def test_another_request_under_the_same_id_is_a_conflict(counter: httpx.AsyncClient, change: Any) -> None:
    order_id = new_id()
    body = {"payment_id": "pay-1"}
    first = await counter.post(f"/orders/{order_id}/start", json=body)
    other = await counter.post(f"/orders/{order_id}/start", json=body | change)
    assert problem(other, 409, "OrderConflict")["detail"] == f"{order_id} was started with another request"
    again = await counter.post(f"/orders/{order_id}/start", json=body)
    assert (again.status_code, again.json()) == (202, first.json())


async def test_fifty_equal_starts_at_once_are_one_order(counter: httpx.AsyncClient, temporal: Client) -> None:
    order_id = new_id()
    answers = await asyncio.gather(
        *(counter.post(f"/orders/{order_id}/start", json={"payment_id": "pay-1"}) for _ in range(50))
    )
    assert {answer.status_code for answer in answers} == {202}
    (run_id,) = {answer.json()["run_id"] for answer in answers}
    assert (await temporal.get_workflow_handle(f"order/{order_id}").describe()).run_id == run_id


async def test_of_fifty_conflicting_starts_at_once_one_request_wins(counter: httpx.AsyncClient) -> None:
    order_id = new_id()
    bodies = [{"payment_id": f"pay-{number % 10}"} for number in range(50)]
    answers = await asyncio.gather(*(counter.post(f"/orders/{order_id}/start", json=body) for body in bodies))
    won = {body["payment_id"] for body, answer in zip(bodies, answers, strict=True) if answer.status_code == 202}
    assert len(won) == 1
    for body, answer in zip(bodies, answers, strict=True):
        if body["payment_id"] not in won:
            problem(answer, 409, "OrderConflict")
        else:
            assert answer.status_code == 202
    assert len({answer.json()["run_id"] for answer in answers if answer.status_code == 202}) == 1


async def test_fifty_equal_starts_at_once_while_the_workers_work(shop: httpx.AsyncClient) -> None:
    order_id = new_id()
    body = {"payment_id": f"pay-{order_id}", "review_timeout_seconds": 3600}
    answers = await asyncio.gather(*(shop.post(f"/orders/{order_id}/start", json=body) for _ in range(50)))
    assert {answer.status_code for answer in answers} == {202}
    assert len({answer.text for answer in answers}) == 1
    await until_step(shop, order_id, "awaiting_review")
    assert await types_of(shop, order_id) == ["received", "awaiting_review"]


async def test_order_that_ended_before_it_was_written_down_is_not_started_again(
    counter: httpx.AsyncClient, temporal: Client
) -> None:
    order_id = new_id()
    body = {"payment_id": "pay-1"}
    first = await counter.post(f"/orders/{order_id}/start", json=body)
    await temporal.get_workflow_handle(f"order/{order_id}").terminate()
    again = await counter.post(f"/orders/{order_id}/start", json=body)
    assert (again.status_code, again.json()) == (202, first.json())
    other = await counter.post(f"/orders/{order_id}/start", json={"payment_id": "pay-2"})
    problem(other, 409, "OrderConflict")


async def test_payment_id_of_another_order_is_a_conflict(shop: httpx.AsyncClient, temporal: Client) -> None:
    owner = await in_review(shop)
    order_id = new_id()
    answer = await shop.post(f"/orders/{order_id}/start", json={"payment_id": f"pay-{owner}"})
    assert problem(answer, 409, "PaymentConflict")["detail"] == f"pay-{owner} belongs to another order"
    assert not await exists(temporal, order_id)


async def test_status_is_received_until_a_worker_has_written_the_order_down(counter: httpx.AsyncClient) -> None:
    order_id = await accepted(counter)
    answer = await counter.get(f"/orders/{order_id}/status")
    assert answer.json() == {"order_id": order_id, "step": "received", "last_error": None}
    assert (await counter.get(f"/orders/{order_id}/events")).json() == {"events": []}


# --- a life -------------------------------------------------------------------------------------------------


async def test_published_calls_lead_to_a_shipped_order(shop: httpx.AsyncClient) -> None:
    order_id = new_id()
    assert (await shop.post(f"/orders/{order_id}/start", json={"payment_id": f"pay-{order_id}"})).status_code == 202
    answer = await shop.post(f"/orders/{order_id}/signals/address", json=HOME)
    assert (answer.status_code, answer.json()) == (202, {"order_id": order_id, "signal": "address"})
    answer = await shop.post(f"/orders/{order_id}/signals/approve")
    assert (answer.status_code, answer.json()) == (202, {"order_id": order_id, "signal": "approve"})
    await until_step(shop, order_id, "shipped")
    answer = await shop.get(f"/orders/{order_id}/status")
    assert answer.json() == {"order_id": order_id, "step": "shipped", "last_error": None}
    view = (await shop.get(f"/orders/{order_id}")).json()
    assert (view["address"], view["payment"]["status"], view["payment"]["amount"]) == (HOME, "CHARGED", "50.00")
    assert view["tracking"]


async def test_cancel_signal_before_the_charge_charges_nothing(shop: httpx.AsyncClient) -> None:
    order_id = await in_review(shop)
    answer = await shop.post(f"/orders/{order_id}/signals/cancel", json={})
    assert (answer.status_code, answer.json()) == (202, {"order_id": order_id, "signal": "cancel"})
    await until_step(shop, order_id, "cancelled")
    assert (await shop.get(f"/orders/{order_id}")).json()["payment"] is None


async def test_updates_answer_with_the_step(shop: httpx.AsyncClient) -> None:
    rejected = await in_review(shop)
    answer = await shop.post(f"/orders/{rejected}/review", json={"decision": "reject", "note": "  not today "})
    assert answer.status_code == 200
    assert answer.json()["order_id"] == rejected
    await until_step(shop, rejected, "rejected")
    events = (await shop.get(f"/orders/{rejected}/events")).json()["events"]
    assert events[-1]["payload"] == {"reason": "rejected by the review", "note": "not today"}
    view = (await shop.get(f"/orders/{rejected}")).json()
    assert (view["review_note"], view["reason"]) == ("not today", "rejected by the review")
    cancelled = await in_review(shop)
    answer = await shop.post(f"/orders/{cancelled}/cancel")
    assert answer.status_code == 200
    await until_step(shop, cancelled, "cancelled")


async def test_amounts_are_texts_with_the_digits_of_their_currency(shop: httpx.AsyncClient) -> None:
    item = ITEM | {"quantity": 3}
    for request, price, total in (
        ({}, None, "50.00"),
        ({"currency": "JPY"}, None, "50"),
        ({"items": [item | {"unit_price": "0.5"}], "currency": "EUR"}, "0.50", "1.50"),
        ({"items": [item | {"unit_price": 0.1}], "currency": "EUR"}, "0.10", "0.30"),
        ({"items": [item | {"unit_price": "40"}], "currency": "JPY"}, "40", "120"),
    ):
        order_id = await in_review(shop, **request)
        (review,) = [
            each for each in (await shop.get("/reviews?limit=200")).json()["reviews"] if each["order_id"] == order_id
        ]
        assert review["total"] == total
        assert (await shop.post(f"/orders/{order_id}/review", json={"decision": "approve"})).status_code == 200
        await until_step(shop, order_id, "shipped")
        view = (await shop.get(f"/orders/{order_id}")).json()
        assert (view["total"], view["payment"]["amount"]) == (total, total)
        assert [line["unit_price"] for line in view["items"]] == ([price] if price else [])
        events = {
            event["type"]: event["payload"] for event in (await shop.get(f"/orders/{order_id}/events")).json()["events"]
        }
        assert (events["received"]["amount"], events["charged"]["amount"]) == (total, total)


# --- too late -----------------------------------------------------------------------------------------------


WHOLE_LIFE = ["received", "awaiting_review", "charging", "charged", "prepared", "shipped"]

#: A deletion waits until these queues have said that they are done with the workflow: every half minute, by default.
FORGETFUL = {f"history.{queue}ProcessorUpdateAckInterval": "0.1s" for queue in ("transfer", "visibility", "timer")}


@asynccontextmanager
async def own_temporal(folder: Path, dynamic_config: dict[str, object] | None = None) -> AsyncIterator[LocalTemporal]:
    """A Temporal of the test's own, which it may stop and start."""
    server = LocalTemporal(
        folder / "temporal", log=folder / "temporal.log", dynamic_config=dynamic_config, durable=False
    )
    await server.start()
    try:
        yield server
    finally:
        await server.kill()


async def shipped(shop: httpx.AsyncClient, **request: Any) -> str:
    order_id = await in_review(shop, **request)
    assert (await shop.post(f"/orders/{order_id}/review", json={"decision": "approve"})).status_code == 200
    await until_step(shop, order_id, "shipped")
    return order_id


async def forget(temporal: Client, workflow_id: str) -> None:
    """What Temporal does by itself when its retention ends."""
    await temporal.workflow_service.delete_workflow_execution(
        DeleteWorkflowExecutionRequest(
            namespace=temporal.namespace, workflow_execution=WorkflowExecution(workflow_id=workflow_id)
        )
    )
    await until(lambda: forgotten(temporal, workflow_id), f"{workflow_id} to be deleted")


async def test_closed_order_stays_what_it_is_also_after_temporal_forgot_it(settings: Settings, tmp_path: Path) -> None:
    async with own_temporal(tmp_path, FORGETFUL) as server:
        temporal = await Client.connect(server.address)
        mine = settings.model_copy(update={"temporal_address": server.address})
        async with serving(create(mine)) as url, httpx.AsyncClient(base_url=url, timeout=30) as client:
            order_id = new_id()
            body = {"payment_id": f"pay-{order_id}", "review_timeout_seconds": 3600}
            first = await client.post(f"/orders/{order_id}/start", json=body)
            await client.post(f"/orders/{order_id}/signals/approve")
            await until_step(client, order_id, "shipped")
            # The row is there first; a signal that comes between is taken, and told as ignored.
            await temporal.get_workflow_handle(f"order/{order_id}").result()
            await closed_for_ever(client, order_id, body, first.json())
            await forget(temporal, f"order/{order_id}")
            await closed_for_ever(client, order_id, body, first.json())
            assert not await exists(temporal, order_id)


async def closed_for_ever(client: httpx.AsyncClient, order_id: str, body: Any, first: Any) -> None:
    """A shipped order, whatever is asked of it."""
    again = await client.post(f"/orders/{order_id}/start", json=body)
    assert (again.status_code, again.json()) == (202, first)
    other = await client.post(f"/orders/{order_id}/start", json=body | {"payment_id": "pay-other"})
    problem(other, 409, "OrderConflict")
    thief = await client.post(f"/orders/{new_id()}/start", json=body)
    problem(thief, 409, "PaymentConflict")
    approval = await client.post(f"/orders/{order_id}/review", json={"decision": "approve"})
    assert (approval.status_code, approval.json()) == (200, {"order_id": order_id, "step": "charging"})
    late = {name: await call(client, name, order_id) for name in CALLS if "address" in name or "cancel" in name}
    late["approve"] = await call(client, "approve", order_id)
    late["reject"] = await client.post(f"/orders/{order_id}/review", json={"decision": "reject"})
    for name, answer in late.items():
        assert problem(answer, 409, "TooLate")["detail"] == f"{order_id} is shipped", name
    status = await client.get(f"/orders/{order_id}/status")
    assert status.json() == {"order_id": order_id, "step": "shipped", "last_error": None}
    assert await types_of(client, order_id) == WHOLE_LIFE


async def test_too_many_signals_are_429_until_there_is_room_again(shop: httpx.AsyncClient) -> None:
    order_id = await in_review(shop)
    limit = Settings().changes_per_order
    taken = 0
    while (answer := await call(shop, "address", order_id)).status_code == 202:
        taken += 1
        assert taken < 2 * limit
    # On a slow machine there is room for some more by then.
    assert taken >= limit
    assert problem(answer, 429, "TooManyChanges")["detail"] == f"{order_id}: address"
    assert 0 < int(answer.headers["retry-after"]) <= 36
    assert (await call(shop, "approve", order_id)).status_code == 202
    await until_step(shop, order_id, "shipped")


async def test_order_whose_workflow_was_lost_is_503_and_not_too_late(shop: httpx.AsyncClient, temporal: Client) -> None:
    order_id = await in_review(shop)
    await temporal.get_workflow_handle(f"order/{order_id}").terminate()
    for name in ("approve", "cancel", "address", "review", "cancel, answered", "address, answered"):
        answer = await call(shop, name, order_id)
        assert problem(answer, 503, "OrderLost")["detail"].startswith(f"{order_id} is awaiting_review"), name
        assert answer.headers["retry-after"] == "60"


async def test_a_repeated_decision_is_answered_as_the_first(shop: httpx.AsyncClient) -> None:
    order_id = await in_review(shop)
    first, again = [await call(shop, "review", order_id) for _ in range(2)]
    assert (first.status_code, first.json()) == (200, {"order_id": order_id, "step": "charging"})
    assert (again.status_code, again.json()) == (200, first.json())
    await until_step(shop, order_id, "shipped")
    assert (await call(shop, "review", order_id)).json() == first.json()


async def test_an_idempotency_key_makes_calls_one_change(shop: httpx.AsyncClient) -> None:
    order_id = await in_review(shop)
    for key in ("k-1", "k-1", "k-2"):
        answer = await shop.put(f"/orders/{order_id}/address", json=HOME, headers={"Idempotency-Key": key})
        assert answer.status_code == 200
    assert (await types_of(shop, order_id)).count("address_changed") == 2
    long = await shop.put(f"/orders/{order_id}/address", json=HOME, headers={"Idempotency-Key": "k" * 201})
    assert "header.idempotency-key" in fields(long)


async def test_review_that_comes_too_late_is_refused_or_told(shop: httpx.AsyncClient) -> None:
    # The provider is down for this payment, so the order stays where it is.
    order_id = await in_review(shop, payment_id=new_id("pay-down"))
    assert (await shop.post(f"/orders/{order_id}/review", json={"decision": "approve"})).status_code == 200
    await until_step(shop, order_id, "charging")
    late = await shop.post(f"/orders/{order_id}/review", json={"decision": "reject"})
    assert problem(late, 409, "TooLate")["detail"] == f"{order_id}: the order is charging"
    assert (await shop.post(f"/orders/{order_id}/signals/approve")).status_code == 202
    await until_told(shop, order_id, "approve_ignored")
    # What is being retried is there to be seen.
    status = (await shop.get(f"/orders/{order_id}/status")).json()
    assert set(status) == {"order_id", "step", "last_error"}
    assert status["step"] == "charging"
    await until_told(shop, order_id, "attempt_failed")
    assert "The payment provider did not answer" in (await shop.get(f"/orders/{order_id}/status")).json()["last_error"]


async def test_address_that_comes_too_late_is_refused_or_told(shop: httpx.AsyncClient) -> None:
    # Nobody takes parcels there, so the handover is tried again and again.
    nowhere = HOME | {"zip": "00005"}
    order_id = await in_review(shop, address=nowhere)
    await shop.post(f"/orders/{order_id}/signals/approve")
    await until_told(shop, order_id, "attempt_failed")
    late = await shop.put(f"/orders/{order_id}/address", json=OFFICE)
    assert problem(late, 409, "TooLate")["detail"] == f"{order_id}: the parcel is being handed over"
    assert (await shop.post(f"/orders/{order_id}/signals/address", json=OFFICE)).status_code == 202

    async def refused_twice() -> bool:
        return (await types_of(shop, order_id)).count("address_refused") == 2

    await until(refused_twice, "both refusals in the timeline")
    assert (await shop.get(f"/orders/{order_id}")).json()["address"] == nowhere


async def test_cancel_that_comes_too_late_is_refused_and_told(
    shop: httpx.AsyncClient, shared_settings: Settings
) -> None:
    # The carrier takes this parcel at once and answers three seconds later.
    order_id = await in_review(shop, address=HOME | {"zip": "00003"})
    await shop.post(f"/orders/{order_id}/signals/approve")
    async with asyncpg.create_pool(shared_settings.database_url.get_secret_value(), min_size=1, max_size=1) as pool:

        async def taken() -> bool:
            return await pool.fetchval("SELECT EXISTS (SELECT FROM sandbox.parcels WHERE order_id = $1)", order_id)

        await until(taken, "the carrier to take the parcel")
    signal = await shop.post(f"/orders/{order_id}/signals/cancel")
    update = await shop.post(f"/orders/{order_id}/cancel")
    assert signal.status_code == 202
    assert f"{order_id}" in problem(update, 409, "TooLate")["detail"]
    await until_step(shop, order_id, "shipped")
    await until_told(shop, order_id, "cancel_refused")
    assert (await shop.get(f"/orders/{order_id}")).json()["payment"]["status"] == "CHARGED"


# --- lists --------------------------------------------------------------------------------------------------


async def put(pool: asyncpg.Pool, order_id: str, state: Step, age: int, **columns: Any) -> None:
    now = datetime.now(UTC)
    values = {"created_at": now - timedelta(minutes=age), "review_deadline": now + timedelta(minutes=age), **columns}
    places = ", ".join(f"${place}" for place in range(3, len(values) + 3))
    await pool.execute(
        f"INSERT INTO orders (id, state, {', '.join(values)}) VALUES ($1, $2, {places})",
        order_id,
        state,
        *values.values(),
    )


async def pages_of(client: httpx.AsyncClient, path: str, key: str) -> list[list[str]]:
    """The order ids on each page."""
    pages, after = [], None
    for _ in range(50):
        answer = await client.get(f"{path}&after={after}" if after else path)
        assert answer.status_code == 200
        pages.append([row["order_id"] for row in answer.json()[key]])
        after = answer.json()["next"]
        if after is None:
            return pages
    raise AssertionError("the pages never end")


async def test_orders_are_listed_newest_first_in_pages(api_alone: httpx.AsyncClient, pool: asyncpg.Pool) -> None:
    assert (await api_alone.get("/orders")).json() == {"orders": [], "next": None}
    for number in range(10):
        await put(pool, f"o-{number}", Step.SHIPPED if number % 2 else Step.CHARGING, 10 - number)
    newest = [f"o-{number}" for number in reversed(range(10))]
    assert await pages_of(api_alone, "/orders?", "orders") == [newest]
    assert await pages_of(api_alone, "/orders?limit=4", "orders") == [newest[:4], newest[4:8], newest[8:]]
    assert await pages_of(api_alone, "/orders?limit=2&step=shipped", "orders") == [
        *[["o-9", "o-7"], ["o-5", "o-3"], ["o-1"]]
    ]
    assert await pages_of(api_alone, "/orders?step=expired", "orders") == [[]]


async def test_orders_of_one_customer_are_listed_and_counted(api_alone: httpx.AsyncClient, pool: asyncpg.Pool) -> None:
    for number in range(4):
        await put(pool, f"hers-{number}", Step.SHIPPED, 100 - number, customer_id="c-1")
    await put(pool, "hers-now", Step.AWAITING_REVIEW, 1, customer_id="c-1", payment_id="pay-now")
    await put(pool, "his", Step.AWAITING_REVIEW, 2, customer_id="c-2")
    await put(pool, "nobodys", Step.AWAITING_REVIEW, 3)
    assert await pages_of(api_alone, "/orders?customer_id=c-1&limit=3", "orders") == [
        ["hers-now", "hers-3", "hers-2"],
        ["hers-1", "hers-0"],
    ]
    assert await pages_of(api_alone, "/orders?customer_id=c-2&step=shipped", "orders") == [[]]
    reviews = {each["order_id"]: each for each in (await api_alone.get("/reviews")).json()["reviews"]}
    assert {name: each["earlier_orders"] for name, each in reviews.items()} == {
        "hers-now": 4,
        "his": 0,
        "nobodys": None,
    }
    assert reviews["hers-now"]["payment_id"] == "pay-now"


async def test_a_line_of_the_list(api_alone: httpx.AsyncClient, pool: asyncpg.Pool) -> None:
    request = StartOrder(payment_id="pay-1", customer_id="c-42", items=[ITEM])
    await OrderRepository(pool).receive(OrderInput(order_id="o-1", request=request), "run-1")
    (line,) = (await api_alone.get("/orders")).json()["orders"]
    moments = {key: datetime.fromisoformat(line.pop(key)) for key in ("created_at", "step_since")}
    assert all(moment.tzinfo for moment in moments.values())
    assert line == {
        "order_id": "o-1",
        "step": "received",
        "last_error": None,
        "payment_id": "pay-1",
        "total": "1.00",
        "currency": "USD",
        "customer_id": "c-42",
    }


async def test_reviews_are_listed_most_urgent_first_with_their_deadlines(
    api_alone: httpx.AsyncClient, pool: asyncpg.Pool
) -> None:
    for number in (3, 1, 5, 2, 4):
        await put(pool, f"o-{number}", Step.AWAITING_REVIEW, number, items_json=[ITEM], total=1)
    await put(pool, "decided", Step.CHARGING, 0)
    urgent = [f"o-{number}" for number in range(1, 6)]
    assert await pages_of(api_alone, "/reviews?", "reviews") == [urgent]
    assert await pages_of(api_alone, "/reviews?limit=2", "reviews") == [urgent[:2], urgent[2:4], urgent[4:]]
    first = (await api_alone.get("/reviews?limit=1")).json()["reviews"][0]
    deadline = datetime.fromisoformat(first["review_deadline"])
    assert 0 < first["seconds_left"] <= 60
    assert abs((deadline - datetime.now(UTC)).total_seconds() - first["seconds_left"]) < 10
    assert (first["items"], first["total"], first["currency"]) == ([ITEM], "1.00", "USD")


async def test_review_deadline_is_the_window_that_was_asked_for(shop: httpx.AsyncClient) -> None:
    order_id = await in_review(shop, review_timeout_seconds=1000)
    reviews = {each["order_id"]: each for each in (await shop.get("/reviews?limit=200")).json()["reviews"]}
    assert 900 < reviews[order_id]["seconds_left"] <= 1000
    await shop.post(f"/orders/{order_id}/cancel")
    await until_step(shop, order_id, "cancelled")
    assert order_id not in {each["order_id"] for each in (await shop.get("/reviews?limit=200")).json()["reviews"]}


# --- timelines ----------------------------------------------------------------------------------------------


async def test_timeline_is_told_in_order_with_one_event_per_step(shop: httpx.AsyncClient) -> None:
    order_id = await shipped(shop)
    answer = await shop.get(f"/orders/{order_id}/events")
    assert list(answer.json()) == ["events"]
    events = answer.json()["events"]
    assert all(set(event) == {"id", "type", "ts", "payload"} for event in events)
    assert [event["id"] for event in events] == sorted({event["id"] for event in events})
    moments = [datetime.fromisoformat(event["ts"]) for event in events]
    assert moments == sorted(moments)
    assert all(moment.tzinfo for moment in moments)
    assert [event["type"] for event in events] == WHOLE_LIFE
    payloads = {event["type"]: event["payload"] for event in events}
    assert payloads["received"] == {"payment_id": f"pay-{order_id}", "amount": "50.00", "currency": "USD"}
    assert payloads["charged"].items() >= {"amount": "50.00", "currency": "USD"}.items()
    assert payloads["shipped"]["pickup"] is True


class LiveEvents:
    """What arrives of a `text/event-stream`."""

    def __init__(self, lines: AsyncIterator[str]) -> None:
        self._lines = lines

    async def next(self) -> dict[str, str] | None:
        """The next event, None at the end of the stream."""
        event: dict[str, str] = {}
        async for line in self._lines:
            if not line and event:
                return event
            name, _, text = line.partition(": ")
            if name:
                event[name] = text
        return None

    async def rest(self) -> list[dict[str, str]]:
        events = []
        while event := await self.next():
            events.append(event)
        return events


@asynccontextmanager
async def live(client: httpx.AsyncClient, order_id: str, last_event_id: str = "") -> AsyncIterator[LiveEvents]:
    headers = LIVE | ({"Last-Event-ID": last_event_id} if last_event_id else {})
    async with asyncio.timeout(60), client.stream("GET", f"/orders/{order_id}/events", headers=headers) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.headers["cache-control"] == "no-cache, no-transform"
        yield LiveEvents(answer.aiter_lines())


async def test_live_timeline_follows_the_order_to_its_end(shop: httpx.AsyncClient) -> None:
    order_id = await in_review(shop)
    async with live(shop, order_id) as events:
        first = await events.next()
        second = await events.next()
        assert first
        assert second
        assert (first["event"], second["event"]) == ("received", "awaiting_review")
        # These were there; what follows happens while the stream is open.
        await shop.post(f"/orders/{order_id}/signals/approve")
        rest = await events.rest()
    arrived = [first, second, *rest]
    told = (await shop.get(f"/orders/{order_id}/events")).json()["events"]
    assert [json.loads(event["data"]) for event in arrived] == told
    assert [(event["id"], event["event"]) for event in arrived] == [(str(event["id"]), event["type"]) for event in told]
    assert arrived[-1]["event"] == "shipped"


async def test_live_timeline_goes_on_after_the_last_event_seen(shop: httpx.AsyncClient) -> None:
    order_id = await in_review(shop)
    received, in_queue = (await shop.get(f"/orders/{order_id}/events")).json()["events"]
    async with live(shop, order_id, str(received["id"])) as events:
        event = await events.next()
        assert event
        assert event["id"] == str(in_queue["id"])
    async with live(shop, order_id, str(in_queue["id"])) as events:
        await shop.post(f"/orders/{order_id}/signals/cancel")
        assert [event["event"] for event in await events.rest()] == ["cancelled"]


async def test_live_timeline_of_a_closed_order_ends(shop: httpx.AsyncClient) -> None:
    order_id = await in_review(shop)
    await shop.post(f"/orders/{order_id}/cancel")
    await until_step(shop, order_id, "cancelled")
    told = (await shop.get(f"/orders/{order_id}/events")).json()["events"]
    async with live(shop, order_id) as events:
        assert [event["event"] for event in await events.rest()] == ["received", "awaiting_review", "cancelled"]
    async with live(shop, order_id, str(told[1]["id"])) as events:
        assert [event["event"] for event in await events.rest()] == ["cancelled"]
    # A browser comes back with the last event: 204 is what makes it stop.
    headers = LIVE | {"Last-Event-ID": str(told[-1]["id"])}
    answer = await shop.get(f"/orders/{order_id}/events", headers=headers)
    assert (answer.status_code, answer.content) == (204, b"")


@pytest.mark.parametrize("last", ["x", "-1", "1.5", "9" * 19, "9" * 500])
async def test_last_event_id_that_is_none_is_refused(shop: httpx.AsyncClient, last: str) -> None:
    order_id = await in_review(shop)
    answer = await shop.get(f"/orders/{order_id}/events", headers=LIVE | {"Last-Event-ID": last})
    assert problem(answer, 422)["detail"] == "Last-Event-ID: not the id of an event"


class Gated(OrderRepository):
    """A repository whose next look at the timelines waits after it was taken."""

    def __init__(self, pool: asyncpg.Pool) -> None:
        super().__init__(pool)
        self.looked, self.go_on = asyncio.Event(), asyncio.Event()

    async def events_of_many(self, seen: dict[str, int]) -> Any:
        news = await super().events_of_many(seen)
        self.looked.set()
        await self.go_on.wait()
        return news


async def test_whoever_joins_while_timelines_are_read_misses_nothing(pool: asyncpg.Pool) -> None:
    repository = Gated(pool)
    await put(pool, "o-1", Step.CHARGED, 1)
    for number in range(3):
        await repository.note(NoteRequest(order_id="o-1", type=f"note-{number}"), f"{number}")
    known = (await repository.events("o-1")).events
    feed = EventFeed(repository)
    early = feed.watch("o-1", known[1].id)
    first = asyncio.create_task(anext(early))
    # The look for the early one, which has seen two events, finds the third. Now the late one joins.
    await repository.looked.wait()
    late = feed.watch("o-1", 0)
    next_of_late = asyncio.create_task(anext(late))
    await asyncio.sleep(0)
    repository.go_on.set()
    async with asyncio.timeout(20):
        assert await first == known[2]
        assert [await next_of_late, await anext(late), await anext(late)] == known
    await early.aclose()
    await late.aclose()
    await feed.close()


# --- the document -------------------------------------------------------------------------------------------


def operations() -> list[tuple[str, dict[str, Any]]]:
    return [
        (f"{method.upper()} {path}", operation)
        for path, methods in documented()["paths"].items()
        for method, operation in methods.items()
    ]


def test_every_operation_is_documented() -> None:
    published = {
        "POST /orders/{id}/start",
        "POST /orders/{id}/signals/approve",
        "POST /orders/{id}/signals/cancel",
        "POST /orders/{id}/signals/address",
        "GET /orders/{id}/status",
    }
    assert published < {name for name, _ in operations()}
    for name, operation in operations():
        assert operation["summary"], name
        assert operation["tags"], name
        statuses = set(operation["responses"])
        assert "Successful Response" not in {each["description"] for each in operation["responses"].values()}, name
        assert "200" in statuses or "202" in statuses, name
        if "/orders" in name or "/reviews" in name:
            assert {"422", "503"} <= statuses, name
            assert operation["description"], name
        if "{id}" in name and not name.endswith("/start"):
            assert "404" in statuses, name
        if name.startswith(("POST", "PUT")):
            assert {"409", "413"} <= statuses, name


def test_every_documented_error_is_a_problem() -> None:
    schemas = documented()["components"]["schemas"]
    assert {"Problem", "Fault"} <= set(schemas)
    assert "HTTPValidationError" not in schemas
    for name, operation in operations():
        for status, response in operation["responses"].items():
            if status >= "400":
                kind = "application/json" if name == "GET /readyz" else "application/problem+json"
                assert list(response["content"]) == [kind], f"{name} {status}"
                assert response["description"], f"{name} {status}"


def resolved(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema behind a reference; of a body that may be left out, the one of the body."""
    if "anyOf" in schema:
        (schema,) = [each for each in schema["anyOf"] if each != {"type": "null"}]
    if "$ref" in schema:
        return documented()["components"]["schemas"][schema["$ref"].rsplit("/", 1)[1]]
    return schema


def test_every_body_has_examples_that_are_taken() -> None:
    models = {"StartOrderBody": StartOrderBody, "AddressBody": AddressBody, "ReviewBody": ReviewBody}
    for name, operation in operations():
        if "requestBody" not in operation:
            continue
        schema = resolved(operation["requestBody"]["content"]["application/json"]["schema"])
        assert schema.get("examples") or not schema.get("properties"), name
        for example in schema.get("examples", []):
            assert set(example) <= set(schema["properties"]), name
            assert set(schema.get("required", [])) <= set(example), name
            if model := models.pop(schema["title"], None):
                model.model_validate(example)


def test_every_answer_that_is_worth_repeating_says_when() -> None:
    for name, operation in operations():
        for status in {"429", "503"} & set(operation["responses"]):
            if name != "GET /readyz":
                assert "Retry-After" in operation["responses"][status]["headers"], f"{name} {status}"


def test_operations_have_ids_and_their_tags_a_description() -> None:
    ids = [operation["operationId"] for _, operation in operations()]
    assert len(set(ids)) == len(ids)
    assert all(re.fullmatch("[a-z_]+", each) for each in ids), "ids are names, not made from paths"
    described = {tag["name"] for tag in documented()["tags"] if tag["description"]}
    assert {tag for _, operation in operations() for tag in operation["tags"]} == described


def test_closed_sets_are_enumerated() -> None:
    schemas = documented()["components"]["schemas"]
    assert {"TooLate", "OrderNotFound", "DatabaseUnavailable"} <= set(schemas["Problem"]["properties"]["code"]["enum"])
    assert schemas["PaymentStatus"]["enum"] == ["INIT", "CHARGED", "FAILED", "REFUNDED"]
    assert set(Step) < set(schemas["Event"]["properties"]["type"]["enum"])


async def test_document_is_served_and_says_the_same(counter: httpx.AsyncClient) -> None:
    assert (await counter.get("/openapi.json")).json() == json.loads(json.dumps(documented()))
    assert (await counter.get("/docs")).status_code == 200


# --- servers that are down ----------------------------------------------------------------------------------


def unavailable(answer: httpx.Response, code: str) -> None:
    problem(answer, 503, code)
    assert int(answer.headers["retry-after"]) >= 1


async def test_postgresql_down_is_503_and_heals_by_itself(servers: Servers, tmp_path: Path, temporal: Client) -> None:
    postgres = LocalPostgres(tmp_path / "postgres", log=tmp_path / "postgres.log", durable=False)
    await postgres.start()
    try:
        await postgres.ensure_database("trellis")
        await asyncio.to_thread(migrate, postgres.url())
        settings = Settings(
            database_url=postgres.url(),
            temporal_address=servers.temporal_address,
            sandbox=True,
            order_task_queue=new_id("orders"),
            shipping_task_queue=new_id("shipping"),
            graceful_shutdown_timeout=5,
        )
        async with serving(create(settings)) as url, httpx.AsyncClient(base_url=url, timeout=30) as client:
            before = await in_review(client)
            await postgres.stop("immediate")
            during = new_id()
            body = {"payment_id": f"pay-{during}", "review_timeout_seconds": 3600}
            unavailable(await client.post(f"/orders/{during}/start", json=body), "DatabaseUnavailable")
            assert not await exists(temporal, during)
            for path in (f"/orders/{before}/status", f"/orders/{before}", "/orders", "/reviews"):
                unavailable(await client.get(path), "DatabaseUnavailable")
            assert (await client.get("/readyz")).status_code == 503
            assert (await client.get("/healthz")).status_code == 200
            # A decision needs no table to be kept.
            assert (await client.post(f"/orders/{before}/signals/approve")).status_code == 202
            await postgres.start()
            assert (await client.post(f"/orders/{during}/start", json=body)).status_code == 202
            await until_step(client, before, "shipped", timeout=60)
            await until_step(client, during, "awaiting_review", timeout=60)
            assert await types_of(client, during) == ["received", "awaiting_review"]
    finally:
        await postgres.stop("kill")


async def test_temporal_down_is_503_and_heals_by_itself(settings: Settings, tmp_path: Path, pool: asyncpg.Pool) -> None:
    async with own_temporal(tmp_path) as server:
        mine = settings.model_copy(
            update={"temporal_address": server.address, "temporal_rpc_timeout": 1.0, "update_timeout": 1.0}
        )
        async with serving(create(mine)) as url, httpx.AsyncClient(base_url=url, timeout=30) as client:
            before, during = await in_review(client), new_id()
            await server.stop()
            body = {"payment_id": f"pay-{during}", "review_timeout_seconds": 3600}
            start = await client.post(f"/orders/{during}/start", json=body)
            unavailable(start, "TemporalUnavailable")
            # Not after all the ten seconds for which the SDK would try.
            assert start.elapsed < timedelta(seconds=5)
            names = ("approve", "cancel", "address", "review", "cancel, answered", "address, answered")
            for answer in await asyncio.gather(*(call(client, name, before) for name in names)):
                unavailable(answer, "TemporalUnavailable")
            # Whether nobody knows it, nobody can say.
            unavailable(await client.get(f"/orders/{during}/status"), "TemporalUnavailable")
            # What is written down can be read.
            status = await client.get(f"/orders/{before}/status")
            assert status.json() == {"order_id": before, "step": "awaiting_review", "last_error": None}
            assert (await client.get("/readyz")).status_code == 503
            assert await pool.fetchval("SELECT array_agg(id) FROM orders") == [before]
            await server.start()

            async def again() -> bool:
                return (await client.post(f"/orders/{during}/start", json=body)).status_code == 202

            await until(again, "the start to be accepted")
            await until_step(client, during, "awaiting_review", timeout=60)
            assert (await client.post(f"/orders/{before}/signals/approve")).status_code == 202
            await until_step(client, before, "shipped", timeout=60)


async def test_temporal_that_was_never_there_is_503(settings: Settings) -> None:
    nowhere = settings.model_copy(update={"temporal_address": f"127.0.0.1:{free_port()}", "temporal_rpc_timeout": 1.0})
    async with serving(create_app(nowhere)) as url, httpx.AsyncClient(base_url=url, timeout=30) as client:
        for name in ("start", "approve", "status", "review"):
            unavailable(await call(client, name, new_id()), "TemporalUnavailable")
        assert (await client.get("/orders")).json() == {"orders": [], "next": None}


async def test_an_idle_connection_is_kept_as_long_as_the_settings_say(settings: Settings, tmp_path: Path) -> None:
    port = free_port()
    env = environment(settings, TRELLIS_API_PORT=str(port), TRELLIS_API_KEEP_ALIVE_TIMEOUT="1")
    async with started(tmp_path / "log", env, "app", "api") as api:
        await until_ready(f"http://127.0.0.1:{port}", api)
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert await reader.readline() == b"HTTP/1.1 200 OK\r\n"
        await asyncio.wait_for(reader.read(), 4)  # until the API closes it; uvicorn alone would wait for 5 s
        writer.close()
