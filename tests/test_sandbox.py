"""The sandbox partners: their contract on the wire, and that their books stay right whatever races or dies."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from decimal import Decimal
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import asyncpg
import httpx
import pytest

from app.sandbox.app import create_sandbox
from app.sandbox.ledger import Answer, Ledger, Movement, prepare
from app.sandbox.protocol import Faults, ReplyLost
from app.sandbox.provider import MovementRequest

FAULTS = Faults(flaky_failures=2, slow_seconds=0.8, down_seconds=0.4)


@pytest.fixture
async def ledger(database_url: str) -> AsyncIterator[Ledger]:
    async with await Ledger.create(database_url) as opened:
        yield opened


@pytest.fixture
async def client(ledger: Ledger) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app=create_sandbox(ledger, faults=FAULTS))
    async with httpx.AsyncClient(transport=transport, base_url="http://sandbox") as opened:
        yield opened


@pytest.fixture
async def sql(database_url: str, ledger: Ledger) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(database_url)
    yield connection
    await connection.close()


def body(payment: str, amount: str = "19.90", currency: str = "USD") -> dict[str, str]:
    return {"payment": payment, "amount": amount, "currency": currency}


async def charge(
    client: httpx.AsyncClient, payment: str, amount: str = "19.90", currency: str = "USD", *, key: str = ""
) -> httpx.Response:
    return await client.post(
        "/payments/v1/charges",
        json=body(payment, amount, currency),
        headers={"Idempotency-Key": key or payment},
    )


async def refund(client: httpx.AsyncClient, payment: str, amount: str = "19.90", *, key: str = "") -> httpx.Response:
    return await client.post(
        "/payments/v1/refunds",
        json=body(payment, amount),
        headers={"Idempotency-Key": key or f"{payment}:refund"},
    )


async def dispatch(client: httpx.AsyncClient, order_id: str, zip_code: str | None = "62701") -> httpx.Response:
    address = zip_code and {"line1": "1 Main St", "city": "Springfield", "state": "IL", "zip": zip_code}
    return await client.post("/carrier/v1/parcels", json={"address": address}, headers={"Idempotency-Key": order_id})


async def recall(client: httpx.AsyncClient, order_id: str) -> httpx.Response:
    return await client.post(f"/carrier/v1/parcels/{order_id}/recall")


async def books(client: httpx.AsyncClient, payment: str) -> dict[str, Any]:
    answer = await client.get("/payments/v1/ledger", params={"payment": payment})
    assert answer.status_code == 200
    moved: dict[str, Any] = answer.json()
    return moved


def code(response: httpx.Response) -> tuple[int, str]:
    return response.status_code, response.json()["error"]["code"]


# --- charges ------------------------------------------------------------------------------------------------


async def test_charge_is_written_down_and_can_be_looked_up(client: httpx.AsyncClient) -> None:
    assert code(await client.get("/payments/v1/charges/pay-1")) == (404, "charge_not_found")
    assert code(await client.get("/payments/v1/refunds/pay-1:refund")) == (404, "refund_not_found")
    answer = await charge(client, "pay-1")
    assert answer.status_code == 200
    charged = answer.json()
    assert charged["id"].startswith("ch_")
    assert (charged["status"], charged["amount"], charged["currency"]) == ("succeeded", "19.90", "USD")
    assert (await client.get("/payments/v1/charges/pay-1")).json() == charged
    assert await books(client, "pay-1") == {"payment": "pay-1", "charges": [charged], "refunds": []}


async def test_same_key_and_request_replays_the_same_bytes(client: httpx.AsyncClient) -> None:
    first = await charge(client, "pay-1", "5")
    again = await charge(client, "pay-1", "5.00")  # the same amount, written otherwise
    assert again.status_code == 200
    assert again.content == first.content
    assert "idempotent-replayed" not in first.headers
    assert again.headers["idempotent-replayed"] == "true"
    assert len((await books(client, "pay-1"))["charges"]) == 1


async def test_same_key_for_another_request_is_refused(client: httpx.AsyncClient) -> None:
    await charge(client, "pay-1")
    assert code(await charge(client, "pay-1", "19.91", "USD")) == (422, "idempotency_key_reused")
    assert code(await charge(client, "pay-1", "19.90", "EUR")) == (422, "idempotency_key_reused")
    assert code(await charge(client, "pay-2", key="pay-1")) == (422, "idempotency_key_reused")
    assert len((await books(client, "pay-1"))["charges"]) == 1
    assert (await books(client, "pay-2"))["charges"] == []


async def test_key_of_a_charge_cannot_be_used_for_a_refund(client: httpx.AsyncClient) -> None:
    await charge(client, "pay-1")
    assert code(await refund(client, "pay-1", key="pay-1")) == (422, "idempotency_key_reused")
    assert (await books(client, "pay-1"))["refunds"] == []


async def test_twenty_parallel_charges_with_one_key_move_money_once(client: httpx.AsyncClient) -> None:
    answers = await asyncio.gather(*(charge(client, "pay-1") for _ in range(20)))
    statuses = Counter(answer.status_code for answer in answers)
    assert set(statuses) <= {200, 409}
    assert statuses[200] >= 1
    assert {answer.content for answer in answers if answer.status_code == 200} == {
        (await charge(client, "pay-1")).content
    }
    assert len((await books(client, "pay-1"))["charges"]) == 1


async def test_charges_without_key_move_money_each_time(client: httpx.AsyncClient) -> None:
    for _ in range(2):
        answer = await client.post("/payments/v1/charges", json=body("pay-1"))
        assert answer.status_code == 200
    charges = (await books(client, "pay-1"))["charges"]
    assert [one["idempotency_key"] for one in charges] == [None, None]
    assert charges[0]["id"] != charges[1]["id"]


async def test_invalid_charge_is_refused(client: httpx.AsyncClient) -> None:
    for wrong in (
        {},
        {"payment": "pay-1", "amount": 19.9, "currency": "USD"},
        {"payment": "pay-1", "amount": "-1", "currency": "USD"},
        {"payment": "pay-1", "amount": "NaN", "currency": "USD"},
        {"payment": "pay-1", "amount": "1", "currency": "usd"},
        {"payment": "pay\x00", "amount": "1", "currency": "USD"},
    ):
        assert code(await client.post("/payments/v1/charges", json=wrong)) == (400, "invalid_request")
    answer = await client.post("/payments/v1/charges", json=body("pay-1"), headers={"Idempotency-Key": ""})
    assert code(answer) == (400, "idempotency_key_invalid")


# --- refunds ------------------------------------------------------------------------------------------------


async def test_refund_gives_the_charge_back_once(client: httpx.AsyncClient) -> None:
    await charge(client, "pay-1")
    answers = await asyncio.gather(*(refund(client, "pay-1") for _ in range(10)))
    assert {answer.status_code for answer in answers} <= {200, 409}
    assert (await refund(client, "pay-1")).status_code == 200
    moved = await books(client, "pay-1")
    assert len(moved["refunds"]) == 1
    assert (await client.get("/payments/v1/refunds/pay-1:refund")).json() == moved["refunds"][0]
    assert code(await refund(client, "pay-1", key="another")) == (422, "charge_already_refunded")


async def test_parallel_refunds_without_key_give_back_once(client: httpx.AsyncClient) -> None:
    await charge(client, "pay-1")
    answers = await asyncio.gather(*(client.post("/payments/v1/refunds", json=body("pay-1")) for _ in range(10)))
    assert Counter(answer.status_code for answer in answers) == {200: 1, 422: 9}


async def test_refusals_of_a_refund_are_not_kept(client: httpx.AsyncClient) -> None:
    assert code(await refund(client, "pay-1")) == (404, "charge_not_found")
    await charge(client, "pay-1")
    assert code(await refund(client, "pay-1", "19.00")) == (422, "amount_mismatch")
    assert (await refund(client, "pay-1")).status_code == 200


# --- in flight ----------------------------------------------------------------------------------------------


async def test_request_that_died_in_flight_can_be_repeated_after_its_lease(
    client: httpx.AsyncClient, ledger: Ledger, sql: asyncpg.Connection
) -> None:
    await _die_in_flight(ledger, "pay-1")
    during = await charge(client, "pay-1")
    assert code(during) == (409, "idempotency_key_in_flight")
    assert 1 <= int(during.headers["retry-after"]) <= 30
    assert code(await charge(client, "pay-1", "1.00")) == (422, "idempotency_key_reused")
    # For all one knows the dead request still moves money: "there is no charge" would not be true.
    assert code(await client.get("/payments/v1/charges/pay-1")) == (409, "idempotency_key_in_flight")
    await _expire_leases(sql)
    assert code(await client.get("/payments/v1/charges/pay-1")) == (404, "charge_not_found")
    assert code(await charge(client, "pay-1", "1.00")) == (422, "idempotency_key_reused")
    answers = await asyncio.gather(*(charge(client, "pay-1") for _ in range(5)))
    assert {answer.status_code for answer in answers} <= {200, 409}
    assert len((await books(client, "pay-1"))["charges"]) == 1


async def _die_in_flight(ledger: Ledger, payment: str) -> None:
    """Leave the key as a process does that is killed before the money moves."""
    asked = MovementRequest(payment=payment, amount="19.90", currency="USD")
    assert (await ledger.claim(payment, asked.fingerprint("charge"))).mine


async def _expire_leases(sql: asyncpg.Connection) -> None:
    await sql.execute("UPDATE sandbox.idempotency_keys SET locked_until = now() WHERE state = 'in_flight'")


async def test_lease_runs_out_by_itself(database_url: str) -> None:
    async with Ledger(database_url, lease_seconds=0.2) as ledger:
        assert (await ledger.claim("pay-1", "same")).mine
        await asyncio.sleep(0.2)
        assert (await ledger.claim("pay-1", "same")).mine


async def test_request_that_outlived_its_lease_moves_nothing(ledger: Ledger, sql: asyncpg.Connection) -> None:
    late = await ledger.claim("pay-1", "same")
    await _expire_leases(sql)
    movement = Movement("ch_late", "pay-1", "pay-1", Decimal("1.00"), "USD")
    assert not await ledger.record_charge(movement, late, Answer(200, "late"))
    assert not await ledger.settle(late, Answer(402, "late"))
    heir = await ledger.claim("pay-1", "same")
    assert heir.mine
    assert not await ledger.record_charge(movement, late, Answer(200, "late"))
    await ledger.forget(late)  # the heir's by now: stays
    inherited = Movement("ch_heir", "pay-1", "pay-1", Decimal("1.00"), "USD")
    assert await ledger.record_charge(inherited, heir, Answer(200, "heir"))
    assert await ledger.charges_of("pay-1") == [inherited]
    await ledger.forget(heir)  # settled: stays
    assert (await ledger.claim("pay-1", "same")).answer == Answer(200, "heir")


async def test_charge_and_its_record_are_one_transaction(ledger: Ledger) -> None:
    """A charge that cannot be written leaves its key in flight."""
    claim = await ledger.claim("pay-1", "same")
    wrong = Movement("ch_1", "pay-1", "pay-1", Decimal(-1), "USD")
    with pytest.raises(asyncpg.CheckViolationError):
        await ledger.record_charge(wrong, claim, Answer(200, "done"))
    assert (await ledger.claim("pay-1", "same")).answer is None
    assert await ledger.charges_of("pay-1") == []


async def test_cancelled_request_gives_its_key_back(
    client: httpx.AsyncClient, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when a worker that stops cancels its activities, with the sandbox in the same process."""

    async def hang(*_: object) -> bool:
        await asyncio.sleep(60)
        return False

    monkeypatch.setattr(ledger, "record_charge", hang)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(charge(client, "pay-1"), 0.2)
    monkeypatch.undo()
    assert (await charge(client, "pay-1")).status_code == 200


