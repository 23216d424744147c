"""What traces, metrics and logs cost: orders per second and CPU time per order, with and without, in turns.

Each turn is a fresh process of the product on servers that all turns share: it carries a batch of orders from their
start to `shipped`. With telemetry it exports every span to a collector that throws them away, is scraped every
few seconds, and logs to a file; without, it does none of that.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import socket
import statistics
import sys
import tempfile
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import asyncpg
import httpx

from app.db import migrate
from app.local.stack import LocalStack

AT_ONCE = 20
WARM_UP = 30
#: As Prometheus does by default in most installations.
SCRAPE_SECONDS = 15
_TICKS = os.sysconf("SC_CLK_TCK")

_COLLECTOR = """
import http.server

class Discard(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_POST(self):
        self.rfile.read(int(self.headers["content-length"]))
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()
    def log_message(self, *_):
        pass

server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Discard)
print(server.server_port, flush=True)
server.serve_forever()
"""


@dataclass(frozen=True)
class Result:
    """What one turn measured."""

    telemetry: bool
    orders_per_second: float
    cpu_ms_per_order: float


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer orders; good enough to see that it works")
    quick = parser.parse_args().quick
    orders, rounds = (60, 1) if quick else (300, 3)
    with tempfile.TemporaryDirectory() as folder:
        results = asyncio.run(_measure(Path(folder), orders, rounds))
    _report(results, orders)


async def _measure(folder: Path, orders: int, rounds: int) -> list[Result]:
    results = []
    async with LocalStack(folder, durable=False) as stack, _collector() as endpoint:
        await asyncio.to_thread(migrate, stack.database_url)
        env = {
            **{name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ},
            "TRELLIS_DATABASE_URL": stack.database_url,
            "TRELLIS_TEMPORAL_ADDRESS": stack.temporal_address,
            "TRELLIS_LOG_FORMAT": "json",
        }
        on = {"TRELLIS_METRICS_PORT": str(_free_port()), "OTEL_EXPORTER_OTLP_ENDPOINT": endpoint}
        off = {"TRELLIS_LOG_LEVEL": "error"}
        for _ in range(rounds):
            for telemetry in (False, True):
                result = await _turn(folder, env | (on if telemetry else off), orders, telemetry=telemetry)
                print(f"  {_name(result)}: {result.orders_per_second:.1f} orders/s", flush=True)
                results.append(result)
    return results


async def _turn(folder: Path, env: dict[str, str], orders: int, *, telemetry: bool) -> Result:
    port = _free_port()
    command = [sys.executable, "-m", "bench.product", str(port), "on" if telemetry else "off"]
    with (folder / "log").open("ab") as log:
        product = await asyncio.create_subprocess_exec(*command, env=env, stdout=log, stderr=log)
    scraping = asyncio.create_task(_scrape(env.get("TRELLIS_METRICS_PORT")))
    try:
        async with (
            asyncpg.create_pool(env["TRELLIS_DATABASE_URL"], min_size=1, max_size=1) as pool,
            httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as api,
        ):
            await _until_ready(api)
            await _batch(api, pool, WARM_UP)
            cpu, began = _cpu_seconds(product.pid), time.monotonic()
            await _batch(api, pool, orders)
            seconds, cpu = time.monotonic() - began, _cpu_seconds(product.pid) - cpu
    finally:
        scraping.cancel()
        product.terminate()
        await product.wait()
    return Result(telemetry, orders / seconds, cpu * 1000 / orders)


async def _batch(api: httpx.AsyncClient, pool: asyncpg.Pool, orders: int) -> None:
    prefix, gate = uuid.uuid4().hex[:8], asyncio.Semaphore(AT_ONCE)

    async def one(number: int) -> None:
        order_id = f"{prefix}-{number}"
        async with gate:
            body = {"payment_id": order_id, "review_timeout_seconds": 600}
            (await api.post(f"/orders/{order_id}/start", json=body)).raise_for_status()
            (await api.post(f"/orders/{order_id}/signals/approve")).raise_for_status()

    await asyncio.gather(*(one(number) for number in range(orders)))
    query = "SELECT count(*) FROM orders WHERE id LIKE $1 || '-%' AND state = 'shipped'"
    async with asyncio.timeout(300):
        while True:
            if await pool.fetchval(query, prefix) == orders:
                return
            await asyncio.sleep(0.02)


async def _until_ready(api: httpx.AsyncClient) -> None:
    async with asyncio.timeout(60):
        while True:
            try:
                if (await api.get("/readyz")).is_success:
                    return
            except httpx.TransportError:
                pass
            await asyncio.sleep(0.1)


async def _scrape(port: str | None) -> None:
    async with httpx.AsyncClient() as client:
        while port:
            await asyncio.sleep(SCRAPE_SECONDS)
            try:
                await client.get(f"http://127.0.0.1:{port}/metrics")
            except httpx.TransportError:
                pass  # it is not there yet


@asynccontextmanager
async def _collector() -> AsyncIterator[str]:
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", _COLLECTOR, stdout=asyncio.subprocess.PIPE)
    assert process.stdout
    port = (await process.stdout.readline()).decode().strip()
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        await process.wait()


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _name(result: Result) -> str:
    return "with telemetry" if result.telemetry else "without       "


def _report(results: list[Result], orders: int) -> None:
    rates: dict[bool, float] = {}
    costs: dict[bool, float] = {}
    print(f"\nOrders from start to shipped, {orders} per turn, {AT_ONCE} requests at once; median of the turns\n")
    for telemetry in (False, True):
        turns = [result for result in results if result.telemetry is telemetry]
        rates[telemetry] = statistics.median(turn.orders_per_second for turn in turns)
        costs[telemetry] = statistics.median(turn.cpu_ms_per_order for turn in turns)
        spread = " ".join(f"{turn.orders_per_second:.1f}" for turn in turns)
        print(
            f"{_name(turns[0])}  {rates[telemetry]:7.1f} orders/s  {costs[telemetry]:7.1f} ms CPU per order  ({spread})"
        )
    print(
        f"telemetry costs {1 - rates[True] / rates[False]:.1%} of orders/s, {costs[True] / costs[False] - 1:+.1%} CPU"
    )
