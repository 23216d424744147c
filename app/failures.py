"""Reading what Temporal tells a workflow of a failed activity: the name of the error's class, and its message."""

from __future__ import annotations

from temporalio.exceptions import ActivityError, ApplicationError, FailureError


def failed_with(error: ActivityError, *kinds: type[Exception]) -> bool:
    """Whether the activity failed with one of these."""
    cause = error.cause
    return isinstance(cause, ApplicationError) and cause.type in {kind.__name__ for kind in kinds}


def message(error: ActivityError) -> str:
    """What the error said, without Temporal's wrapping."""
    return error.cause.message if isinstance(error.cause, FailureError) else str(error.cause or error)
