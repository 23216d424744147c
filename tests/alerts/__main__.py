"""`python -m tests.alerts`: every alert is made to fire on the real stack, before a real Prometheus.

The rules are those of the chart, their windows too; only `for:` is cut to a few seconds. While an alert fires, the
commands under *Diagnosis* in its runbook are run, but for those with `kubectl`. Needs `prometheus` and `promtool` on
the PATH, and takes about eight minutes.

Exit code 0: every alert but those in `NOT_HERE` fired, none did before its cause was there, and every command worked.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random
from typing import Any, Final

import asyncpg
import httpx
import yaml

from app.local.process import Launch, ServerProcess, free_port
from tests.faults.stack import ROOT, Member, Stack, eventually

RULES: Final = ROOT / "charts/trellis/rules"
RUNBOOKS: Final = ROOT / "docs/runbooks"

#: Alerts that cannot fire here, and why.
NOT_HERE: Final = {"TrellisAuditFailed": "it needs kube-state-metrics"}

#: Exit codes of commands that found what they were asked to look for.
_FINDINGS: Final = {"trellis audit": 1, "trellis reconcile": 1}

#: Seconds of silence before anything is provoked.
_SILENCE: Final = 20


class ObservedStack(Stack):
    """The stack of the fault tests, unbroken: everyone's metrics on a port, and order workers with few slots."""

    def __init__(self, data: Path) -> None:
        super().__init__(data, Random(0), _say, arm=False)
        self.metrics: dict[str, int] = {}

    def _add(self, name: str, args: list[str], env: dict[str, str], queue: str | None = None) -> None:
        if name != "sandbox":  # which stands for servers of others
            self.metrics[name] = free_port()
            env |= {"TRELLIS_METRICS_PORT": str(self.metrics[name])}
        if queue == "default":
            env |= {"TRELLIS_MAX_CONCURRENT_ACTIVITIES": "4"}
        super()._add(name, args, env, queue)

    def hold_down(self, *names: str) -> None:
        """Kill these, until they are started again."""
        for name in names:
            self.members[name].down = True
            self.kill(name)

    def bring_back(self, *names: str) -> None:
        """Start those that were held down."""
        for name in names:
            self.start(self.members[name])

    def careless_worker(self) -> Member:
        """A worker with another workflow and the sandbox's carrier, in the place of the first order worker.

        It takes the metrics port of that one.
        """
        member = self.members["orders-1"]
        args = [sys.executable, "-m", "tests.alerts.careless_worker"]
        env = member.env | {"TRELLIS_CARRIER_URL": "", "TRELLIS_SANDBOX": "true"}
        member.process = ServerProcess("careless", Launch(args, self.data / "careless.log", env, cwd=ROOT))
        member.process.spawn()
        return member


class Watch:
    """What Prometheus says of the alerts, and the commands that their runbooks name."""

    def __init__(self, prometheus: str, stack: ObservedStack) -> None:
        self.fired: dict[str, float] = {}
        self.broken: list[str] = []
        self._prometheus = prometheus
        self._stack = stack
        self._began = time.monotonic()

    async def keep_looking(self) -> None:
        """Until it is cancelled."""
        async with httpx.AsyncClient(base_url=self._prometheus, timeout=10) as client:
            while True:
                for alert in (await client.get("/api/v1/alerts")).json()["data"]["alerts"]:
                    name = alert["labels"]["alertname"]
                    if alert["state"] == "firing" and name not in self.fired:
                        self.fired[name] = time.monotonic() - self._began
                        _say(f"FIRING {name}: {alert['annotations']['description']}")
                        await asyncio.to_thread(self._diagnose, name)
                await asyncio.sleep(1)

    async def until_fired(self, *names: str, seconds: float = 180) -> None:
        """Return when all of these have fired.

        Raises:
            TimeoutError: they have not.
        """

        async def all_fired() -> bool:
            return set(names) <= set(self.fired)

        await eventually(all_fired, seconds, f"not firing: {', '.join(sorted(set(names) - set(self.fired)))}")

    def _diagnose(self, name: str) -> None:
        runbook = (RUNBOOKS / f"{name}.md").read_text()
        diagnosis = runbook.partition("## Diagnosis")[2].partition("## Mitigation")[0]
        env = self._stack.env(direct=True) | {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "API": self._stack.api_url,
            "PROMETHEUS": self._prometheus,
            "TEMPORAL_ADDRESS": self._stack.temporal.address,
        }
        for command in re.findall(r"^\$ (.*)$", diagnosis, flags=re.MULTILINE):
            if command.startswith("kubectl "):
                continue
            ran = subprocess.run(
                ["bash", "-c", command.replace("ORDER", "doubt")],
                env=env, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False,
            )  # fmt: skip
            _say(f"    $ {command[:110]}\n" + "".join(f"      {line[:150]}\n" for line in ran.stdout.splitlines()[:3]))
            if ran.returncode not in {0, _FINDINGS.get(command, 0)}:
                self.broken.append(f"{name}: {command}: exit code {ran.returncode}: {ran.stderr.strip()[-300:]}")


