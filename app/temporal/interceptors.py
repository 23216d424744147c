"""What happens around every activity attempt and every signal: errors translated once, failures and repeats told
while they last, one canonical log line, the metrics, and the order on every span."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import Any, Final, Self

import structlog
from opentelemetry import trace
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from pydantic import BaseModel
from temporalio import activity, workflow
from temporalio.converter import PayloadConverter
from temporalio.exceptions import ApplicationError
from temporalio.worker import (
    ActivityInboundInterceptor,
    ExecuteActivityInput,
    HandleSignalInput,
    HandleUpdateInput,
    Interceptor,
    WorkflowInboundInterceptor,
    WorkflowInterceptorClassInput,
)

from app.db.pool import UNAVAILABLE, is_unavailable, patience
from app.db.timeline import Attempt, AttemptLog
from app.errors import CarrierUnavailable, TimedOut, TrellisError
from app.telemetry import metrics, traces
from app.workflow import execution, policies
from app.workflow.signals import COUNT

log = structlog.get_logger("trellis.attempt")

#: The header under which the SDK's OpenTelemetry plugin sends the trace along.
_TRACE_HEADER: Final = "_tracer-data"


class AttemptInterceptor(Interceptor):
    """Put around the activities and the workflows of a worker."""

    def __init__(self, attempts: AttemptLog) -> None:
        self._attempts = attempts

    def intercept_activity(self, next: ActivityInboundInterceptor) -> ActivityInboundInterceptor:  # noqa: A002 - the SDK's name
        return _AroundAttempt(next, self._attempts)

    def workflow_interceptor_class(self, input: WorkflowInterceptorClassInput) -> type[WorkflowInboundInterceptor]:  # noqa: A002
        # The one door out of the workflow's sandbox: what goes through is a count.
        input.unsafe_extern_functions[COUNT] = metrics.signalled
        return _LinkToOrder


class _AroundAttempt(ActivityInboundInterceptor):
    def __init__(self, inner: ActivityInboundInterceptor, attempts: AttemptLog) -> None:
        super().__init__(inner)
        self._attempts = attempts

    async def execute_activity(self, input: ExecuteActivityInput) -> Any:  # noqa: A002 - the SDK's name
        attempt, info = _attempt(input), activity.info()
        with (
            structlog.contextvars.bound_contextvars(
                order_id=attempt.order_id,
                workflow_id=info.workflow_id,
                run_id=attempt.run_id,
                task_queue=info.task_queue,
                activity=attempt.activity,
                attempt=attempt.number,
            ),
            traces.attributes(order_id=attempt.order_id, temporal_activity_attempt=attempt.number),
        ):
            limits = policies.limits(info.start_to_close_timeout)
            with patience(limits.work):
                return await self._execute(attempt, input, _Ends.of(limits))

    async def _execute(self, attempt: Attempt, input: ExecuteActivityInput, ends: _Ends) -> Any:  # noqa: A002 - the SDK's name
        began = time.monotonic()
        try:
            result = await self._work(attempt, input, ends)
        except asyncio.CancelledError:
            stopped = activity.is_worker_shutdown()
            outcome, error_type = ("retry", "WorkerStopped") if stopped else ("failure", "Cancelled")
            _end(outcome, began, error_type, silences=_silences())
            raise
        except Exception as error:
            silences = _silences() + isinstance(error, CarrierUnavailable)
            failure = _given_up(input, silences, translate(error))
            if not isinstance(error, (TrellisError, ApplicationError)) and not is_unavailable(error):
                log.exception("unexpected error")
            retryable = not failure.non_retryable
            telling = self._attempts.failed(attempt, failure.type or "", failure.message, retryable=retryable)
            await self._tell(telling, ends)
            outcome = "retry" if retryable and _may_be_repeated() else "failure"
            _end(outcome, began, failure.type or "", _loggable(failure.message, input), silences)
            raise failure from error
        if attempt.number > 1:
            await self._tell(self._attempts.recovered(attempt), ends)
        _end("success", began)
        return result

    async def _work(self, attempt: Attempt, input: ExecuteActivityInput, ends: _Ends) -> Any:  # noqa: A002 - the SDK's name
        limit = asyncio.timeout_at(ends.work)
        try:
            async with limit:
                if attempt.number > 1:
                    info = activity.info()
                    metrics.attempt_repeated(attempt.activity, info.task_queue, _error_before(info))
                    await self._tell(self._attempts.retried(attempt), ends)
                return await self.next.execute_activity(input)
        except TimeoutError as error:
            if limit.expired():
                raise TimedOut from error
            raise

    async def _tell(self, telling: Any, ends: _Ends) -> None:
        """The timeline is told if it can be; the attempt's own outcome stands either way."""
        try:
            async with asyncio.timeout_at(ends.whole):
                await telling
        except UNAVAILABLE as error:
            log.warning("the timeline could not be told", error_type=type(error.__cause__ or error).__name__)


