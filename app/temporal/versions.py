"""The version of the workers: which one this process is, which ones Temporal knows, and which gets the orders.

Without a version none of this matters: workers are unversioned, and any of them takes any task
(docs/decisions/0030-worker-versioning.md).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING, Final

from temporalio.api.enums.v1 import (
    RoutingConfigUpdateState,
    TaskQueueType,
    WorkerDeploymentVersionStatus,
    WorkerVersioningMode,
)
from temporalio.api.taskqueue.v1 import PollerInfo, TaskQueue
from temporalio.api.workflowservice.v1 import (
    DescribeTaskQueueRequest,
    DescribeWorkerDeploymentRequest,
    DescribeWorkerDeploymentResponse,
    SetWorkerDeploymentCurrentVersionRequest,
)
from temporalio.common import VersioningBehavior, WorkerDeploymentVersion
from temporalio.service import RPCError, RPCStatusCode
from temporalio.worker import WorkerDeploymentConfig

from app.errors import ServiceUnavailable
from app.telemetry.probes import NotReady
from app.temporal.client import is_unavailable

if TYPE_CHECKING:
    from temporalio.client import Client
    from temporalio.worker import Worker

    from app.settings import Settings
    from app.telemetry.probes import Readiness

#: What a worker polls for.
KINDS: Final = {
    TaskQueueType.TASK_QUEUE_TYPE_WORKFLOW: "workflow tasks",
    TaskQueueType.TASK_QUEUE_TYPE_ACTIVITY: "activity tasks",
}

#: Seconds within which a poller that lives has polled again: a poll is answered after a minute at the latest.
_POLL_SECONDS: Final = 75.0
_RPC_TIMEOUT: Final = timedelta(seconds=5)
#: A probe is answered within seconds.
_PROBE_TIMEOUT: Final = timedelta(seconds=2)
#: Seconds between two looks while a version comes up.
_PAUSE: Final = 1.0

#: Answers that a moment may change: the namespace is still being made, or the workers have not polled yet
#: (NOT_FOUND); somebody else changed the deployment between our look and our change, or the version does not have
#: all the queues of the one before yet (FAILED_PRECONDITION).
_NOT_YET: Final = frozenset({RPCStatusCode.NOT_FOUND, RPCStatusCode.FAILED_PRECONDITION})

_BEHAVIORS: Final = {"auto_upgrade": VersioningBehavior.AUTO_UPGRADE, "pinned": VersioningBehavior.PINNED}


class NotPromoted(ServiceUnavailable):
    """The version was not promoted"""


def worker_config(settings: Settings) -> WorkerDeploymentConfig | None:
    """What makes a worker one of its version; None for an unversioned one."""
    name, build = settings.temporal_deployment_name, settings.temporal_worker_build_id
    if name is None or build is None:
        return None
    return WorkerDeploymentConfig(
        version=WorkerDeploymentVersion(deployment_name=name, build_id=build),
        use_worker_versioning=True,
        default_versioning_behavior=_BEHAVIORS[settings.versioning_behavior],
    )


async def pollers(
    client: Client, task_queue: str, kind: TaskQueueType.ValueType, *, timeout: timedelta = _RPC_TIMEOUT
) -> list[PollerInfo]:
    """Who polls a task queue for this kind of tasks, of whatever version."""
    request = DescribeTaskQueueRequest(
        namespace=client.namespace, task_queue=TaskQueue(name=task_queue), task_queue_type=kind
    )
    found = await client.workflow_service.describe_task_queue(request, retry=False, timeout=timeout)
    since = time.time() - _POLL_SECONDS
    return [poller for poller in found.pollers if poller.last_access_time.seconds > since]


# --- choosing the current version


@dataclass(frozen=True)
class Promotion:
    """A version that is to be the current one: it gets new orders, and those on their way that are not pinned."""

    deployment: str
    #: None for the unversioned workers, which is the way back.
    build: str | None
    task_queues: Sequence[str]

    async def carry_out(self, client: Client, *, timeout: float, say: Callable[[str], None]) -> None:
        """Wait until the version's workers poll every queue, then make it the current one. Repeating it is harmless.

        Raises:
            NotPromoted: it could not be done in time; with the last reason.
            RPCError, RuntimeError: Temporal refuses for good.
        """
        told = ""
        try:
            async with asyncio.timeout(timeout):
                while reason := await self._look(client, say):
                    if reason != told:
                        say(f"waiting: {reason}")
                    told = reason
                    await asyncio.sleep(_PAUSE)
        except TimeoutError:
            raise NotPromoted(f"{self.name}, in {timeout:g} s: {told or 'Temporal did not answer'}") from None
        say(f"{self.name} is the current version")

    async def _found(self, client: Client) -> DescribeWorkerDeploymentResponse | None:
        """The deployment; None if there never was one and none is wanted."""
        try:
            return await _describe(client, self.deployment)
        except RPCError as error:
            if error.status is RPCStatusCode.NOT_FOUND and self.build is None:
                return None
            raise

    @property
    def name(self) -> str:
        """The version, for people."""
        return _name(self.deployment, self.build or "")

    async def _look(self, client: Client, say: Callable[[str], None]) -> str:
        """Why it is to be looked at again; nothing once the version is current and all queues know."""
        try:
            for queue in self.task_queues:
                for kind, tasks in KINDS.items():
                    if not any(map(self._is_one_of_it, await pollers(client, queue, kind))):
                        return f"no worker of {self.name} polls {queue} for {tasks}"
            found = await self._found(client)
            if found is None:
                return ""
            routing = found.worker_deployment_info.routing_config
            if routing.current_deployment_version.build_id != (self.build or ""):
                await self._make_current(client, found.conflict_token)
                say(
                    f"{self.name} takes over from {_name(self.deployment, routing.current_deployment_version.build_id)}"
                )
                return "Temporal tells its task queues"
        except (RPCError, RuntimeError) as error:
            if is_unavailable(error) or (isinstance(error, RPCError) and error.status in _NOT_YET):
                return str(error)
            raise
        telling = RoutingConfigUpdateState.ROUTING_CONFIG_UPDATE_STATE_IN_PROGRESS
        return "Temporal tells its task queues" if _state(found) == telling else ""

    def _is_one_of_it(self, poller: PollerInfo) -> bool:
        options = poller.deployment_options
        if options.worker_versioning_mode != WorkerVersioningMode.WORKER_VERSIONING_MODE_VERSIONED:
            return self.build is None
        return (options.deployment_name, options.build_id) == (self.deployment, self.build)

    async def _make_current(self, client: Client, conflict_token: bytes) -> None:
        request = SetWorkerDeploymentCurrentVersionRequest(
            namespace=client.namespace,
            deployment_name=self.deployment,
            build_id=self.build or "",
            # Refused when somebody else changed something since our look: then we look again.
            conflict_token=conflict_token,
            identity=client.identity,
        )
        await client.workflow_service.set_worker_deployment_current_version(request, timeout=_RPC_TIMEOUT)


async def _describe(client: Client, deployment: str) -> DescribeWorkerDeploymentResponse:
    request = DescribeWorkerDeploymentRequest(namespace=client.namespace, deployment_name=deployment)
    return await client.workflow_service.describe_worker_deployment(request, timeout=_RPC_TIMEOUT)


def _state(found: DescribeWorkerDeploymentResponse) -> RoutingConfigUpdateState.ValueType:
    return found.worker_deployment_info.routing_config_update_state


def _name(deployment: str, build: str) -> str:
    return f"{deployment}:{build}" if build else f"{deployment} unversioned"


# --- looking


@dataclass(frozen=True)
class Version:
    """One version that Temporal knows."""

    build: str
    #: `current`, `ramping`, `draining` (orders are still pinned to it), `drained`, or `inactive` (never was current).
    state: str
    created: datetime
    since: datetime | None

    def as_dict(self) -> dict[str, str | None]:
        """For JSON."""
        since = self.since.isoformat() if self.since else None
        return {"build_id": self.build, "state": self.state, "since": since, "created": self.created.isoformat()}


async def versions(client: Client, deployment: str) -> list[Version]:
    """The versions of a deployment, newest first.

    Raises:
        RPCError: there is no such deployment, or Temporal does not answer.
    """
    info = (await _describe(client, deployment)).worker_deployment_info
    found = [
        Version(
            build=summary.deployment_version.build_id,
            state=_status(summary.status),
            created=summary.create_time.ToDatetime(UTC),
            since=summary.routing_update_time.ToDatetime(UTC) if summary.HasField("routing_update_time") else None,
        )
        for summary in info.version_summaries
    ]
    return sorted(found, key=lambda version: version.created, reverse=True)


def _status(status: WorkerDeploymentVersionStatus.ValueType) -> str:
    return WorkerDeploymentVersionStatus.Name(status).removeprefix("WORKER_DEPLOYMENT_VERSION_STATUS_").lower()


def require_polling(readiness: Readiness, worker: Worker) -> None:
    """Ask whether Temporal sees this process polling for both kinds of tasks: that takes a worker which runs, a
    connection which works, and a server which knows both."""
    for kind, name in KINDS.items():
        readiness.require(f"{name} on {worker.task_queue}", partial(_check_polling, worker, kind))


async def _check_polling(worker: Worker, kind: TaskQueueType.ValueType) -> None:
    if not worker.is_running:
        raise NotReady("the worker is not running")
    polling = await pollers(worker.client, worker.task_queue, kind, timeout=_PROBE_TIMEOUT)
    if not any(poller.identity == worker.client.identity for poller in polling):
        raise NotReady("Temporal sees no poller of this process")
