"""A database and a Temporal namespace that do not belong together are told apart before anything is done."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any

import httpx
import pytest
from google.protobuf.duration_pb2 import Duration
from temporalio.api.workflowservice.v1 import RegisterNamespaceRequest
from temporalio.service import RPCError
from typer.testing import CliRunner

from app.api import create_app
from app.audit.models import Kind
from app.cli import edge
from app.cli.main import app as cli
from app.domain.steps import Step
from app.errors import DatabaseUnavailable, WrongNamespace
from app.reconcile.models import ReconcileRequest
from app.services import Services, open_services
from app.settings import Settings
from app.temporal.client import is_namespace_missing, is_not_found
from app.temporal.identity import Identity, wait_until_ours
from app.workers import reconciler
from tests.bookkeeping import Shop, opened_shop
from tests.support import until


@pytest.fixture
async def elsewhere(services: Services) -> str:
    """Another namespace on the same server, as another environment has one."""
    name = f"other-{uuid.uuid4().hex[:8]}"
    day = Duration(seconds=24 * 3600)
    await services.temporal.workflow_service.register_namespace(
        RegisterNamespaceRequest(namespace=name, workflow_execution_retention_period=day)
    )
    probe = services.settings.model_copy(update={"temporal_namespace": name})
    async with open_services(probe) as other:
        identity = Identity(other.pool, other.temporal)
        await until(lambda: _answers(identity.found), "the namespace to be known everywhere")
    return name


async def _answers(ask: Any) -> bool:
    try:
        await ask()
    except RPCError:
        return False
    return True


@asynccontextmanager
async def api(settings: Settings) -> AsyncIterator[httpx.AsyncClient]:
    """The API without workers."""
    app = create_app(settings)
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    async with app.router.lifespan_context(app), httpx.AsyncClient(transport=transport, base_url="http://api") as http:
        yield http


CHANGES = [
    ("POST", "/orders/o-1/start", {"payment_id": "pay-1"}),
    ("POST", "/orders/o-1/signals/approve", None),
    ("POST", "/orders/o-1/signals/cancel", None),
    ("POST", "/orders/o-1/review", {"decision": "approve"}),
    ("POST", "/orders/o-1/cancel", {}),
]


async def test_the_first_worker_binds_the_database(services: Services) -> None:
    identity = Identity(services.pool, services.temporal)
    await identity.require()  # before: it belongs to any
    assert await identity.bound() is None
    await asyncio.gather(*(wait_until_ours(Identity(services.pool, services.temporal)) for _ in range(5)))
    assert await identity.bound() == await identity.found()


async def test_a_signal_needs_temporal_alone(services: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    """The database that went away since is no reason to refuse an approval."""
    identity = Identity(services.pool, services.temporal)
    await identity.claim()
    monkeypatch.setattr("app.temporal.identity._HOLDS", -1.0)
    await identity.require()

    async def gone() -> None:
        raise ConnectionError

    monkeypatch.setattr(identity, "bound", gone)
    await identity.require()
    never_asked = Identity(services.pool, services.temporal)
    monkeypatch.setattr(never_asked, "bound", gone)
    with pytest.raises(ConnectionError):
        await never_asked.require()


async def test_a_signal_needs_temporal_alone_also_before_a_worker_was_there(
    services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The API that took an order before the first worker had claimed the database, which is gone since."""
    identity = Identity(services.pool, services.temporal)
    await identity.require()

    async def gone() -> None:
        raise DatabaseUnavailable("ConnectionRefusedError")

    with monkeypatch.context() as away:
        away.setattr(identity, "bound", gone)
        await identity.require()
    # It is asked again as soon as it answers.
    await services.pool.execute("INSERT INTO system (key, value) VALUES ('temporal_namespace_id', 'another')")
    with pytest.raises(WrongNamespace):
        await identity.require()


