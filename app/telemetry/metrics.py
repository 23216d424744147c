"""Every metric of the product: names, labels and buckets. docs/observability.md explains them to operators.

Names are a contract with dashboards and alerts, which import them from here. Label values come from closed sets:
never an id, never a message. Functions are called after the transaction they count has been committed, so that a
repeated attempt adds nothing twice.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

import prometheus_client
from opentelemetry import trace
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.core import GaugeMetricFamily

from app import errors
from app.domain.steps import PaymentStatus, Step

if TYPE_CHECKING:
    import asyncpg
    from prometheus_client.metrics_core import Metric

    from app.db.timeline import Move

# A second series per counter, with the time of its creation, is of no use to anybody here.
prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]

#: The product's metrics. Its own registry, so that a library cannot add to what is published.
REGISTRY: Final = CollectorRegistry()
ProcessCollector(registry=REGISTRY)

#: Seconds for which gauges are shown when PostgreSQL does not answer; older, they would mislead.
STALE_AFTER: Final = 60.0

#: From one statement (ms) over the review window (10 s by default) to an order that waits for days.
_STEP_BUCKETS: Final = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 7.5, 10, 11, 15, 30, 60, 300, 900, 3600, 21600, 86400)
#: An attempt is a few statements, or a partner's call of 10 s at most between them; 40 s is the longest time-out.
_ATTEMPT_BUCKETS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40)
_REQUEST_BUCKETS: Final = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10)
_QUERY_BUCKETS: Final = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)

ORDERS_STARTED: Final = Counter(
    "trellis_orders_started_total", "Orders received: written down for the first time.", registry=REGISTRY
)
ORDERS_CLOSED: Final = Counter(
    "trellis_orders_closed_total", "Orders that entered a final step.", ["step"], registry=REGISTRY
)
STEP_DURATION: Final = Histogram(
    "trellis_step_duration_seconds",
    "Time an order spent in the step it has left.",
    ["step"],
    buckets=_STEP_BUCKETS,
    registry=REGISTRY,
)
ATTEMPTS: Final = Counter(
    "trellis_activity_attempts_total",
    "Attempts of activities, by what became of them.",
    ["activity", "task_queue", "outcome"],
    registry=REGISTRY,
)
RETRIES: Final = Counter(
    "trellis_activity_retries_total",
    "Attempts after the first, by the error of the attempt before.",
    ["activity", "task_queue", "error_type"],
    registry=REGISTRY,
)
ATTEMPT_DURATION: Final = Histogram(
    "trellis_activity_duration_seconds",
    "Time an attempt ran.",
    ["activity", "outcome"],
    buckets=_ATTEMPT_BUCKETS,
    registry=REGISTRY,
)
SIGNALS: Final = Counter(
    "trellis_signals_total", "Signals of customers and clerks.", ["signal", "outcome"], registry=REGISTRY
)
PAYMENTS: Final = Counter("trellis_payments_total", "Payments that entered a status.", ["status"], registry=REGISTRY)
REFUNDS: Final = Counter(
    "trellis_refunds_total",
    "Refunds that were made, and tries that were refused.",
    ["outcome"],
    registry=REGISTRY,
)
RECONCILED: Final = Counter(
    "trellis_reconciled_orders_total",
    "Orders that were found left behind, by what became of them. `defect`: something unexpected stands in the way.",
    ["outcome"],
    registry=REGISTRY,
)
HTTP_DURATION: Final = Histogram(
    "http_server_request_duration_seconds",
    "Time to answer a request; of an event stream, to its first byte.",
    ["method", "route", "status"],
    buckets=_REQUEST_BUCKETS,
    registry=REGISTRY,
)
QUERY_DURATION: Final = Histogram(
    "trellis_db_query_duration_seconds",
    "Time PostgreSQL took for a statement.",
    ["operation"],
    buckets=_QUERY_BUCKETS,
    registry=REGISTRY,
)
SANDBOX_IN_USE: Final = Gauge(
    "trellis_sandbox_in_use",
    "1 where the built-in sandbox stands in for a partner: no money moves, no parcel leaves.",
    ["partner"],
    registry=REGISTRY,
)
STREAMS: Final = Gauge("trellis_event_streams", "Timelines that are watched live at this moment.", registry=REGISTRY)
STREAMS_REFUSED: Final = Counter(
    "trellis_event_streams_refused_total",
    "Timelines that were not served live, by the limit that was reached.",
    ["limit"],
    registry=REGISTRY,
)
BACKGROUND_FAILURES: Final = Counter(
    "trellis_background_failures_total",
    "Failures of a background task that others depend on; it was started again.",
    ["task"],
    registry=REGISTRY,
)

ATTEMPT_OUTCOMES: Final = ("success", "retry", "failure")
SIGNAL_OUTCOMES: Final = ("accepted", "ignored", "refused")
CUSTOMER_SIGNALS: Final = ("approve", "cancel", "address")
REFUND_OUTCOMES: Final = ("succeeded", "refused")
RECONCILE_OUTCOMES: Final = ("settled", "left", "defect")
BACKGROUND_TASKS: Final = ("timelines", "gauges")
STREAM_LIMITS: Final = ("process", "client")


def _names_of_errors(kind: type[errors.TrellisError]) -> Iterator[str]:
    for child in kind.__subclasses__():
        yield child.__name__
        yield from _names_of_errors(child)


UNEXPECTED: Final = "Unexpected"
#: What `error_type` can be besides `UNEXPECTED`: our errors by name, and what befalls an attempt from outside.
ERROR_TYPES: Final = frozenset(_names_of_errors(errors.TrellisError)) | {
    "DatabaseUnavailable",
    "TimedOut",
    "WorkerStopped",
    "Cancelled",
}
KNOWN_METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


def _start_at_zero() -> None:
    """`increase()` does not see the first increment of a series that was not there before."""
    for step in Step:
        if step.final:
            ORDERS_CLOSED.labels(step)
        else:
            STEP_DURATION.labels(step)
    for counter, values in (
        (PAYMENTS, PaymentStatus),
        (REFUNDS, REFUND_OUTCOMES),
        (RECONCILED, RECONCILE_OUTCOMES),
        (BACKGROUND_FAILURES, BACKGROUND_TASKS),
        (STREAMS_REFUSED, STREAM_LIMITS),
    ):
        for value in values:
            counter.labels(value)
    for signal in CUSTOMER_SIGNALS:
        for outcome in SIGNAL_OUTCOMES:
            SIGNALS.labels(signal, outcome)


_start_at_zero()


# --- what happens to orders


def order_received() -> None:
    """Count an order that was written down for the first time."""
    ORDERS_STARTED.inc(exemplar=_exemplar())


def entered(step: Step, move: Move | None) -> None:
    """Count a move that was made and committed; None is a repeat, which made none."""
    if move is None:
        return
    STEP_DURATION.labels(move.left).observe(move.seconds, exemplar=_exemplar())
    if step.final:
        ORDERS_CLOSED.labels(step).inc(exemplar=_exemplar())


def payment_entered(status: PaymentStatus) -> None:
    """Count a payment that entered a status."""
    PAYMENTS.labels(status).inc(exemplar=_exemplar())
    if status is PaymentStatus.REFUNDED:
        REFUNDS.labels("succeeded").inc(exemplar=_exemplar())


def signalled(signal: str, outcome: str) -> None:
    """Count what became of a signal."""
    SIGNALS.labels(signal, outcome).inc()


def reconciled(outcome: str) -> None:
    """Count an order that a pass of `trellis reconcile` found left behind."""
    RECONCILED.labels(outcome).inc()


# --- attempts


def expect_activities(names: Iterable[str], task_queue: str) -> None:
    """Let the counters of these activities start at zero."""
    for name in names:
        for outcome in ATTEMPT_OUTCOMES:
            ATTEMPTS.labels(name, task_queue, outcome)


def attempt_ended(activity: str, task_queue: str, outcome: str, seconds: float, error_type: str | None = None) -> None:
    """Count an attempt."""
    ATTEMPTS.labels(activity, task_queue, outcome).inc(exemplar=_exemplar())
    ATTEMPT_DURATION.labels(activity, outcome).observe(seconds, exemplar=_exemplar())
    if activity == "refund" and (outcome == "failure" or error_type == errors.RefundRefused.__name__):
        # Nothing was given back, and nothing will be unless an operator looks at it. Counted each time it is tried.
        REFUNDS.labels("refused").inc(exemplar=_exemplar())


def attempt_repeated(activity: str, task_queue: str, error_type: str) -> None:
    """Count an attempt after the first."""
    RETRIES.labels(activity, task_queue, closed_error_type(error_type)).inc(exemplar=_exemplar())


def closed_error_type(name: str) -> str:
    """`name` if it is one of ours."""
    return name if name in ERROR_TYPES else UNEXPECTED


# --- requests and statements


def request_ended(method: str, route: str, status: int, seconds: float) -> None:
    """Count a request. `route` is the template, never the path."""
    known = method if method in KNOWN_METHODS else "other"
    HTTP_DURATION.labels(known, route, str(status)).observe(seconds, exemplar=_exemplar())


def query_ended(query: asyncpg.connection.LoggedQuery) -> None:
    """Count a statement; a logger of asyncpg."""
    QUERY_DURATION.labels(operation(query.query)).observe(query.elapsed, exemplar=_exemplar())


def background_failed(task: str) -> None:
    """Count a failure of a background task."""
    BACKGROUND_FAILURES.labels(task).inc()


#: What asyncpg's pool says to a connection that comes back.
POOL_RESET: Final = "SELECT pg_advisory_unlock_all()"

_CHANGE: Final = re.compile(r"\b(INSERT)\s+INTO\s+(\w+)|(?<!KEY )(?<!DO )\b(UPDATE)\s+(\w+)|\b(DELETE)\s+FROM\s+(\w+)")
_READ: Final = re.compile(r"(?<!epoch )\bFROM\s+(\w+)")


@lru_cache(maxsize=512)
def operation(query: str) -> str:
    """What a statement does first and to which table, such as `UPDATE orders`. SQL is literal text here, so there
    are as many values as statements in the source."""
    if query.startswith(POOL_RESET):
        return "RESET"
    change = _CHANGE.search(query)
    if change:
        return " ".join(part for part in change.groups() if part)
    verb = (query.split(None, 1) or ["OTHER"])[0].strip(";").upper()
    read = _READ.search(query)
    if verb in {"SELECT", "WITH"} and read:
        return f"SELECT {read[1]}"
    return verb if verb in {"SELECT", "BEGIN", "COMMIT", "ROLLBACK"} else "OTHER"


# --- gauges


class _Pools:
    """Connections of the process's pools, added up: a process has one, a test may have more."""

    def __init__(self) -> None:
        self._pools: list[asyncpg.Pool] = []

    def add(self, pool: asyncpg.Pool) -> None:
        # They cannot be referred to weakly; those that were closed are let go here.
        self._pools = [other for other in self._pools if not other.is_closing()] + [pool]

    def describe(self) -> Iterable[Metric]:
        return self._families(0, 0, 0)

    def collect(self) -> Iterable[Metric]:
        pools = [pool for pool in self._pools if not pool.is_closing()]
        idle = sum(pool.get_idle_size() for pool in pools)
        size = sum(pool.get_size() for pool in pools)
        return self._families(idle, size - idle, sum(map(_waiting, pools)))

    def _families(self, idle: int, used: int, waiting: int) -> Iterable[Metric]:
        size = GaugeMetricFamily(
            "trellis_db_pool_connections", "Connections of the pool, by what they do.", labels=["state"]
        )
        size.add_metric(["idle"], idle)
        size.add_metric(["used"], used)
        yield size
        yield GaugeMetricFamily("trellis_db_pool_waiters", "Tasks that wait for a connection.", value=waiting)