class Shop:
    """Orders, and the tables that some causes need to be altered in: nobody waits a quarter of an hour here."""

    def __init__(self, api: httpx.AsyncClient, stack: ObservedStack) -> None:
        self._api = api
        self._stack = stack

    async def start(self, order_id: str, payment: str, window: int = 600, zip_code: str | None = None) -> None:
        """Start an order."""
        address = {"line1": "1 Main St", "city": "Springfield", "state": "IL", "zip": zip_code}
        body = {"payment_id": payment, "review_timeout_seconds": window} | ({"address": address} if zip_code else {})
        (await self._api.post(f"/orders/{order_id}/start", json=body)).raise_for_status()

    async def approve(self, order_id: str) -> None:
        """Approve it."""
        (await self._api.post(f"/orders/{order_id}/signals/approve")).raise_for_status()

    async def sell(self, order_id: str, payment: str, zip_code: str | None = None) -> None:
        """Start and approve it."""
        await self.start(order_id, payment, zip_code=zip_code)
        await self.approve(order_id)

    async def watch(self, order_id: str) -> None:
        """Ask for its live timeline, until that ends."""
        headers = {"Accept": "text/event-stream"}
        (await self._api.get(f"/orders/{order_id}/events", headers=headers)).raise_for_status()

    async def until_at(self, order_id: str, step: str) -> None:
        """Return when the order is at the step."""

        async def there() -> bool:
            return bool((await self._api.get(f"/orders/{order_id}/status")).json()["step"] == step)

        await eventually(there, 60, f"{order_id} does not get to {step}")

    async def alter(self, database: str, statement: str) -> None:
        """Execute a statement that changes a row.

        Raises:
            RuntimeError: it changed none.
        """
        connection = await asyncpg.connect(self._stack.postgres.url(database))
        try:
            status = await connection.execute(statement)
        finally:
            await connection.close()
        if status.endswith(" 0"):
            raise RuntimeError(f"{statement}: {status}")


async def _provoke(stack: ObservedStack, shop: Shop, watch: Watch) -> None:
    """One cause after the other; some take their time beside the next."""
    await shop.start("due", "pay-due", window=120)
    for number in range(8):
        await shop.start(f"expire-{number}", f"pay-expire-{number}", window=1)
    for number in range(3):
        await shop.start(f"review-{number}", f"pay-review-{number}")

    # A timeline that cannot be read, while somebody watches it.
    await shop.until_at("review-1", "awaiting_review")
    await shop.alter("trellis", "INSERT INTO events (order_id, type, ts) VALUES ('review-1', 'note', '4000-01-01 BC')")
    await shop.watch("review-1")
    await watch.until_fired("TrellisBackgroundFailures")

    # A refund that the provider does not know the charge of, after a carrier that takes nothing.
    await shop.sell("refund", "pay-refund", zip_code="00005")
    await shop.sell("stuck", "pay-stuck", zip_code="00006")
    await shop.until_at("refund", "prepared")
    await shop.alter("ledger", "DELETE FROM sandbox.charges WHERE payment = 'pay-refund'")
    await shop.until_at("stuck", "prepared")
    await shop.alter(
        "trellis", "UPDATE orders SET state_since = state_since - interval '20 minutes' WHERE id = 'stuck'"
    )
    await watch.until_fired("TrellisChargedUnsettled", "TrellisReviewsExpire", "TrellisRefundErrors")

    _say("the payment provider is gone")
    stack.hold_down("sandbox")
    began = time.monotonic()
    for order_id in ("doubt", *(f"repeat-{number}" for number in range(5))):
        await shop.sell(order_id, f"pay-{order_id}")
        await shop.until_at(order_id, "charging")
    await shop.alter(
        "trellis", "UPDATE payments SET created_at = created_at - interval '10 minutes' WHERE order_id = 'doubt'"
    )
    await watch.until_fired("TrellisPaymentsInDoubt", "TrellisRetryRatio")
    await asyncio.sleep(max(0.0, 65 - (time.monotonic() - began)))
    stack.bring_back("sandbox")
    _say("the payment provider is back, more than a minute later")
    await watch.until_fired("TrellisOrdersSettleSlowly")

    _say("more slow charges than slots, and nobody ships")
    stack.hold_down("shipping-1", "shipping-2")
    for number in range(80):
        await shop.sell(f"slow-{number}", f"pay-slow-{number}")
    await watch.until_fired(
        *("TrellisSlotsExhausted", "TrellisScheduleToStart"),
        *("TrellisTargetDown", "TrellisNoPollers", "TrellisBacklogAge", "TrellisReviewsDue"),
    )
    stack.bring_back("shipping-1", "shipping-2")

    _say("a careless release of the order workers")
    stack.hold_down("orders-1", "orders-2")
    careless = stack.careless_worker()
    await shop.approve("review-0")
    await watch.until_fired("TrellisNonDeterminism", "TrellisSandboxInUse")
    if careless.process:
        careless.process.kill()
    stack.bring_back("orders-1", "orders-2")
    await shop.until_at("review-0", "shipped")
    _say("the release before is back, and the order went on")


