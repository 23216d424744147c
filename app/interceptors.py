"""What happens around every activity attempt: errors translated once, failures and repeats told while they last,
one canonical log line."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import structlog
from temporalio import activity
from temporalio.exceptions import ApplicationError
from temporalio.worker import (
    ActivityInboundInterceptor,
    ExecuteActivityInput,
    Interceptor,
)

from app.db import UNAVAILABLE
from app.errors import TrellisError
from app.events import Attempt, AttemptLog

log = structlog.get_logger("trellis.attempt")


class AttemptInterceptor(Interceptor):
    """Put around the activities of a worker."""

    def __init__(self, attempts: AttemptLog) -> None:
        self._attempts = attempts

    def intercept_activity(self, next: ActivityInboundInterceptor) -> ActivityInboundInterceptor:  # noqa: A002 - the SDK's name
        return _AroundAttempt(next, self._attempts)


class _AroundAttempt(ActivityInboundInterceptor):
    def __init__(self, inner: ActivityInboundInterceptor, attempts: AttemptLog) -> None:
        super().__init__(inner)
        self._attempts = attempts

    async def execute_activity(self, input: ExecuteActivityInput) -> Any:  # noqa: A002 - the SDK's name
        attempt = _attempt(input)
        began = time.monotonic()
        if attempt.number > 1:
            await self._tell(self._attempts.retried(attempt))
        try:
            result = await self.next.execute_activity(input)
        except asyncio.CancelledError:
            _log(attempt, "cancelled", began)
            raise
        except Exception as error:
            failure = translate(error)
            if not isinstance(error, (TrellisError, ApplicationError, *UNAVAILABLE)):
                log.exception("unexpected error", activity=attempt.activity)
            retryable = not failure.non_retryable
            await self._tell(self._attempts.failed(attempt, failure.type or "", failure.message, retryable=retryable))
            _log(attempt, "retry" if retryable else "failure", began, failure)
            raise failure from error
        if attempt.number > 1:
            await self._tell(self._attempts.recovered(attempt))
        _log(attempt, "success", began)
        return result

    async def _tell(self, telling: Any) -> None:
        """The timeline is told if it can be; the attempt's own outcome stands either way."""
        try:
            await telling
        except UNAVAILABLE as error:
            log.warning("the timeline could not be told", error=type(error).__name__)


def translate(error: Exception) -> ApplicationError:
    """The error as Temporal sees it: the type is the class name, retryability is the class's.

    Messages of errors that are not ours can quote data (a row, a payload): only those of a lost connection are kept.
    """
    if isinstance(error, ApplicationError):
        return error
    name = type(error).__name__
    if isinstance(error, TrellisError):
        return ApplicationError(str(error), type=name, non_retryable=not error.retryable)
    if isinstance(error, UNAVAILABLE):
        return ApplicationError(f"PostgreSQL did not answer: {name}", type="DatabaseUnavailable")
    return ApplicationError(f"unexpected {name}", type=name)


def _attempt(input: ExecuteActivityInput) -> Attempt:  # noqa: A002 - the SDK's name
    info = activity.info()
    return Attempt(
        order_id=getattr(input.args[0], "order_id", "") if input.args else "",
        activity=info.activity_type,
        activity_id=info.activity_id,
        run_id=info.workflow_run_id or "",
        number=info.attempt,
    )


def _log(attempt: Attempt, outcome: str, began: float, failure: ApplicationError | None = None) -> None:
    info = activity.info()
    level = log.info if failure is None else log.warning
    level(
        "attempt",
        activity=attempt.activity,
        attempt=attempt.number,
        outcome=outcome,
        order_id=attempt.order_id,
        workflow_id=info.workflow_id,
        run_id=attempt.run_id,
        task_queue=info.task_queue,
        duration_seconds=round(time.monotonic() - began, 4),
        **({"error_type": failure.type, "error": failure.message} if failure else {}),
    )
