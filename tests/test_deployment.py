"""Versioned workers on a real server: who gets an order before and after a promotion, and the way back."""

from __future__ import annotations

import json
import sys
import uuid
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from temporalio.api.enums.v1 import EventType
from temporalio.client import Client, ScheduleActionExecutionStartWorkflow

from app.cli.main import run_command
from app.domain.steps import Step
from app.errors import SettingsError
from app.reconcile.models import ReconcileReport, ReconcileRequest
from app.reconcile.schedule import drop_schedule, keep_schedule
from app.reconcile.workflows import ReconcileWorkflow
from app.settings import load
from app.temporal import versions as deployment
from app.temporal.versions import NotPromoted, Promotion, versions
from tests.shop import Order, Shop, fresh_settings, open_shop
from tests.support import until
from tests.telemetry import environment, started

PARKED = EventType.EVENT_TYPE_TIMER_STARTED
STEPPED = EventType.EVENT_TYPE_WORKFLOW_TASK_COMPLETED


@pytest.fixture
async def shop(servers: Any, template: str) -> AsyncIterator[Shop]:
    """A shop whose workers the test brings; at its end the books are right."""
    async with fresh_settings(servers, template) as settings, open_shop(settings, working=False) as opened:
        async with opened.serving(working=False):
            yield opened
        await opened.audit()


@pytest.fixture
def name() -> str:
    """A deployment that no other test knows."""
    return f"trellis-{uuid.uuid4().hex[:8]}"


async def open_version(shop: Shop, name: str, build: str, behavior: str = "auto_upgrade") -> None:
    """Workers of this version on both queues, beside those that run."""
    await shop.open(temporal_deployment_name=name, temporal_worker_build_id=build, versioning_behavior=behavior)


async def promote(shop: Shop, name: str, build: str | None, *, timeout: float = 30) -> list[str]:
    """What was said while it was done."""
    said: list[str] = []
    queues = (shop.settings.order_task_queue, shop.settings.shipping_task_queue)
    await Promotion(name, build, queues).carry_out(shop.client, timeout=timeout, say=said.append)
    return said


async def parked(shop: Shop) -> Order:
    """An order in review, so known to Temporal as waiting."""
    order = await shop.order()
    await order.recorded(PARKED)
    return order


async def workers_of(order: Order, *, shipment: bool = False) -> list[str]:
    """The versions that took the workflow's steps, one after the other; "" for a worker without one."""
    handle = order.shipment if shipment else order.workflow
    builds: list[str] = []
    async for event in handle.fetch_history_events():
        if event.event_type == STEPPED:
            build = event.workflow_task_completed_event_attributes.deployment_version.build_id
            builds += [] if builds[-1:] == [build] else [build]
    return builds


async def states(shop: Shop, name: str) -> dict[str, str]:
    return {version.build: version.state for version in await versions(shop.client, name)}


async def test_an_order_in_review_is_finished_by_the_version_that_was_promoted(shop: Shop, name: str) -> None:
    await open_version(shop, name, "v1")
    assert (await promote(shop, name, "v1"))[-1] == f"{name}:v1 is the current version"
    order, other = await parked(shop), await parked(shop)
    await open_version(shop, name, "v2")
    # The old version is still there; orders change over because of the promotion, not because they have to.
    await order.approve()
    assert await order.ends() is Step.SHIPPED
    assert await workers_of(order) == ["v1"]
    await promote(shop, name, "v2")
    await other.approve()
    assert await other.ends() is Step.SHIPPED
    assert await workers_of(other) == ["v1", "v2"]
    assert await workers_of(other, shipment=True) == ["v2"]
    assert (await states(shop, name))["v2"] == "current"


async def test_what_is_pinned_ends_where_it_began(shop: Shop, name: str) -> None:
    await open_version(shop, name, "v1", "pinned")
    await promote(shop, name, "v1")
    order = await parked(shop)
    await open_version(shop, name, "v2", "pinned")
    await promote(shop, name, "v2")
    assert await states(shop, name) == {"v2": "current", "v1": "draining"}
    await order.approve()
    assert await order.ends() is Step.SHIPPED
    assert await workers_of(order) == await workers_of(order, shipment=True) == ["v1"]


