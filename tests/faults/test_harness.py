"""The harness itself: what it breaks it breaks, and a seed draws the same run twice."""

from __future__ import annotations

import asyncio
import struct
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from random import Random
from urllib.parse import urlsplit

import asyncpg
import pytest
from temporalio.client import WorkflowExecutionStatus

from app.domain.steps import Step
from app.failpoints import NAMES, Action
from app.settings import Settings
from tests.conftest import Servers
from tests.faults import acts, schedule
from tests.faults.failpoint_plan import FailpointPlan
from tests.faults.orders import LEADS_TO, STORIES, Customers, Promise
from tests.faults.proxy import CommitSpotter, Proxy
from tests.faults.run import Plan
from tests.shop import open_shop


def _message(kind: bytes, body: bytes) -> bytes:
    return kind + struct.pack("!I", len(body) + 4) + body


@pytest.mark.parametrize("piece", [1, 3, 7, 1000])
def test_commits_are_spotted_in_any_pieces(piece: int) -> None:
    seen: list[int] = []
    spotter = CommitSpotter(lambda: seen.append(1))
    stream = b"".join(
        [
            _message(b"", struct.pack("!I", 80877103)),
            _message(b"", struct.pack("!I", 196608) + b"user\0trellis\0\0"),
            _message(b"Q", b"BEGIN;\0"),
            _message(b"P", b"\0INSERT INTO events VALUES ('COMMIT is only a word here, far from the beginning')\0"),
            _message(b"Q", b"COMMIT;\0"),
        ]
    )
    for start in range(0, len(stream), piece):
        spotter.feed(stream[start : start + piece])
    assert len(seen) == 1


@pytest.mark.parametrize("piece", [1, 3, 7, 1000])
def test_a_statement_that_writes_alone_is_a_commit(piece: int) -> None:
    def asked_for(name: bytes) -> bytes:
        return _message(b"B", b"\0" + name + b"\0COMMIT is only a value here") + _message(b"S", b"")

    begin, commit, rollback = (_message(b"Q", word + b";\0") for word in (b"BEGIN", b"COMMIT", b"ROLLBACK"))
    prepared = _message(b"P", b"begin\0BEGIN\0\0\0") + _message(b"P", b"end\0COMMIT\0\0\0")
    told: list[str] = []
    spotter = CommitSpotter(lambda: told.append("commit"))
    for what, expected, stream in (
        ("start", 0, _message(b"", struct.pack("!I", 196608) + b"user\0trellis\0\0")),
        ("prepare", 0, _message(b"P", b"move\0WITH was AS (SELECT) UPDATE orders SET state = $1\0\0\0")),
        ("prepare", 0, _message(b"P", b"look\0SELECT FROM orders FOR NO KEY UPDATE\0\0\0")),
        ("write", 1, asked_for(b"move")),
        ("write again", 1, asked_for(b"move")),
        ("read", 0, asked_for(b"look")),
        ("transaction", 1, begin + asked_for(b"move") + asked_for(b"move") + commit),
        (
            "transaction with all of it prepared",
            1,
            prepared + asked_for(b"begin") + asked_for(b"move") + asked_for(b"end"),
        ),
        ("broken off", 0, begin + asked_for(b"move") + rollback),
        ("write after it", 1, asked_for(b"move")),
        ("as text", 1, _message(b"Q", b"INSERT INTO events DEFAULT VALUES\0")),
        ("another under the same name", 0, _message(b"P", b"move\0SELECT 1\0\0\0") + asked_for(b"move")),
    ):
        told.clear()
        for start in range(0, len(stream), piece):
            spotter.feed(stream[start : start + piece])
        assert len(told) == expected, what


@pytest.mark.parametrize("alone", [False, True])
async def test_the_commit_is_done_and_its_reply_is_lost(servers: Servers, empty_database_url: str, alone: bool) -> None:
    server = urlsplit(empty_database_url)
    assert server.hostname
    assert server.port
    proxy = Proxy("test", server.port, host=server.hostname, postgres=True)
    async with proxy.listening():
        connection = await asyncpg.connect(empty_database_url, host="127.0.0.1", port=proxy.port)
        await connection.execute("CREATE TABLE told (what text)")
        proxy.commits_to_lose = 1
        with pytest.raises((asyncpg.PostgresConnectionError, asyncpg.InterfaceError, OSError)):
            async with nullcontext() if alone else connection.transaction():
                await connection.execute("INSERT INTO told VALUES ($1)", "done")
        assert proxy.commits_lost == 1
    direct = await asyncpg.connect(empty_database_url)
    assert await direct.fetchval("SELECT what FROM told") == "done"
    await direct.close()


