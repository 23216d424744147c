"""What tests share besides fixtures: running the product's parts, and waiting for an order."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
import uvicorn
from temporalio.api.common.v1 import WorkflowExecution
from temporalio.api.enums.v1 import EventType
from temporalio.api.history.v1 import HistoryEvent
from temporalio.api.workflowservice.v1 import ResetWorkflowExecutionRequest
from temporalio.client import Client, WorkflowHandle

from app import workers
from app.services import Services
from app.workers import order_worker, shipping_worker
from app.workflow import execution


@asynccontextmanager
async def running_workers(services: Services) -> AsyncIterator[None]:
    """Both workers, while the block runs."""
    stop = asyncio.Event()
    running = asyncio.create_task(workers.run(services, [order_worker(services), shipping_worker(services)], stop))
    try:
        yield
    finally:
        stop.set()
        await running


@asynccontextmanager
async def serving(app: object, **more: Any) -> AsyncIterator[str]:
    """An ASGI application on a free loopback port; yields its URL. `more` goes to uvicorn."""
    options: dict[str, Any] = {"log_config": None, "access_log": False, "timeout_graceful_shutdown": 1, **more}
    server = uvicorn.Server(uvicorn.Config(app, port=0, **options))  # type: ignore[arg-type]
    server.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
    running = asyncio.create_task(server.serve())
    try:
        while not server.started:
            if running.done():
                await running
            await asyncio.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        await running


async def until(holds: Callable[[], Awaitable[Any]], what: str | Callable[[], str], timeout: float = 30.0) -> Any:
    """Ask again until the answer is truthy, and return it; fails with `what` when it never is."""
    answer, pause = None, 0.01
    try:
        async with asyncio.timeout(timeout):
            while not (answer := await holds()):
                await asyncio.sleep(pause)
                # Soon at first; but a hundred who ask all the time would slow down what they wait for.
                pause = min(pause * 1.5, 0.1)
    except TimeoutError:
        told = what if isinstance(what, str) else what()
        pytest.fail(f"waited {timeout} s for {told}; the last answer was {answer!r}")
    return answer


async def until_step(client: httpx.AsyncClient, order_id: str, *steps: str, timeout: float = 20.0) -> str:
    """Wait until the order is at one of `steps`; fails with where it was instead."""
    step = "nowhere"

    async def reached() -> str | None:
        nonlocal step
        answer = await client.get(f"/orders/{order_id}/status")
        step = answer.json().get("step", answer.text)
        return step if step in steps else None

    wanted = " or ".join(steps)
    found: str = await until(reached, lambda: f"{order_id} to be {wanted}, and it is {step}", timeout)
    return found


async def reset(client: Client, workflow: WorkflowHandle[Any, Any], number: int) -> None:
    """Reset a workflow as `temporal workflow reset --event-id` does, to the point of this number or to its last one;
    -1 is the last, too."""
    points = [
        event.event_id
        async for event in workflow.fetch_history_events()
        if event.event_type == EventType.EVENT_TYPE_WORKFLOW_TASK_COMPLETED
    ]
    await client.workflow_service.reset_workflow_execution(
        ResetWorkflowExecutionRequest(
            namespace=client.namespace,
            workflow_execution=WorkflowExecution(workflow_id=workflow.id),
            reason="as an operator would",
            workflow_task_finish_event_id=points[min(number, len(points) - 1)],
            request_id=str(uuid.uuid4()),
        )
    )


def activities_of(history: Iterable[HistoryEvent]) -> list[str]:
    """The activities that a workflow carried out, in order: each once, wherever its attempts ran."""
    found = []
    for event in history:
        marker = event.marker_recorded_event_attributes
        if marker.marker_name == "core_local_activity":
            found.append(json.loads(marker.details["data"].payloads[0].data)["activity_type"])
        elif event.event_type == EventType.EVENT_TYPE_ACTIVITY_TASK_SCHEDULED:
            scheduled = event.activity_task_scheduled_event_attributes
            if execution.handed_over(scheduled.activity_id)[1] is None:
                found.append(scheduled.activity_type.name)
    return found