# --- magic payment ids --------------------------------------------------------------------------------------


async def test_decline_is_replayed_and_moves_nothing(client: httpx.AsyncClient) -> None:
    for payment in ("pay-decline", "pay-decline-42"):
        first, again = await charge(client, payment), await charge(client, payment)
        assert code(first) == (402, "card_declined")
        assert (again.status_code, again.content) == (402, first.content)
        assert again.headers["idempotent-replayed"] == "true"
        assert code(await charge(client, payment, "1.00")) == (422, "idempotency_key_reused")
        assert (await books(client, payment))["charges"] == []


async def test_other_ids_are_ordinary(client: httpx.AsyncClient, sql: asyncpg.Connection) -> None:
    for payment in ("pay-declined", "pay-flakyx", "xpay-lost", "pay-refund-slow", "pay-1"):
        assert (await charge(client, payment)).status_code == 200
    assert await sql.fetchval("SELECT count(*) FROM sandbox.attempts") == 0


async def test_flaky_fails_twice_across_restarts(client: httpx.AsyncClient, database_url: str) -> None:
    assert code(await charge(client, "pay-flaky-1")) == (503, "flaky")
    async with Ledger(database_url) as another:  # the count is in the ledger, not in the process
        transport = httpx.ASGITransport(app=create_sandbox(another, faults=FAULTS))
        async with httpx.AsyncClient(transport=transport, base_url="http://sandbox") as restarted:
            assert code(await charge(restarted, "pay-flaky-1")) == (503, "flaky")
            assert (await charge(restarted, "pay-flaky-1")).status_code == 200
    assert len((await books(client, "pay-flaky-1"))["charges"]) == 1