async def test_half_open_is_silence_and_not_an_end() -> None:
    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(100):
            writer.write(data)

    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    proxy = Proxy("test", server.sockets[0].getsockname()[1])
    async with proxy.listening():
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        writer.write(b"a")
        assert await reader.read(1) == b"a"
        proxy.freeze()
        writer.write(b"b")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(reader.read(1), 0.2)
        proxy.heal()
        assert await reader.read(1) == b""
        writer.close()
    server.close()


def test_a_seed_draws_the_same_schedule_twice() -> None:
    assert schedule.draw(Random("1"), 180, 8) == schedule.draw(Random("1"), 180, 8)
    assert schedule.draw(Random("1"), 180, 8) != schedule.draw(Random("2"), 180, 8)


def test_a_long_schedule_has_every_kind() -> None:
    assert {fault.kind for fault in schedule.draw(Random("1"), 1800, 20)} == set(schedule.FAULTS)


def test_a_seed_draws_the_same_acts_twice_and_each_kind_by_itself() -> None:
    everything = acts.draw(Random("1"), 180, list(acts.ACTS))
    assert everything == acts.draw(Random("1"), 180, list(acts.ACTS))
    assert {act.kind for act in everything} == set(acts.ACTS)
    some = acts.draw(Random("1"), 180, ["lies", "terminate"])
    assert some == [act for act in everything if act.kind in {"lies", "terminate"}]
    assert {act.workflow for act in everything if act.kind == "reset"} == {"order", "shipping"}
    assert all(5 <= act.at < 180 for act in everything)


@pytest.mark.parametrize("kind", ["terminate", "cancel", "reset"])
async def test_an_act_does_what_it_says(settings: Settings, kind: str) -> None:
    async with open_shop(settings) as shop:
        order = await shop.order()
        await order.reaches(Step.AWAITING_REVIEW)
        promise = Promise(order.id, "plain", accepted=True)
        customers = Customers("", "", shop.client, Random("1"), "o", promises={order.id: promise})
        before = await order.workflow.describe()
        act = acts.Act(0, kind, "order", which=0.5, how_far=0.99)
        told = await acts.ACTS[kind](act, None, customers)  # type: ignore[arg-type] - no stack is needed for these
        assert told
        assert told.startswith(f"order/{order.id}")
        assert promise.terminated
        after = await order.workflow.describe()
        if kind == "reset":
            assert after.run_id != before.run_id
            await order.approve()
            assert await order.ends() is Step.SHIPPED
        elif kind == "cancel":
            assert await order.ends() is Step.CANCELLED
        else:
            assert after.status is WorkflowExecutionStatus.TERMINATED


@pytest.mark.parametrize("kinds", [(), ("terminate", "lies")])
def test_the_command_that_replays_a_run_names_its_acts(kinds: tuple[str, ...], tmp_path: Path) -> None:
    plan = Plan(seed=1, minutes=3, rate=2.5, pause=8, kills=0, orders=80, out=tmp_path, keep=False)
    assert plan.command == "make faults MINUTES=3 SEED=1"
    some = replace(plan, acts=kinds)
    assert some.command == f'make faults MINUTES=3 SEED=1 ARGS="--acts {",".join(kinds) or "none"}"'


def test_a_process_gets_what_is_missing(tmp_path: Path) -> None:
    plan = FailpointPlan(tmp_path / "hits", Random("1"))
    assert len(plan.missing()) == len(NAMES) * len(Action)
    assert "charge." not in plan.spec("shipping")
    assert "recall." not in plan.spec("default")
    everything = [f"0 1 {name} {action}\n" for name in NAMES for action in Action]
    plan.log.write_text("".join(line for line in everything if "note.before_reply fail" not in line))
    assert plan.spec("default") == "note.before_reply=fail:0.25:1"
    assert "fail:0.0" in plan.spec("shipping")


def test_every_failpoint_has_a_story_that_leads_to_it() -> None:
    assert {name.split(".")[0] for name in NAMES} == set(LEADS_TO)
    assert {story for stories in LEADS_TO.values() for story in stories} <= set(STORIES)
    # A charge that goes through never comes to `charge.in_settlement`.
    assert "pay-decline" in LEADS_TO["charge"]