async def test_another_systems_namespace_is_refused_in_words(services: Services, elsewhere: str) -> None:
    await Identity(services.pool, services.temporal).claim()
    other = services.settings.model_copy(update={"temporal_namespace": elsewhere})
    async with api(other) as http:
        for method, path, body in CHANGES:
            answer = await http.request(method, path, json=body)
            assert (answer.status_code, answer.json()["code"]) == (503, "WrongNamespace"), path
            assert elsewhere in answer.json()["detail"]
        ready = (await http.get("/readyz")).json()
        assert "another Temporal namespace" in ready["checks"]["temporal"]
        assert (await http.get("/orders")).status_code == 200
    async with open_services(other) as wrong:
        with pytest.raises(WrongNamespace):
            await Identity(wrong.pool, wrong.temporal).claim()
        with pytest.raises(TimeoutError):  # a worker waits, and takes no work
            async with asyncio.timeout(0.5):
                await wait_until_ours(Identity(wrong.pool, wrong.temporal))


async def test_reconcile_touches_nothing_with_another_systems_namespace(services: Services, elsewhere: str) -> None:
    await Identity(services.pool, services.temporal).claim()
    other = services.settings.model_copy(update={"temporal_namespace": elsewhere})
    async with opened_shop(services) as shop, open_services(other) as wrong:
        for step in (Step.AWAITING_REVIEW, Step.CHARGING, Step.CHARGED, Step.PREPARED):
            if step is Step.AWAITING_REVIEW:
                await shop.orders.receive(shop.input(f"o-{step}"), "run")
                await shop.orders.open_review(shop.input(f"o-{step}"))
            else:
                await shop.order(f"o-{step}", step)
        everything = ReconcileRequest(apply=True, grace_seconds=0, settle_seconds=0, accept_unknown=True)
        with pytest.raises(WrongNamespace):
            await reconciler(wrong, everything).run()
        states = await shop.pool.fetch("SELECT id, state FROM orders")
        assert all(row["id"] == f"o-{row['state']}" for row in states)


# --- another environment's: each of the four, and what becomes of it

#: What one configuration of an environment may have of another one, and what the product does then. Each has a test.
OTHERS = {
    "namespace": "refused: its id is in the database, see decision 57",
    "database": "refused: it has the id of its own namespace",
    "provider": "reconcile refuses to write a charge off; the audit tells of charges that nobody knows",
    "carrier": "the audit tells of parcels that nobody has; the contract has no other look that changes nothing",
}


@pytest.mark.parametrize("which", OTHERS)
async def test_what_belongs_to_another_environment(services: Services, elsewhere: str, which: str) -> None:
    """Ours has an order in doubt and an order that was shipped; then one of four parts is another environment's."""
    await Identity(services.pool, services.temporal).claim()
    async with opened_shop(services) as shop:
        await shop.order("o-doubt", Step.CHARGING)
        await shop.charge("pay-o-doubt")
        await shop.order("o-shipped", Step.SHIPPED)
        await OTHER_CASES[which](services, shop, elsewhere)
        assert await shop.pool.fetchval("SELECT status FROM payments WHERE order_id = 'o-doubt'") == "INIT"
        assert await shop.pool.fetchval("SELECT state FROM orders WHERE id = 'o-doubt'") == Step.CHARGING


async def _other_namespace(services: Services, _shop: Shop, elsewhere: str) -> None:
    async with open_services(services.settings.model_copy(update={"temporal_namespace": elsewhere})) as mixed:
        with pytest.raises(WrongNamespace):
            await reconciler(mixed, EVERYTHING).run()
        with pytest.raises(WrongNamespace):
            await Identity(mixed.pool, mixed.temporal).claim()


async def _other_database(services: Services, _shop: Shop, elsewhere: str) -> None:
    """Ours here is the namespace `elsewhere`, and the database has the id of its own."""
    mixed = services.settings.model_copy(update={"temporal_namespace": elsewhere})
    async with api(mixed) as http:
        answer = await http.post("/orders/o-new/start", json={"payment_id": "pay-new"})
        assert (answer.status_code, answer.json()["code"]) == (503, "WrongNamespace")
        assert "TRELLIS_DATABASE_URL" in answer.json()["detail"]