async def test_slow_has_charged_before_it_answers(client: httpx.AsyncClient) -> None:
    slow = asyncio.create_task(charge(client, "pay-slow"))
    await asyncio.sleep(FAULTS.slow_seconds / 2)
    assert len((await books(client, "pay-slow"))["charges"]) == 1
    assert code(await charge(client, "pay-slow")) == (409, "idempotency_key_in_flight")
    assert not slow.done()
    answer = await slow
    assert answer.elapsed.total_seconds() >= FAULTS.slow_seconds
    again = await charge(client, "pay-slow")
    assert again.content == answer.content
    assert again.elapsed.total_seconds() < FAULTS.slow_seconds


async def test_lost_moves_money_once_and_answers_the_repeat(client: httpx.AsyncClient) -> None:
    with pytest.raises(ReplyLost):
        await charge(client, "pay-lost")
    assert len((await books(client, "pay-lost"))["charges"]) == 1
    assert (await charge(client, "pay-lost")).status_code == 200
    assert len((await books(client, "pay-lost"))["charges"]) == 1

    assert (await charge(client, "pay-refund-lost")).status_code == 200
    with pytest.raises(ReplyLost):
        await refund(client, "pay-refund-lost")
    assert (await refund(client, "pay-refund-lost")).status_code == 200
    assert len((await books(client, "pay-refund-lost"))["refunds"]) == 1


