"""The database as the product meets it: waits that end, and what counts as "not now"."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import timedelta
from functools import partial
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import asyncpg
import httpx
import pytest
from pydantic import SecretStr
from structlog.testing import capture_logs
from temporalio.exceptions import ApplicationError
from temporalio.testing import ActivityEnvironment
from temporalio.worker import ActivityInboundInterceptor, ExecuteActivityInput

from app.api import create_app
from app.db.pool import create_pool, is_refusal, is_unavailable, patience, wait_until_answering
from app.db.timeline import AttemptLog
from app.errors import DatabaseUnavailable
from app.order import gauges
from app.order.models import OrderInput, StartOrder
from app.order.repository import OrderRepository
from app.settings import Settings
from app.telemetry import probes, supervision
from app.temporal.interceptors import AttemptInterceptor
from app.workflow import policies
from tests.support import serving, until

#: Seconds that the tests here wait for a connection, and for a lock.
IMPATIENT = 0.5
#: Seconds in which an answer must have come that has waited for both; with room for a machine that is busy.
ANSWERED = 6.0


@pytest.fixture
def impatient(settings: Settings) -> Settings:
    return settings.model_copy(update={"database_acquire_timeout": IMPATIENT})


@asynccontextmanager
async def locked(url: str, table: str = "orders") -> AsyncIterator[asyncpg.Connection]:
    """With a table that nobody else can even read."""
    connection = await asyncpg.connect(url)
    try:
        async with connection.transaction():
            await connection.execute(f"LOCK TABLE {table} IN ACCESS EXCLUSIVE MODE")
            yield connection
    finally:
        await connection.close()


async def received(pool: asyncpg.Pool, order_id: str = "o-1") -> None:
    order = OrderInput(order_id=order_id, request=StartOrder(payment_id=f"pay-{order_id}"))
    await OrderRepository(pool).receive(order, "run-1")


# --- every wait ends ----------------------------------------------------------------------------------------


async def test_a_crowd_in_front_of_a_locked_table_is_answered_in_time(
    impatient: Settings, pool: asyncpg.Pool, database_url: str
) -> None:
    await received(pool)
    async with serving(create_app(impatient)) as url, httpx.AsyncClient(base_url=url, timeout=60) as client:
        async with locked(database_url):
            began = time.monotonic()
            answers = await asyncio.gather(*(client.get("/orders/o-1/status") for _ in range(45)))
            assert time.monotonic() - began < ANSWERED
        assert {(answer.status_code, answer.json()["code"]) for answer in answers} == {(503, "DatabaseUnavailable")}
        assert all(int(answer.headers["retry-after"]) >= 1 for answer in answers)
        assert (await client.get("/orders/o-1/status")).status_code == 200


async def acquired(pool: asyncpg.Pool) -> None:
    await pool.release(await pool.acquire())


#: Every way to a connection of a pool.
WAYS: dict[str, Callable[[asyncpg.Pool], Awaitable[Any]]] = {
    "fetch": lambda pool: pool.fetch("SELECT 1"),
    "fetchrow": lambda pool: pool.fetchrow("SELECT 1"),
    "fetchval": lambda pool: pool.fetchval("SELECT 1"),
    "execute": lambda pool: pool.execute("SELECT 1"),
    "executemany": lambda pool: pool.executemany("SELECT $1::int", [(1,)]),
    "acquire": acquired,
}


@pytest.mark.parametrize("way", WAYS)
async def test_no_way_to_a_connection_waits_without_a_limit(impatient: Settings, way: str) -> None:
    async with create_pool(impatient.model_copy(update={"database_pool_size": 1})) as pool:
        async with pool.acquire():
            began = time.monotonic()
            with pytest.raises(DatabaseUnavailable, match="TimeoutError"):
                await asyncio.wait_for(WAYS[way](pool), 10)
            assert time.monotonic() - began >= IMPATIENT * 0.9
        await WAYS[way](pool)


@pytest.mark.parametrize("way", ["fetch", "acquire"])
async def test_connecting_may_take_longer_than_the_wait_for_a_free_connection(
    impatient: Settings, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or a slow machine would begin again without end."""
    connect = asyncpg.connect

    async def slow(*arguments: Any, **options: Any) -> asyncpg.Connection:
        await asyncio.sleep(IMPATIENT * 3)
        return await connect(*arguments, **options)

    monkeypatch.setattr(asyncpg, "connect", slow)
    async with create_pool(impatient.model_copy(update={"database_pool_size": 1})) as pool:
        connecting = asyncio.create_task(WAYS[way](pool))
        await asyncio.sleep(0)
        with pytest.raises(DatabaseUnavailable, match="TimeoutError"):
            await WAYS[way](pool)
        assert not connecting.done()
        await connecting