@asynccontextmanager
async def _prometheus(stack: ObservedStack, folder: Path) -> AsyncIterator[str]:
    port = free_port()
    rules = folder / "rules"
    rules.mkdir()
    for file in RULES.glob("*.yaml"):
        (rules / file.name).write_text(re.sub(r"^(\s*for:).*$", r"\1 5s", file.read_text(), flags=re.MULTILINE))
    jobs = [
        {
            "job_name": "trellis",
            "static_configs": [
                {"targets": [f"127.0.0.1:{port}" for port in stack.metrics.values()], "labels": {"namespace": "shop"}}
            ],
        },
        {
            "job_name": "temporal",
            "static_configs": [
                {"targets": [f"127.0.0.1:{stack.temporal.metrics_port}"], "labels": {"namespace": "shop"}}
            ],
        },
    ]
    configuration = {
        "global": {"scrape_interval": "2s", "evaluation_interval": "2s"},
        "rule_files": [f"{rules}/*.yaml"],
        "scrape_configs": jobs,
    }
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(configuration))
    args = [
        *("prometheus", f"--config.file={folder / 'prometheus.yaml'}", f"--storage.tsdb.path={folder / 'data'}"),
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    process = ServerProcess("Prometheus", Launch(args, folder / "prometheus.log"))
    process.spawn()
    url = f"http://127.0.0.1:{port}"

    async def answers() -> bool:
        async with httpx.AsyncClient(base_url=url) as client:
            try:
                return (await client.get("/-/ready")).is_success
            except httpx.HTTPError:
                return False

    try:
        await process.ready(answers)
        yield url
    finally:
        process.kill()


def _alerts() -> set[str]:
    groups: list[Any] = [group for file in RULES.glob("*.yaml") for group in yaml.safe_load(file.read_text())["groups"]]
    return {rule["alert"] for group in groups for rule in group["rules"] if "alert" in rule}


async def _run(folder: Path) -> int:
    stack = ObservedStack(folder)
    async with stack.running(), _prometheus(stack, folder) as prometheus:
        watch = Watch(prometheus, stack)
        looking = asyncio.create_task(watch.keep_looking())
        try:
            _say(f"everything runs; {_SILENCE} s in which nothing may fire")
            await asyncio.sleep(_SILENCE)
            too_early = sorted(watch.fired)
            async with httpx.AsyncClient(base_url=stack.api_url, timeout=30) as api:
                if not too_early:
                    await _provoke(stack, Shop(api, stack), watch)
        finally:
            looking.cancel()
    silent = sorted(_alerts() - set(watch.fired) - set(NOT_HERE))
    wrong = [f"fired without a cause: {name}" for name in too_early]
    wrong += [f"did not fire: {name}" for name in silent] + watch.broken
    for name, reason in NOT_HERE.items():
        _say(f"NOT TRIED: {name}: {reason}")
    for line in wrong:
        _say(f"FAILED: {line}")
    _say(f"{len(watch.fired)} alerts fired, {len(wrong)} things wrong")
    return 1 if wrong else 0


_BEGAN: Final = time.monotonic()


def _say(line: str) -> None:
    print(f"[{time.monotonic() - _BEGAN:6.1f}] {line}", flush=True)  # noqa: T201 - the run's own voice


def main() -> int:
    """Run, and say how it went."""
    argparse.ArgumentParser(prog="python -m tests.alerts", description=__doc__).parse_args()
    if missing := [program for program in ("prometheus", "promtool") if shutil.which(program) is None]:
        _say(f"SKIPPED, NOTHING WAS TESTED: not on the PATH: {', '.join(missing)}")
        return 0
    folder = Path(tempfile.mkdtemp(prefix="trellis-alerts-"))
    try:
        code = asyncio.run(_run(folder))
    except TimeoutError as error:
        _say(f"FAILED: {error}")
        code = 1
    if code:
        _say(f"logs: {folder}")
    else:
        shutil.rmtree(folder, ignore_errors=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
