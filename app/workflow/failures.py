"""Reading what Temporal tells a workflow of a failed activity: the name of the error's class, and its message."""

from __future__ import annotations

from temporalio.exceptions import ActivityError, ApplicationError, FailureError


def failure(error: FailureError) -> BaseException:
    """What the attempt ended with. A regular activity's comes wrapped, a local one's sometimes not."""
    return (error.cause or error) if isinstance(error, ActivityError) else error


def failed_with(error: FailureError, *kinds: type[Exception]) -> bool:
    """Whether the activity failed with one of these."""
    ended_with = failure(error)
    return isinstance(ended_with, ApplicationError) and ended_with.type in {kind.__name__ for kind in kinds}


def message(error: FailureError) -> str:
    """What the error said, without Temporal's wrapping."""
    ended_with = failure(error)
    return ended_with.message if isinstance(ended_with, FailureError) else str(ended_with)