async def test_down_works_after_a_while(client: httpx.AsyncClient) -> None:
    assert code(await charge(client, "pay-down")) == (503, "down")
    await asyncio.sleep(FAULTS.down_seconds)
    assert (await charge(client, "pay-down")).status_code == 200


async def test_refund_flaky_fails_only_the_refund(client: httpx.AsyncClient) -> None:
    assert (await charge(client, "pay-refund-flaky-1")).status_code == 200
    statuses = [(await refund(client, "pay-refund-flaky-1")).status_code for _ in range(4)]
    assert statuses == [503, 503, 200, 200]


# --- outages ------------------------------------------------------------------------------------------------


async def test_outage_stops_one_partner_in_every_process(client: httpx.AsyncClient, database_url: str) -> None:
    await charge(client, "pay-1")
    switched = await client.post("/payments/sandbox/outage", json={"seconds": 60})
    assert switched.json() == {"seconds": 60}
    async with Ledger(database_url) as another:
        transport = httpx.ASGITransport(app=create_sandbox(another))
        async with httpx.AsyncClient(transport=transport, base_url="http://sandbox") as elsewhere:
            assert code(await charge(elsewhere, "pay-1")) == (503, "outage")
            assert code(await refund(elsewhere, "pay-1")) == (503, "outage")
            assert code(await elsewhere.get("/payments/v1/charges/pay-1")) == (503, "outage")
            assert (await dispatch(elsewhere, "o-1")).status_code == 200  # the carrier is another firm
    assert len((await books(client, "pay-1"))["charges"]) == 1  # the audit works during an outage
    await client.post("/payments/sandbox/outage", json={"seconds": 0})
    assert (await charge(client, "pay-2")).status_code == 200
    wrong = await client.post("/payments/sandbox/outage", json={"seconds": -1})
    assert code(wrong) == (400, "invalid_request")