def _waiting(pool: asyncpg.Pool) -> int:
    # asyncpg does not tell; without the private queue's help the gauge would need a wrapper around every call.
    queue = getattr(pool, "_queue", None)
    return sum(not waiter.done() for waiter in getattr(queue, "_getters", ()))


class OrderGauges:
    """What PostgreSQL says of all orders; `app.order.gauges` reads it, in one process of all."""

    def __init__(self) -> None:
        self._open: dict[str, int] | None = None
        self._oldest: dict[str, float] = {}
        self._unsettled_age = 0.0
        self._due = 0
        self._read_at = 0.0

    def set(self, open_orders: dict[str, int], oldest: dict[str, float], unsettled_age: float, due: int) -> None:
        """Publish what was read."""
        self._open, self._oldest, self._unsettled_age, self._due = open_orders, oldest, unsettled_age, due
        self._read_at = time.monotonic()

    def clear(self) -> None:
        """Publish nothing: another process does."""
        self._open = None

    def describe(self) -> Iterable[Metric]:
        return self._families({}, {}, 0.0, 0)

    def collect(self) -> Iterable[Metric]:
        if self._open is None or time.monotonic() - self._read_at > STALE_AFTER:
            return ()
        return self._families(self._open, self._oldest, self._unsettled_age, self._due)

    def _families(self, counts: dict[str, int], oldest: dict[str, float], age: float, due: int) -> Iterable[Metric]:
        orders = GaugeMetricFamily("trellis_orders_open", "Orders that have not ended, by step.", labels=["step"])
        for step in Step:
            if not step.final:
                orders.add_metric([step], counts.get(step, 0))
        yield orders
        stays = GaugeMetricFamily(
            "trellis_orders_oldest_age_seconds",
            "Time the longest-staying order has been at the step; 0 when there is none.",
            labels=["step"],
        )
        for step in Step:
            if not step.final:
                stays.add_metric([step], oldest.get(step, 0.0))
        yield stays
        yield GaugeMetricFamily(
            "trellis_payments_unsettled_age_seconds",
            "Age of the oldest payment whose outcome is not known; 0 when there is none.",
            value=age,
        )
        yield GaugeMetricFamily(
            "trellis_reviews_due", "Orders in review that have a quarter of their window left, or less.", value=due
        )


_pools: Final = _Pools()
ORDER_GAUGES: Final = OrderGauges()
REGISTRY.register(_pools)
REGISTRY.register(ORDER_GAUGES)


def watch_pool(pool: asyncpg.Pool) -> None:
    """Publish the size of this pool for as long as it is open."""
    _pools.add(pool)


def _exemplar() -> dict[str, Any] | None:
    """The current trace, for Prometheus to keep beside the number."""
    context = trace.get_current_span().get_span_context()
    return {"trace_id": f"{context.trace_id:032x}"} if context.trace_flags.sampled else None
