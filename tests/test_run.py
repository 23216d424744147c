"""`trellis run` as a person uses it: started, killed, started again."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import asyncpg
import httpx
import pytest

from app.local.process import free_port
from tests.support import until_step

ADDRESS = {"line1": "1 Main St", "city": "Springfield", "state": "IL", "zip": "62701"}


class Run:
    """One `trellis run` in a process group of its own, and the ports it uses."""

    def __init__(self, data: Path) -> None:
        self.data = data
        self.port, self.postgres_port, self.temporal_port = free_port(), free_port(), free_port()
        self.url = f"http://127.0.0.1:{self.port}"

    def start(self, *more: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "app", "run", "--no-ui", "--data", str(self.data), *more]
        command += ["--port", str(self.port), "--postgres-port", str(self.postgres_port)]
        command += ["--temporal-port", str(self.temporal_port)]
        environment = {**os.environ, "TRELLIS_PAYMENT_URL": "", "TRELLIS_CARRIER_URL": ""}
        with (self.data.parent / "run.log").open("ab") as log:
            return subprocess.Popen(
                command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True, env=environment
            )

    @asynccontextmanager
    async def running(self, *more: str) -> AsyncIterator[tuple[subprocess.Popen[bytes], httpx.AsyncClient]]:
        process = self.start(*more)
        try:
            async with httpx.AsyncClient(base_url=self.url, timeout=20) as client:
                await self._until_ready(process, client)
                yield process, client
        finally:
            if process.poll() is None:
                process.terminate()
            await asyncio.to_thread(process.wait, 60)

    async def _until_ready(self, process: subprocess.Popen[bytes], client: httpx.AsyncClient) -> None:
        async with asyncio.timeout(90):
            while True:
                assert process.poll() is None, (self.data.parent / "run.log").read_text()[-2000:]
                try:
                    if (await client.get("/readyz")).status_code == 200:
                        return
                except httpx.TransportError:
                    pass
                await asyncio.sleep(0.2)


async def start(client: httpx.AsyncClient, order_id: str, **request: object) -> None:
    body = {"payment_id": f"pay-{order_id}", "review_timeout_seconds": 600, **request}
    answer = await client.post(f"/orders/{order_id}/start", json=body)
    assert answer.status_code == 202, answer.text


@pytest.mark.timeout(240)
async def test_every_order_survives_the_death_of_everything(tmp_path: Path) -> None:
    run = Run(tmp_path / "data")
    async with run.running() as (process, client):
        await start(client, "approved-early")
        await client.post("/orders/approved-early/signals/approve")
        await start(client, "in-review")
        await start(client, "expiring", review_timeout_seconds=3)
        await start(client, "charging", payment_id="pay-slow-charging")
        await start(client, "preparing", address={**ADDRESS, "zip": "00001"})
        await start(client, "done")
        for order_id in ("charging", "preparing", "done"):
            await client.post(f"/orders/{order_id}/signals/approve")
        await until_step(client, "in-review", "awaiting_review")
        await until_step(client, "charging", "charging")
        await until_step(client, "preparing", "prepared", "shipped")
        await until_step(client, "done", "shipped")
        await start(client, "just-received")
        os.killpg(process.pid, signal.SIGKILL)
        await asyncio.to_thread(process.wait, 10)

    async with run.running() as (process, client):
        for order_id in ("in-review", "just-received"):
            answer = await client.post(f"/orders/{order_id}/signals/approve")
            assert answer.status_code == 202, answer.text
        await until_step(client, "expiring", "expired", timeout=60)
        for order_id in ("approved-early", "in-review", "just-received", "charging", "preparing", "done"):
            await until_step(client, order_id, "shipped", timeout=90)
        await _one_charge_per_payment(run)
        process.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(process.wait, 60) == 0


async def _one_charge_per_payment(run: Run) -> None:
    books = await asyncpg.connect(f"postgresql://trellis:trellis@127.0.0.1:{run.postgres_port}/trellis")
    charged = "SELECT payment, count(*) FROM sandbox.charges GROUP BY payment"
    paid = "SELECT payment_id FROM payments WHERE status = 'CHARGED'"
    try:
        charges = dict(await books.fetch(charged))
        assert charges == {row["payment_id"]: 1 for row in await books.fetch(paid)}
    finally:
        await books.close()


@pytest.mark.timeout(240)
async def test_traces_can_be_read_without_a_collector(tmp_path: Path) -> None:
    file = tmp_path / "spans"
    async with Run(tmp_path / "data").running("--trace", str(file)) as (process, client):
        await start(client, "o-1", address=ADDRESS)
        await client.post("/orders/o-1/signals/approve")
        await until_step(client, "o-1", "shipped", timeout=60)
        trace_id = (await client.get("/orders/o-1")).json()["trace_id"]
        process.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(process.wait, 60) == 0
    lines = [line for line in file.read_text().splitlines() if f"trace={trace_id}" in line]
    shown = re.compile(r"(\d\d:\d\d:\d\d\.\d{3}) +([\d.]+) ms +(\S.*?)  +(.*) span=(\w{16}) (?:parent=(\w{16})|root)")
    spans = {found[5]: found for found in map(shown.match, lines) if found}
    assert len(spans) == len(lines), lines
    names = Counter(found[3] for found in spans.values())
    for once in (
        "POST /orders/{id}/start",
        *(f"RunWorkflow:{workflow}" for workflow in ("OrderWorkflow", "ShippingWorkflow")),
        *(f"RunActivity:{activity}" for activity in ("receive", "validate", "charge", "prepare", "dispatch")),
        *("POST /v1/charges", "POST /v1/parcels"),
    ):
        assert names[once] == 1, names
    # Every span but the first says below which other one it belongs.
    assert [found[3] for found in spans.values() if found[6] not in spans] == ["POST /orders/{id}/start"]
    assert all("order.id=o-1" in found[0] for found in spans.values())
    assert "1 Main St" not in file.read_text()
