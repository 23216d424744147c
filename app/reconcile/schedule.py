"""The Temporal schedule that runs `ReconcileWorkflow`. There is none until somebody asks for it."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

from temporalio.client import (
    Schedule,
    ScheduleActionStartWorkflow,
    ScheduleAlreadyRunningError,
    ScheduleIntervalSpec,
    ScheduleOverlapPolicy,
    SchedulePolicy,
    ScheduleSpec,
    ScheduleUpdate,
    ScheduleUpdateInput,
)
from temporalio.service import RPCError, RPCStatusCode

from app.reconcile.models import RECONCILE_ID, ReconcileRequest
from app.reconcile.workflows import ReconcileWorkflow

if TYPE_CHECKING:
    from temporalio.client import Client


async def keep_schedule(temporal: Client, task_queue: str, every: timedelta, request: ReconcileRequest) -> None:
    """Create the schedule, or make the one that is there like this. Repeating it is harmless."""
    schedule = Schedule(
        action=ScheduleActionStartWorkflow(ReconcileWorkflow.run, request, id=RECONCILE_ID, task_queue=task_queue),
        spec=ScheduleSpec(intervals=[ScheduleIntervalSpec(every=every)]),
        # A pass that takes longer than the interval is not overtaken by the next one.
        policy=SchedulePolicy(overlap=ScheduleOverlapPolicy.SKIP),
    )
    try:
        await temporal.create_schedule(RECONCILE_ID, schedule)
    except ScheduleAlreadyRunningError:
        await temporal.get_schedule_handle(RECONCILE_ID).update(lambda _: _replaced(_, schedule))


async def drop_schedule(temporal: Client) -> None:
    """Remove the schedule, if there is one."""
    try:
        await temporal.get_schedule_handle(RECONCILE_ID).delete()
    except RPCError as error:
        if error.status is not RPCStatusCode.NOT_FOUND:
            raise


def _replaced(_: ScheduleUpdateInput, schedule: Schedule) -> ScheduleUpdate:
    return ScheduleUpdate(schedule=schedule)