async def _other_provider(services: Services, shop: Shop, _elsewhere: str) -> None:
    """It knows neither the charge in doubt nor any other."""
    await shop.sql(*(f"DELETE FROM sandbox.{table}" for table in ("refunds", "charges", "idempotency_keys")))
    report = await reconciler(services, EVERYTHING).run()
    (repair,) = [repair for repair in report.repairs if repair.order_id == "o-doubt"]
    assert not repair.done
    assert "is it another environment's? See TRELLIS_PAYMENT_URL" in (repair.detail or "")
    assert Kind.CHARGE_MISSING in (await shop.kinds())["o-shipped"]


async def _other_carrier(_services: Services, shop: Shop, _elsewhere: str) -> None:
    await shop.sql("DELETE FROM sandbox.parcels")
    assert Kind.PARCEL_MISSING in (await shop.kinds())["o-shipped"]


OTHER_CASES = {
    "namespace": _other_namespace,
    "database": _other_database,
    "provider": _other_provider,
    "carrier": _other_carrier,
}
EVERYTHING = ReconcileRequest(apply=True, grace_seconds=0, settle_seconds=0, accept_unknown=True)


async def test_a_namespace_that_is_not_there_is_no_closed_order(services: Services) -> None:
    """Temporal answers NOT_FOUND for both, and a caller who hears "too late" does not try again."""
    async with opened_shop(services) as shop:
        await shop.order("o-1", Step.CHARGED)
    nowhere = services.settings.model_copy(update={"temporal_namespace": f"nowhere-{uuid.uuid4().hex[:8]}"})
    async with api(nowhere) as http:
        for method, path, body in CHANGES:
            answer = await http.request(method, path.replace("o-1/start", "o-2/start"), json=body)
            assert (answer.status_code, answer.json()["code"]) == (503, "NamespaceNotFound"), path


async def test_what_was_not_found_is_told_apart(services: Services) -> None:
    with pytest.raises(RPCError) as unknown:
        await services.temporal.get_workflow_handle("order/nobody").describe(rpc_timeout=timedelta(seconds=10))
    assert (is_not_found(unknown.value), is_namespace_missing(unknown.value)) == (True, False)
    settings = services.settings.model_copy(update={"temporal_namespace": f"nowhere-{uuid.uuid4().hex[:8]}"})
    async with open_services(settings) as nowhere:
        with pytest.raises(RPCError) as missing:
            await nowhere.temporal.get_workflow_handle("order/nobody").describe(rpc_timeout=timedelta(seconds=10))
    assert (is_not_found(missing.value), is_namespace_missing(missing.value)) == (False, True)


async def test_an_operator_binds_it_anew(services: Services, elsewhere: str, monkeypatch: pytest.MonkeyPatch) -> None:
    identity = Identity(services.pool, services.temporal)
    await identity.claim()
    before = await identity.bound()
    settings = services.settings
    monkeypatch.setenv("TRELLIS_DATABASE_URL", settings.database_url.get_secret_value())
    monkeypatch.setenv("TRELLIS_TEMPORAL_ADDRESS", settings.temporal_address)
    monkeypatch.setenv("TRELLIS_TEMPORAL_NAMESPACE", elsewhere)

    async def said(*command: str) -> tuple[int, str]:
        result = await asyncio.to_thread(CliRunner().invoke, cli, list(command), input="n\n")
        if isinstance(result.exception, Exception):
            # What `run_command` makes of it.
            end = edge.end_of(result.exception)
            return end.code, f"{result.output}{end.message}"
        return result.exit_code, result.output

    for command in (("audit",), ("reconcile",)):
        code, output = await said(*command)
        assert code == 2
        assert "another Temporal namespace" in output
    assert (await said("namespace", "show"))[0] == 1
    assert (await said("namespace", "bind"))[0] == 2
    assert await identity.bound() == before
    assert (await said("namespace", "bind", "--yes"))[0] == 0
    assert await identity.bound() != before
    for command in (("namespace", "bind"), ("namespace", "show"), ("audit",), ("reconcile",)):
        assert (await said(*command))[0] == 0, command