async def test_connecting_has_a_limit_of_its_own(impatient: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    async def never(*_arguments: Any, **_options: Any) -> None:
        await asyncio.sleep(60)

    monkeypatch.setattr(asyncpg, "connect", never)
    async with create_pool(impatient.model_copy(update={"database_statement_timeout": IMPATIENT * 2})) as pool:
        began = time.monotonic()
        with pytest.raises(DatabaseUnavailable, match="TimeoutError"):
            await asyncio.wait_for(pool.fetch("SELECT 1"), 10)
        assert time.monotonic() - began >= IMPATIENT * 1.9


async def test_an_activity_waits_for_a_connection_longer_than_the_api(impatient: Settings) -> None:
    async with create_pool(impatient.model_copy(update={"database_pool_size": 1})) as pool:
        async with pool.acquire():
            with patience(30):
                waiting = asyncio.create_task(pool.fetchval("SELECT 1"))
            await asyncio.sleep(IMPATIENT * 2)
            assert not waiting.done()
        assert await waiting == 1


# --- an attempt ends before Temporal gives it up -------------------------------------------------------------

POLICIES = {
    name: options["start_to_close_timeout"].total_seconds()
    for name, options in vars(policies).items()
    if isinstance(options, dict) and "start_to_close_timeout" in options
}


def test_policies_are_found() -> None:
    assert {"DATABASE", "LOCAL", "PAYMENT", "RECALL", "DISPATCH"} <= POLICIES.keys()


@pytest.mark.parametrize("policy", POLICIES)
def test_an_attempt_has_time_left_to_tell_how_it_ended(policy: str) -> None:
    work, whole = policies.limits(timedelta(seconds=POLICIES[policy]))
    assert work is not None
    assert whole is not None
    assert 0 < work < whole < POLICIES[policy]


def test_a_statement_that_takes_its_whole_time_fits_into_an_attempt() -> None:
    """With the longest that the settings allow, behind the wait for a connection and for a lock."""
    longest = {name: most(name) for name in ("database_statement_timeout", "database_acquire_timeout")}
    work = policies.limits(policies.DATABASE["start_to_close_timeout"]).work
    defaults = Settings()
    assert work is not None
    assert defaults.database_acquire_timeout + longest["database_statement_timeout"] <= work


def most(setting: str) -> float:
    """The largest value that a setting takes."""
    return float(next(rule.le for rule in Settings.model_fields[setting].metadata if hasattr(rule, "le")))


class _Hangs(ActivityInboundInterceptor):
    """Stands for an activity that waits for a lock."""

    def __init__(self, pool: asyncpg.Pool) -> None:
        self._pool = pool

    async def execute_activity(self, input: ExecuteActivityInput) -> Any:  # noqa: A002 - the SDK's name
        return await self._pool.execute("UPDATE orders SET last_error = NULL")


async def test_an_attempt_never_outlives_its_time_limit(settings: Settings, database_url: str) -> None:
    """A repeat, which has the most to tell; and nothing else would end the statement before."""
    patient = settings.model_copy(update={"database_acquire_timeout": 10.0})
    environment = ActivityEnvironment()
    limit = timedelta(seconds=4)
    environment.info = environment.info.__class__(
        **{**vars(environment.info), "start_to_close_timeout": limit, "attempt": 2}
    )
    async with create_pool(patient) as pool:
        await received(pool)
        around = AttemptInterceptor(AttemptLog(pool)).intercept_activity(_Hangs(pool))
        order = OrderInput(order_id="o-1", request=StartOrder(payment_id="pay-1"))
        call = ExecuteActivityInput(fn=lambda: None, args=[order], executor=None, headers={})
        async with locked(database_url):
            began = time.monotonic()
            with pytest.raises(ApplicationError) as ended:
                await environment.run(around.execute_activity, call)
            assert time.monotonic() - began < limit.total_seconds()
        assert (ended.value.type, ended.value.non_retryable) == ("TimedOut", False)


# --- what counts as "not now" --------------------------------------------------------------------------------

STATES = {
    "08006": True,
    "08P01": True,
    "25006": True,
    "25P03": True,
    "28000": True,
    "28P01": True,
    "3D000": True,
    "40001": True,
    "40P01": True,
    "40003": True,
    "42P01": True,
    "53100": True,
    "53200": True,
    "53300": True,
    "55P03": True,
    "57014": True,
    "57P01": True,
    "57P02": True,
    "57P03": True,
    "57P04": True,
    "57P05": True,
    "22001": False,
    "23505": False,
    "23514": False,
    "42501": False,
    "42601": False,
    "0A000": False,
    "XX000": False,
}


@pytest.mark.parametrize("state", STATES)
def test_states_that_mean_not_now(state: str) -> None:
    error = asyncpg.PostgresError.new({"S": "ERROR", "C": state, "M": "x"})
    assert error.sqlstate == state
    assert is_unavailable(error) is STATES[state]


def test_errors_of_the_driver_that_mean_not_now() -> None:
    assert is_unavailable(asyncpg.InvalidCachedStatementError("cached plan must not change result type"))
    assert is_unavailable(asyncpg.InterfaceError("connection is closed"))
    assert is_unavailable(ConnectionResetError())
    assert is_unavailable(TimeoutError())
    # An argument that cannot be sent is no outage, though the driver has one class over both.
    assert not is_unavailable(asyncpg.exceptions._base.DataError("invalid input for query argument $1"))
    assert not is_unavailable(KeyError())


async def test_whatever_happens_while_connecting_is_not_now(settings: Settings) -> None:
    async def fail(_connection: object) -> None:
        raise KeyError("anything")

    async with create_pool(settings) as pool:
        pool._init = fail
        with pytest.raises(DatabaseUnavailable, match="KeyError"):
            await pool.fetchval("SELECT 1")


async def test_a_fault_of_ours_is_not_taken_for_an_outage(pool: asyncpg.Pool) -> None:
    with pytest.raises(asyncpg.PostgresSyntaxError):
        await pool.fetchval("SELEKT 1")
    with pytest.raises(asyncpg.DataError, match="invalid input"):
        await pool.fetchval("SELECT $1::int", "one")
    with pytest.raises(ZeroDivisionError):
        async with pool.acquire():
            raise ZeroDivisionError


async def test_a_lock_timeout_of_the_role_is_an_answer_of_503(
    settings: Settings, database_url: str, pool: asyncpg.Pool
) -> None:
    await received(pool)
    await set_for_role(pool, "lock_timeout", "100ms")
    async with serving(create_app(settings)) as url, httpx.AsyncClient(base_url=url, timeout=30) as client:
        async with locked(database_url):
            paths = ("/orders/o-1/status", "/orders/o-1", "/orders", "/reviews")
            answers = await asyncio.gather(*map(client.get, paths))
        assert [answer.status_code for answer in answers] == [503] * 4
        assert all(answer.json()["code"] == "DatabaseUnavailable" for answer in answers)
        assert all("retry-after" in answer.headers for answer in answers)


async def test_the_lock_timeout_of_a_role_stays(settings: Settings, pool: asyncpg.Pool) -> None:
    assert await pool.fetchval("SHOW lock_timeout") == f"{settings.database_acquire_timeout:.0f}s"
    await set_for_role(pool, "lock_timeout", "123ms")
    async with create_pool(settings) as another:
        assert await another.fetchval("SHOW lock_timeout") == "123ms"


async def test_transactions_that_stand_in_each_others_way_are_repeated_without_surprise(
    settings: Settings, pool: asyncpg.Pool
) -> None:
    await received(pool)
    await set_for_role(pool, "default_transaction_isolation", "serializable")
    async with create_pool(settings) as strict:

        async def one() -> None:
            async with strict.acquire() as connection, connection.transaction():
                await connection.fetchval("SELECT count(*) FROM events")
                await connection.execute("INSERT INTO events (order_id, type) VALUES ('o-1', 'x')")

        ended = await asyncio.gather(*(one() for _ in range(8)), return_exceptions=True)
    conflicts = [error for error in ended if error is not None]
    assert conflicts, "there was none: the test shows nothing"
    assert {type(error) for error in conflicts} == {DatabaseUnavailable}


async def test_a_session_that_cannot_write_is_given_up(settings: Settings, pool: asyncpg.Pool) -> None:
    """As after a fail-over, when the connection still leads to the old server: it answers, and writes nothing."""
    await set_for_role(pool, "default_transaction_read_only", "on")
    async with create_pool(settings.model_copy(update={"database_pool_size": 1})) as given:
        write = "INSERT INTO orders (id, state) VALUES ('o-1', 'received')"
        with pytest.raises(DatabaseUnavailable, match="ReadOnlySQLTransactionError"):
            await given.execute(write)
        await set_for_role(pool, "default_transaction_read_only", "off")
        await given.execute(write)


async def set_for_role(pool: asyncpg.Pool, name: str, value: str) -> None:
    """As an administrator does, for this role in this database; it holds for connections made from now on."""
    role, database = await pool.fetchrow("SELECT current_user, current_database()")  # type: ignore[misc]
    await pool.execute(f'ALTER ROLE "{role}" IN DATABASE "{database}" SET {name} = \'{value}\'')


# --- readiness and gauges ------------------------------------------------------------------------------------


async def test_no_check_of_readiness_can_break_the_answer() -> None:
    async def broken() -> None:
        raise KeyError("secret")

    readiness = probes.Readiness()
    readiness.require("database", broken)
    with capture_logs() as logs:
        states = await readiness.states()
    assert states == {"database": "unexpected KeyError"}
    assert probes.answer(states).status_code == 503
    assert [entry["event"] for entry in logs] == ["a check of readiness failed"]


async def test_gauges_outlast_whatever_goes_wrong(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    failures: list[Exception] = [KeyError("odd"), asyncpg.InvalidPasswordError("no"), asyncpg.LockNotAvailableError("")]
    read_at_last = asyncio.Event()

    async def read(_connection: object) -> None:
        if failures:
            raise failures.pop()
        read_at_last.set()

    monkeypatch.setattr(gauges, "read", read)
    monkeypatch.setattr(gauges, "INTERVAL", 0.01)
    # As a worker does it.
    reading = asyncio.create_task(supervision.keep_running("gauges", partial(gauges.keep_reading, settings)))
    await asyncio.wait({reading, asyncio.create_task(read_at_last.wait())}, timeout=20, return_when="FIRST_COMPLETED")
    assert read_at_last.is_set()
    reading.cancel()


async def test_a_database_that_refuses_is_waited_for_only_by_who_can(settings: Settings) -> None:
    right = urlsplit(settings.database_url.get_secret_value())
    wrong = urlunsplit(right._replace(netloc=right.netloc.replace(f":{right.password}@", ":wrong@")))
    async with create_pool(settings.model_copy(update={"database_url": SecretStr(wrong)})) as pool:
        with pytest.raises(DatabaseUnavailable) as refused:
            await asyncio.wait_for(wait_until_answering(pool, through_refusals=False), 20)
        assert is_refusal(refused.value)
        with capture_logs() as logs:
            waiting = asyncio.create_task(wait_until_answering(pool))

            async def said() -> bool:
                return bool(logs)

            await until(said, "a word in the log")
            waiting.cancel()
        assert "password authentication failed" in logs[0]["reason"]