async def test_a_look_up_that_lags_behind_does_not_know_of_young_charges(client: httpx.AsyncClient) -> None:
    await charge(client, "pay-1")
    await client.post("/payments/sandbox/lag", json={"seconds": 60})
    assert code(await client.get("/payments/v1/charges/pay-1")) == (404, "charge_not_found")
    assert len((await books(client, "pay-1"))["charges"]) == 1  # it is only the look-up
    assert (await charge(client, "pay-1")).headers["idempotent-replayed"] == "true"
    await client.post("/payments/sandbox/lag", json={"seconds": 0})
    assert (await client.get("/payments/v1/charges/pay-1")).status_code == 200


async def test_outage_of_the_carrier_ends_by_itself(client: httpx.AsyncClient) -> None:
    await client.post("/carrier/sandbox/outage", json={"seconds": 60})
    down = await dispatch(client, "o-1")
    assert code(down) == (503, "outage")
    assert down.headers["retry-after"] == "60"
    assert code(await recall(client, "o-1")) == (503, "outage")
    await client.post("/carrier/sandbox/outage", json={"seconds": 0.2})
    await asyncio.sleep(0.2)
    assert (await dispatch(client, "o-1")).status_code == 200


# --- parcels ------------------------------------------------------------------------------------------------


async def test_dispatch_is_idempotent_and_closes_recall(client: httpx.AsyncClient) -> None:
    answers = await asyncio.gather(*(dispatch(client, "o-1") for _ in range(10)))
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.json()["tracking"] for answer in answers}) == 1
    tracking = answers[0].json()["tracking"]
    assert (await recall(client, "o-1")).json() == {"outcome": "taken", "tracking": tracking}
    assert (await dispatch(client, "o-1", "00002")).status_code == 422
    seen = (await client.get("/carrier/v1/ledger", params={"order_id": "o-1"})).json()
    assert (seen["state"], seen["tracking"], seen["address"]["zip"]) == ("taken", tracking, "62701")


async def test_recall_closes_dispatch(client: httpx.AsyncClient) -> None:
    for _ in range(2):
        assert (await recall(client, "o-1")).json() == {"outcome": "recalled"}
    assert code(await dispatch(client, "o-1")) == (410, "recalled")
    assert code(await client.get("/carrier/v1/ledger", params={"order_id": "o-2"})) == (404, "parcel_not_found")


async def test_dispatch_and_recall_race_has_one_winner(client: httpx.AsyncClient, sql: asyncpg.Connection) -> None:
    async def race(number: int) -> str:
        order_id = f"o-{number}"
        runners = [dispatch(client, order_id), recall(client, order_id)]
        if number % 2:
            runners.reverse()
        answers = await asyncio.gather(*runners)
        taken, recalled = reversed(answers) if number % 2 else answers
        state = await sql_state(order_id)
        if taken.status_code == 200:
            assert recalled.json() == {"outcome": "taken", **taken.json()}
            assert state == "taken"
        else:
            assert code(taken) == (410, "recalled")
            assert recalled.json() == {"outcome": "recalled"}
            assert state == "recalled"
        return state

    turn = asyncio.Lock()  # one connection

    async def sql_state(order_id: str) -> str:
        async with turn:
            return str(await sql.fetchval("SELECT state FROM sandbox.parcels WHERE order_id = $1", order_id))

    winners = Counter(await asyncio.gather(*(race(number) for number in range(50))))
    assert sum(winners.values()) == 50


