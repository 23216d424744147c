"""Workers: built from a feature's part, started when their servers are there, stopped without breaking an attempt."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import structlog
from temporalio.service import RPCError
from temporalio.worker import Worker

from app.db.pool import wait_until_migrated
from app.db.timeline import AttemptLog
from app.telemetry import metrics, probes
from app.telemetry.supervision import pauses
from app.temporal import identity, runner, versions
from app.temporal.client import connect, is_unavailable, wait_until_serving
from app.temporal.interceptors import AttemptInterceptor

if TYPE_CHECKING:
    from temporalio.client import Client

    from app.services import Services

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class WorkerPart:
    """What a feature contributes: its workflows and activities, and the task queue they are served on."""

    task_queue: str
    workflows: Sequence[type]
    activities: Sequence[Callable[..., Any]]


def build(client: Client, services: Services, part: WorkerPart) -> Worker:
    """A worker that is not running yet."""
    settings = services.settings
    metrics.expect_activities([function.__name__ for function in part.activities], part.task_queue)
    return Worker(
        client,
        task_queue=part.task_queue,
        workflows=part.workflows,
        activities=part.activities,
        interceptors=[AttemptInterceptor(AttemptLog(services.pool))],
        max_concurrent_activities=settings.max_concurrent_activities,
        max_concurrent_local_activities=settings.max_concurrent_activities,
        max_concurrent_workflow_tasks=settings.max_concurrent_workflow_tasks,
        max_cached_workflows=settings.max_cached_workflows,
        workflow_runner=runner.runner(strict=settings.strict_sandbox),
        deployment_config=versions.worker_config(settings),
        # A task for a worker that is gone goes to the others after this. With the default, 10 s, an update that meets
        # a stopping worker would not be answered within `update_timeout`.
        sticky_queue_schedule_to_start_timeout=timedelta(seconds=5),
        # The default, 0, cancels running activities: an attempt lost for every restart.
        graceful_shutdown_timeout=timedelta(seconds=settings.graceful_shutdown_timeout),
    )


async def run(
    services: Services,
    parts: Sequence[WorkerPart],
    stop: asyncio.Event,
    meanwhile: Callable[[], Awaitable[None]],
) -> None:
    """Wait for PostgreSQL and Temporal, then serve `parts` until `stop` is set and running attempts are done.

    Args:
        meanwhile: runs beside the workers, and is cancelled when they stop.

    Raises:
        Exception: a worker failed for good, such as on a namespace that was deleted.
    """
    stopping = asyncio.create_task(stop.wait())
    try:
        for pause in pauses():
            services.readiness.require("workers", _not_started)
            if not await _servers_are_there(services, stopping):
                return
            try:
                await _serve(services, parts, stopping, meanwhile)
            except (RPCError, RuntimeError) as error:
                if not is_unavailable(error):
                    raise
                # A worker asks for its namespace when it starts, once. Afterwards it waits by itself.
                log.warning("Temporal was lost while the workers started", error=str(error), retry_in_seconds=pause)
            else:
                return
            await asyncio.wait({stopping}, timeout=pause)
    finally:
        stopping.cancel()


async def _servers_are_there(services: Services, stopping: asyncio.Task[Any]) -> bool:
    """Wait for them; False if it is to stop before."""
    ready = asyncio.create_task(_wait_for_servers(services))
    await asyncio.wait({ready, stopping}, return_when=asyncio.FIRST_COMPLETED)
    if not ready.done():
        ready.cancel()
        return False
    await ready
    return not stopping.done()


async def _serve(
    services: Services,
    parts: Sequence[WorkerPart],
    stopping: asyncio.Task[Any],
    meanwhile: Callable[[], Awaitable[None]],
) -> None:
    client = await connect(services.settings, lazy=False)
    workers = [build(client, services, part) for part in parts]
    running = [asyncio.create_task(worker.run()) for worker in workers]
    services.readiness.forget("workers")
    for worker in workers:
        versions.require_polling(services.readiness, worker)
    besides = asyncio.ensure_future(meanwhile())
    queues = [part.task_queue for part in parts]
    log.info("workers started", task_queues=queues)
    await asyncio.wait({stopping, *running}, return_when=asyncio.FIRST_COMPLETED)
    log.info("workers stopping", task_queues=queues)
    await asyncio.gather(*(worker.shutdown() for worker in workers))
    besides.cancel()
    await asyncio.gather(*running)
    log.info("workers stopped", task_queues=queues)


async def _not_started() -> None:
    raise probes.NotReady("waiting for PostgreSQL, its migration, or Temporal")


async def _wait_for_servers(services: Services) -> None:
    await asyncio.gather(wait_until_migrated(services.pool), wait_until_serving(services.temporal))
    await identity.wait_until_ours(identity.Identity(services.pool, services.temporal))