async def test_promoting_again_changes_nothing_and_an_older_version_takes_over_again(shop: Shop, name: str) -> None:
    await open_version(shop, name, "v1")
    await open_version(shop, name, "v2")
    for build in ("v1", "v2"):
        await promote(shop, name, build)
    before = await versions(shop.client, name)
    assert await promote(shop, name, "v2") == [f"{name}:v2 is the current version"]
    assert await versions(shop.client, name) == before
    order = await parked(shop)
    said = await promote(shop, name, "v1")
    assert f"{name}:v1 takes over from {name}:v2" in said
    assert (await states(shop, name))["v1"] == "current"
    await order.approve()
    assert await order.ends() is Step.SHIPPED
    assert await workers_of(order) == ["v2", "v1"]


async def test_where_there_never_was_a_version_workers_without_one_are_current(shop: Shop, name: str) -> None:
    await shop.open()
    assert (await promote(shop, name, None))[-1] == f"{name} unversioned is the current version"
    assert f"{name} unversioned takes over" not in " ".join(await promote(shop, name, None))


async def test_from_workers_without_a_version_and_back(shop: Shop, name: str) -> None:
    await shop.open()
    first = await parked(shop)
    await open_version(shop, name, "v1")
    await promote(shop, name, "v1")
    second = await parked(shop)
    await first.approve()
    assert await first.ends() is Step.SHIPPED
    assert await workers_of(first) == ["", "v1"]
    # The way back, with the old workers gone as after the rollout.
    await shop.close()
    await shop.open()
    assert (await promote(shop, name, None))[-1] == f"{name} unversioned is the current version"
    await second.approve()
    assert await second.ends() is Step.SHIPPED
    assert await workers_of(second) == ["v1", ""]
    assert "current" not in (await states(shop, name)).values()


async def test_it_waits_for_both_queues(shop: Shop, name: str) -> None:
    with pytest.raises(NotPromoted, match=f"no worker of {name}:v1 polls {shop.settings.order_task_queue}"):
        await promote(shop, name, "v1", timeout=1.5)
    orders, shipments = shop.parts()
    versioned = {"temporal_deployment_name": name, "temporal_worker_build_id": "v1"}
    await shop.open(parts=[orders], **versioned)
    with pytest.raises(NotPromoted, match=f"polls {shop.settings.shipping_task_queue} for workflow tasks"):
        await promote(shop, name, "v1", timeout=5)
    assert await states(shop, name) == {"v1": "inactive"}
    await shop.open(parts=[shipments], **versioned)
    await promote(shop, name, "v1")
    assert await states(shop, name) == {"v1": "current"}