async def test_pickup_needs_no_address_but_dispatch_needs_an_order(client: httpx.AsyncClient) -> None:
    assert (await dispatch(client, "o-1", None)).status_code == 200
    nameless = await client.post("/carrier/v1/parcels", json={"address": None})
    assert code(nameless) == (400, "idempotency_key_missing")


LOST = 0  #: in place of a status

ZIP_CODES = {
    "00001": ([503, 503, 200, 200], "taken"),
    "00002": ([422, 422, 422, 422], "recalled"),
    "00004": ([LOST, 200, 200, 200], "taken"),
    "00005": ([503, 503, 503, 503], "recalled"),
    "00006": ([LOST, LOST, LOST, LOST], "taken"),
}


async def test_magic_zip_codes(client: httpx.AsyncClient) -> None:
    async def status(order_id: str, zip_code: str) -> int:
        try:
            return (await dispatch(client, order_id, zip_code)).status_code
        except ReplyLost:
            return LOST

    for zip_code, (expected, outcome) in ZIP_CODES.items():
        order_id = f"o-{zip_code}"
        assert [await status(order_id, zip_code) for _ in expected] == expected, zip_code
        assert (await recall(client, order_id)).json()["outcome"] == outcome, zip_code
    assert code(await dispatch(client, "o-1", "00002")) == (422, "undeliverable")
    assert code(await dispatch(client, "o-1", "00005")) == (503, "down")


async def test_zip_00003_is_slow(client: httpx.AsyncClient) -> None:
    assert (await dispatch(client, "o-1", "00003")).elapsed.total_seconds() >= FAULTS.slow_seconds
    assert (await dispatch(client, "o-1", "00003")).elapsed.total_seconds() < FAULTS.slow_seconds


# --- the ledger's database ----------------------------------------------------------------------------------


async def test_many_processes_prepare_at_once(database_url: str) -> None:
    await asyncio.gather(*(prepare(database_url) for _ in range(8)))
    async with await Ledger.create(database_url) as ledger:
        assert await ledger.outage_left("payments") == 0


async def test_role_without_create_right(database_url: str, sql: asyncpg.Connection) -> None:
    """It can use a schema that is there, and make the tables in a schema of its own, but no schema."""
    name = await sql.fetchval("SELECT quote_ident(current_database())")
    await sql.execute(f"REVOKE CREATE ON DATABASE {name} FROM CURRENT_USER")
    async with await Ledger.create(database_url) as ledger:
        assert (await ledger.claim("pay-1", "same")).mine
    await sql.execute("DROP TABLE sandbox.refunds, sandbox.charges, sandbox.outages")
    async with await Ledger.create(database_url) as ledger:
        assert await ledger.charges_of("pay-1") == []
    await sql.execute("REVOKE CREATE ON SCHEMA sandbox FROM CURRENT_USER")
    async with await Ledger.create(database_url) as ledger:
        assert await ledger.charges_of("pay-1") == []
    if await sql.fetchval("SELECT current_setting('is_superuser')::bool"):
        pytest.skip("nothing can be forbidden to a superuser")
    await sql.execute("DROP SCHEMA sandbox CASCADE")
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        await Ledger.create(database_url)


async def test_sandbox_without_database_says_later(database_url: str) -> None:
    """It comes up before its database, and then works by itself."""
    parts = urlsplit(database_url)
    nowhere = urlunsplit(parts._replace(path=parts.path + "_missing"))
    async with Ledger(nowhere) as ledger:
        transport = httpx.ASGITransport(app=create_sandbox(ledger))
        async with httpx.AsyncClient(transport=transport, base_url="http://sandbox") as client:
            assert code(await charge(client, "pay-1")) == (503, "ledger_unavailable")
            assert code(await recall(client, "o-1")) == (503, "ledger_unavailable")
            assert (await client.get("/healthz")).status_code == 200
            ledger._dsn = database_url
            assert (await charge(client, "pay-1")).status_code == 200


async def test_ledger_refuses_a_lease_of_nothing() -> None:
    with pytest.raises(ValueError, match="lease"):
        Ledger("postgresql://nowhere", lease_seconds=0)