@dataclass(frozen=True)
class _Ends:
    """When an attempt's work ends, and when all of it does, by the clock of the event loop; None: never."""

    work: float | None
    whole: float | None

    @classmethod
    def of(cls, limits: policies.Limits) -> Self:
        now = asyncio.get_running_loop().time()
        return cls(*(None if limit is None else now + limit for limit in (limits.work, limits.whole)))


def translate(error: Exception) -> ApplicationError:
    """The error as Temporal sees it: the type is the class name, retryability is the class's.

    Messages of errors that are not ours can quote data (a row, a payload): only those of a lost connection are kept.
    """
    if isinstance(error, ApplicationError):
        return error
    name = type(error).__name__
    if isinstance(error, TrellisError):
        return ApplicationError(str(error), type=name, non_retryable=not error.retryable)
    if is_unavailable(error):
        return ApplicationError(f"PostgreSQL did not answer: {name}", type="DatabaseUnavailable")
    return ApplicationError(f"unexpected {name}", type=name)


def _attempt(input: ExecuteActivityInput) -> Attempt:  # noqa: A002 - the SDK's name
    info = activity.info()
    activity_id, failed_with = execution.handed_over(info.activity_id)
    return Attempt(
        order_id=getattr(input.args[0], "order_id", "") if input.args else "",
        activity=info.activity_type,
        activity_id=activity_id,
        run_id=info.workflow_run_id or "",
        # The local attempt was the first.
        number=info.attempt + (failed_with is not None),
    )


def _silences() -> int:
    """How many attempts before this one had no answer of the carrier. An attempt that failed for a reason of our own
    does not count, nor one that left no word."""
    info = activity.info()
    told = [] if info.is_local else [detail for detail in info.heartbeat_details if isinstance(detail, dict)]
    return int(told[0].get("silences") or 0) if told else 0


def _given_up(input: ExecuteActivityInput, silences: int, failure: ApplicationError) -> ApplicationError:  # noqa: A002 - the SDK's name
    """The failure, as the last one if the argument says that the carrier has been asked often enough."""
    most = getattr(input.args[0], "give_up_after", 0) if input.args else 0
    if failure.type != CarrierUnavailable.__name__ or not 0 < most <= silences:
        return failure
    return ApplicationError(failure.message, type=failure.type, non_retryable=True)


def _end(outcome: str, began: float, error_type: str | None = None, message: str = "", silences: int = 0) -> None:
    """The attempt's metrics and its canonical line; who and where is bound already."""
    info, seconds = activity.info(), time.monotonic() - began
    metrics.attempt_ended(info.activity_type, info.task_queue, outcome, seconds, error_type)
    level, error = log.info, {}
    if error_type is not None:
        traces.failed(error_type)
        if not info.is_local:
            # Travels with the next attempt, to whichever process: the repeat knows what it repeats. A local attempt
            # has no heartbeat; the activity it is handed to is told by its id.
            activity.heartbeat(_Failed(attempt=info.attempt, error_type=error_type, silences=silences))
        level, error = log.warning, {"error_type": error_type, "error": message}
    level("attempt", outcome=outcome, duration_seconds=round(seconds, 4), **error)


class _Failed(BaseModel):
    attempt: int
    error_type: str
    silences: int = 0


def _error_before(info: activity.Info) -> str:
    """Why this attempt is needed. An attempt that left no word ran out of time, or its worker died."""
    if info.attempt == 1:
        return execution.handed_over(info.activity_id)[1] or ""
    for detail in info.heartbeat_details:
        if isinstance(detail, dict) and detail.get("attempt") == info.attempt - 1:
            return str(detail.get("error_type"))
    return "TimedOut"


def _may_be_repeated() -> bool:
    info = activity.info()
    if info.is_local:
        return True  # on the task queue
    most = info.retry_policy.maximum_attempts if info.retry_policy else 0
    return most == 0 or info.attempt < most


def _loggable(message: str, input: ExecuteActivityInput) -> str:  # noqa: A002 - the SDK's name
    """The message without the customer's payment id, which the timeline may show and the log may not."""
    request = input.args[0] if input.args else None
    payment_id = getattr(request, "payment_id", None) or getattr(getattr(request, "request", None), "payment_id", None)
    return message.replace(payment_id, "[payment]") if payment_id else message


class _LinkToOrder(WorkflowInboundInterceptor):
    """A signal or an update is part of its caller's trace; a link leads from there to the order's."""

    async def handle_signal(self, input: HandleSignalInput) -> None:  # noqa: A002 - the SDK's name
        _link()
        await super().handle_signal(input)

    async def handle_update_handler(self, input: HandleUpdateInput) -> Any:  # noqa: A002 - the SDK's name
        _link()
        return await super().handle_update_handler(input)


def _link() -> None:
    header = workflow.info().headers.get(_TRACE_HEADER)
    span = trace.get_current_span()
    if header is None or not span.is_recording():
        return
    carrier = PayloadConverter.default.from_payloads([header])[0]
    order = trace.get_current_span(TraceContextTextMapPropagator().extract(carrier)).get_span_context()
    if order.is_valid and order.trace_id != span.get_span_context().trace_id:
        span.add_link(order)
