"""`trellis load` against the real product: its mix, its summary, and how it ends."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import re
import signal
import sys
from collections import Counter

import httpx
import pytest

from app.cli.load import REFUND, WEIGHTS, Plan
from app.local.process import free_port
from tests.support import until

#: `trellis load` without the commands that serve: loading those takes longer than what is tested here.
PROGRAM = "import typer; from app.cli.load import load; app = typer.Typer(); app.command()(load); app()"


async def _start(url: str, *arguments: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", PROGRAM, "--url", url, *arguments),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=os.environ,
    )


async def _end(process: asyncio.subprocess.Process) -> tuple[int | None, str, str]:
    try:
        out, err = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
    return process.returncode, out.decode(), err.decode()


def _plan(seed: int) -> Plan:
    return Plan(rate=1, duration=1, in_flight=1, patience=1, seed=seed)


def test_a_seed_draws_the_same_mix_again() -> None:
    first, again, other = (list(itertools.islice(_plan(seed).scenarios(), 500)) for seed in (1, 1, 2))
    assert first == again != other
    drawn = Counter(scenario.name for scenario in first)
    assert drawn.keys() == {"approve", "expire", "cancel", "decline", "flaky", "refund"}
    for scenario, weight in WEIGHTS.items():
        assert 0.5 < drawn[scenario.name] / (5 * weight) < 1.5, scenario


async def test_every_kind_of_order_ends_as_it_should(api_url: str, api: httpx.AsyncClient) -> None:
    # The first twenty of this seed have all six kinds.
    first = Counter(scenario.name for scenario in itertools.islice(_plan(0).scenarios(), 20))
    assert len(first) == 6
    code, out, err = await _end(await _start(api_url, "--rate", "10", "--duration", "2", "--seed", "0", "--json"))
    assert code == 0, out + err
    report = json.loads(out)
    assert report["orders"] == report["accepted"] == 20
    assert report["unexpected"] == []
    assert {each["scenario"]: each["orders"] for each in report["scenarios"]} == first
    shipped = (await api.get("/orders", params={"step": "shipped", "limit": 100})).json()["orders"]
    assert len(shipped) == first["approve"] + first["flaky"] == report["steps"]["shipped"]
    [refunded] = [each for each in report["scenarios"] if each["scenario"] == REFUND.name]
    assert refunded["step"] == "shipping_failed"
    spread = refunded["end_to_end_seconds"]
    assert 0 < spread["p50"] <= spread["p95"] <= spread["p99"]


async def test_ctrl_c_starts_no_more_and_waits_for_the_rest(api_url: str, api: httpx.AsyncClient) -> None:
    process = await _start(api_url, "--rate", "20", "--duration", "0", "--seed", "1")

    async def orders() -> bool:
        return bool((await api.get("/orders", params={"limit": 1})).json()["orders"])

    await until(orders, "the first order", timeout=60)
    process.send_signal(signal.SIGINT)
    code, out, err = await _end(process)
    assert code == 0, out + err
    assert err.startswith("20 orders/s, until Ctrl-C, seed 1\n")
    [(started, unexpected)] = re.findall(r"^(\d+) orders in [\d.]+ s, seed 1:.* (\d+) unexpected$", out, re.MULTILINE)
    assert int(started) > 0
    assert unexpected == "0"
    assert re.search(rf"^all +{started}( +\d+ ms| +[\d.]+ s){{3}}$", out, re.MULTILINE)
    kept = (await api.get("/orders", params={"limit": 100})).json()["orders"]
    assert len(kept) == min(int(started), 100)


async def test_a_second_ctrl_c_leaves_the_orders_to_themselves(api_alone: httpx.AsyncClient) -> None:
    # Without workers nothing ends, so that there is something to leave.
    process = await _start(str(api_alone.base_url), "--rate", "20", "--duration", "0", "--seed", "1")
    assert process.stderr
    assert await process.stderr.readline() == b"20 orders/s, until Ctrl-C, seed 1\n"
    async with asyncio.timeout(60):
        while b" started, " not in (line := await process.stderr.readline()):  # one every ten seconds
            assert line, await _end(process)
    process.send_signal(signal.SIGINT)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(asyncio.shield(process.wait()), 1)
    process.send_signal(signal.SIGINT)
    code, out, _ = await _end(process)
    assert code == 130, out
    assert re.search(r"^(\d+) orders in .*\b\1 left to themselves, 0 unexpected$", out, re.MULTILINE)


async def test_orders_that_do_not_end_are_named_and_fail_it(api_alone: httpx.AsyncClient) -> None:
    arguments = ("--rate", "2", "--duration", "1", "--patience", "1", "--seed", "1")
    code, out, _ = await _end(await _start(str(api_alone.base_url), *arguments))
    assert code == 1
    assert len(re.findall(r"^load-\w+-\d{6} \(\w+\): still received, not \w+$", out, re.MULTILINE)) == 2
    assert re.search(r"seed 1:.* 2 unexpected$", out, re.MULTILINE)


async def test_no_api_is_one_line() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    code, out, err = await _end(await _start(url))
    assert (code, out) == (4, "")
    assert err == f"trellis: no API at {url}; is `trellis run` running? choose another with --url\n"
