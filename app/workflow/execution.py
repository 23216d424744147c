"""Steps that only write to the database: tried once where the workflow runs, handed to the task queue when that fails.

A local activity costs Temporal one event; a regular one costs six, a workflow task among them, and two more rounds to
the server. Nearly every such step succeeds at once, so it is the first attempt that is worth making cheap. What fails
for a reason that may pass becomes a regular activity, where Temporal shows every further attempt, with its error and
the time of the next.

A workflow takes no signal while a local activity runs. So nothing that calls a partner goes this way, where a
cancellation counts in the middle of it; nor what ends an order, as a signal or an update that arrives meanwhile would
undo the workflow task. docs/decisions/0040-local-first.md has the measurements.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Final, TypeVar

from temporalio import workflow
from temporalio.exceptions import ApplicationError, FailureError

from app.workflow import policies
from app.workflow.failures import failure

Argument = TypeVar("Argument")

#: Between an activity's name and the error that its local attempt ended with, in the id of the regular activity.
_HANDED_OVER: Final = "~"


async def write(step: Callable[[Any, Argument], Awaitable[None]], argument: Argument, *, local: bool) -> None:
    """Carry out a step. At most once in a workflow for each activity: its name is its id.

    Args:
        local: whether to try it here first. It travels in the workflow's input, so that every replay does the same.

    Raises:
        FailureError: no repeat can mend what it failed with.
    """
    if not local:
        await workflow.execute_activity_method(step, argument, **policies.DATABASE)
        return
    name = step.__name__
    try:
        await workflow.execute_local_activity_method(step, argument, activity_id=name, **policies.LOCAL)
    except FailureError as error:
        ended_with = failure(error)
        if isinstance(ended_with, ApplicationError) and ended_with.non_retryable:
            raise
        error_type = (ended_with.type if isinstance(ended_with, ApplicationError) else None) or "TimedOut"
    else:
        return
    await workflow.execute_activity_method(
        step, argument, activity_id=f"{name}{_HANDED_OVER}{error_type}", **policies.DATABASE
    )


def handed_over(activity_id: str) -> tuple[str, str | None]:
    """The id that the local attempt had, and the type of the error it ended with; None if there was no such attempt."""
    name, _, error_type = activity_id.partition(_HANDED_OVER)
    return name, error_type or None