async def test_a_change_by_somebody_else_is_seen(shop: Shop, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the look and the change another version is promoted: nothing is overwritten that was not looked at."""
    for build in ("v1", "v2"):
        await open_version(shop, name, build)
    await promote(shop, name, "v1")
    describe, looks = deployment._describe, []

    async def interrupted(client: Client, of: str) -> Any:
        found = await describe(client, of)
        looks.append(found.worker_deployment_info.routing_config.current_deployment_version.build_id)
        if len(looks) == 1:
            request = deployment.SetWorkerDeploymentCurrentVersionRequest(
                namespace=client.namespace, deployment_name=of, build_id=""
            )
            await client.workflow_service.set_worker_deployment_current_version(request)
        return found

    monkeypatch.setattr(deployment, "_describe", interrupted)
    said = await promote(shop, name, "v2")
    assert looks[:2] == ["v1", ""]
    assert f"{name}:v2 takes over from {name} unversioned" in said
    assert f"{name}:v2 takes over from {name}:v1" not in said
    assert (await states(shop, name))["v2"] == "current"


async def test_the_reconcile_schedule_runs_on_the_current_version(shop: Shop, name: str) -> None:
    await open_version(shop, name, "v1")
    await promote(shop, name, "v1")
    request = ReconcileRequest(apply=False)
    try:
        await keep_schedule(shop.client, shop.settings.order_task_queue, timedelta(hours=1), request)
        handle = shop.client.get_schedule_handle("trellis-reconcile")
        await handle.trigger()

        async def begun() -> Any:
            return (await handle.describe()).info.recent_actions

        action = (await until(begun, "the schedule's first run"))[0].action
        assert isinstance(action, ScheduleActionExecutionStartWorkflow)
        run = shop.client.get_workflow_handle_for(ReconcileWorkflow.run, action.workflow_id)
        assert isinstance(await run.result(), ReconcileReport)
    finally:
        await drop_schedule(shop.client)


# --- the commands


async def test_the_commands_go_by_the_variables_of_the_worker_controller(shop: Shop, name: str, tmp_path: Path) -> None:
    settings = shop.settings.model_copy(update={"temporal_deployment_name": name, "temporal_worker_build_id": "v1"})
    settings.model_fields_set.update({"temporal_deployment_name", "temporal_worker_build_id"})
    env = environment(settings)
    assert env["TEMPORAL_DEPLOYMENT_NAME"] == name
    async with (
        started(tmp_path / "default", env, "app", "worker", "default"),
        started(tmp_path / "shipping", env, "app", "worker", "shipping"),
        started(tmp_path / "promote", env, "app", "deployment", "promote", "--timeout", "60") as promoting,
    ):
        assert await promoting.running.wait() == 0, promoting.log.read_text()
        assert f"{name}:v1 is the current version" in promoting.log.read_text()
        order = await shop.approved()
        assert await order.ends() is Step.SHIPPED
        assert await workers_of(order) == await workers_of(order, shipment=True) == ["v1"]
        async with started(tmp_path / "show", env, "app", "deployment", "show", "--json") as showing:
            assert await showing.running.wait() == 0
        (shown,) = json.loads(showing.log.read_text())
        assert (shown["build_id"], shown["state"]) == ("v1", "current")


def test_what_is_missing_is_asked_for(
    shop: Shop, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRELLIS_TEMPORAL_ADDRESS", shop.settings.temporal_address)
    for arguments, code, said in (
        (["promote"], 2, "TEMPORAL_WORKER_BUILD_ID"),
        (["promote", "--build-id", "v1"], 2, "TEMPORAL_DEPLOYMENT_NAME"),
        (["promote", "--build-id", "v1", "--unversioned"], 2, "exclude each other"),
        (["show"], 2, "TEMPORAL_DEPLOYMENT_NAME"),
        (["show", "--name", "nobody-has-this"], 1, "no Worker Deployment found"),
        (["promote", "--name", "a.b", "--build-id", "v1", "--timeout", "6"], 4, "no worker of a.b:v1"),
    ):
        monkeypatch.setattr(sys, "argv", ["trellis", "deployment", *arguments])
        ended, told = run_command(), capsys.readouterr().err
        assert (ended, said in told) == (code, True), told


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"NAME": "trellis"}, "TEMPORAL_WORKER_BUILD_ID is not set"),
        ({"BUILD": "v1"}, "TEMPORAL_DEPLOYMENT_NAME is not set"),
        # Temporal takes no poll from such a deployment, and says so nowhere but in its answer to that.
        ({"NAME": "a.b", "BUILD": "v1"}, "TEMPORAL_DEPLOYMENT_NAME: "),
    ],
)
def test_half_a_version_is_refused(given: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    variables = {"NAME": "TEMPORAL_DEPLOYMENT_NAME", "BUILD": "TEMPORAL_WORKER_BUILD_ID"}
    for short, value in given.items():
        monkeypatch.setenv(variables[short], value)
    with pytest.raises(SettingsError, match=said):
        load()
