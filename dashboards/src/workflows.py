"""Workflows and workers: attempts, retries, queues, slots."""

from __future__ import annotations

from typing import Final

from app.telemetry.metrics import ATTEMPT_DURATION, ATTEMPTS, RETRIES
from dashboards.src.board import QUEUE, RELEASE, SERVER_QUEUES, Board, Query, of_server, quantile, rate, ratio, select
from dashboards.src.names import buckets, counter, sdk, server

TRIED: Final = counter(ATTEMPTS)
TRIED_AGAIN: Final = counter(RETRIES)
TOOK: Final = buckets(ATTEMPT_DURATION)


def board() -> Board:
    """The dashboard."""
    this = Board(
        "trellis-workflows",
        "Trellis / Workflows and workers",
        "Attempts of activities and why they are repeated, task queues from both ends, and what the workers have to "
        "spare.",
    )
    _attempts(this)
    _queues(this)
    _workers(this)
    _workflows(this)
    _connection(this)
    return this


def _attempts(this: Board) -> None:
    this.row("Activities")
    this.series(
        "Attempts, by outcome",
        "Retry: it failed and Temporal tries again. Failure: it failed for good, such as a declined payment.",
        "ops",
        Query(rate(select(TRIED, QUEUE), "activity", "outcome"), "{{activity}} {{outcome}}", exemplar=True),
    )
    this.series(
        "Retries, by activity and error",
        "Attempts after the first, by the error of the one before. TimedOut: that left no word, so it ran out of time "
        "or its "
        "worker died.",
        "ops",
        Query(rate(select(TRIED_AGAIN, QUEUE), "activity", "error_type"), "{{activity}} {{error_type}}", exemplar=True),
        stacked=True,
        runbook="TrellisRetryRatio",
    )
    this.series(
        "Share of attempts that are repetitions",
        "Over 15 minutes. Above a half an activity does little else; the alert waits for more than ten.",
        "percentunit",
        Query(f"max by (activity) (trellis:activity_repeats:ratio_rate15m{{{RELEASE}}})", "{{activity}}"),
        runbook="TrellisRetryRatio",
        limits=[(0.5, "red")],
    )
    this.series(
        "Failed for good",
        "Attempts after which the workflow goes another way: declined payments, refused parcels.",
        "ops",
        Query(rate(select(TRIED, QUEUE, 'outcome="failure"'), "activity"), "{{activity}}", exemplar=True),
    )
    this.series(
        "Time of an attempt, p95",
        "Successful and failed ones apart: a partner that runs into time-outs shows in the failed ones.",
        "s",
        Query(quantile(0.95, select(TOOK), "activity", "outcome"), "{{activity}} {{outcome}}", exemplar=True),
    )
    this.heat("Time of an attempt, all activities", "How the times of attempts are spread.", "s", select(TOOK))


def _queues(this: Board) -> None:
    this.row("Task queues")
    for kind in ("activity", "workflow_task"):
        latency = select(sdk(f"temporal_{kind}_schedule_to_start_latency_seconds_bucket"), QUEUE)
        this.series(
            f"Schedule to start, p95: {kind.replace('_', ' ')}s",
            "How long tasks wait for a worker. Milliseconds when all is well; seconds when workers are too few or too "
            "busy.",
            "s",
            Query(quantile(0.95, latency, "task_queue"), "{{task_queue}}"),
            runbook="TrellisScheduleToStart",
            limits=[(5, "red")],
        )
    # One value per task queue, however many partitions and versions the server spreads it over.
    waiting = of_server(server("approximate_backlog_count"), SERVER_QUEUES)
    this.series(
        "Backlog",
        "Tasks that wait in the Temporal server, by its count. It writes `_` for `-` in a queue's name. Sticky ones "
        "included.",
        "short",
        Query(f"sum by (taskqueue, task_type) ({waiting})", "{{taskqueue}} {{task_type}}"),
        runbook="TrellisBacklogAge",
    )
    this.series(
        "Age of the oldest waiting task",
        "By the Temporal server.",
        "s",
        Query(
            f"max by (taskqueue, task_type) ({of_server(server('approximate_backlog_age_seconds'), SERVER_QUEUES)})",
            "{{taskqueue}} {{task_type}}",
        ),
        runbook="TrellisBacklogAge",
        limits=[(60, "red")],
    )
    this.series(
        "Tasks handed out",
        "Polls that the Temporal server answered with a task. Sync: handed straight to a waiting worker; the rest had "
        "to be "
        "stored first, which costs the database.",
        "ops",
        Query(
            rate(of_server(server("poll_success"), SERVER_QUEUES), "taskqueue", "task_type"),
            "{{taskqueue}} {{task_type}}",
        ),
        Query(
            rate(of_server(server("poll_success_sync"), SERVER_QUEUES), "taskqueue", "task_type"),
            "{{taskqueue}} {{task_type}} sync",
        ),
        width=24,
    )


def _workers(this: Board) -> None:
    this.row("Workers")
    this.series(
        "Pollers",
        "Open polls of all workers. None of workflow_task or activity_task: nobody works on that queue. The sticky "
        "ones take "
        "the tasks of workflows that a worker has in its memory.",
        "short",
        Query(
            f"sum by (task_queue, poller_type) ({select(sdk('temporal_num_pollers'), QUEUE)})",
            "{{task_queue}} {{poller_type}}",
        ),
        runbook="TrellisNoPollers",
    )
    for state, meaning in (("used", "Tasks being worked on."), ("available", "At 0 a worker takes nothing more.")):
        slots = select(
            sdk(f"temporal_worker_task_slots_{state}"),
            QUEUE,
            'worker_type=~"WorkflowWorker|ActivityWorker|LocalActivityWorker"',
        )
        this.series(
            f"Slots {state}",
            meaning,
            "short",
            Query(f"sum by (task_queue, worker_type) ({slots})", "{{task_queue}} {{worker_type}}"),
            runbook="TrellisSlotsExhausted",
        )
    this.series(
        "Workflows in memory",
        "Those that need no replay for their next task. At the limit (1000 per worker) the oldest are put out.",
        "short",
        Query(
            f"sum by (task_queue, instance) ({select(sdk('temporal_sticky_cache_size'), QUEUE)})",
            "{{task_queue}} {{instance}}",
        ),
    )
    this.series(
        "Workflow tasks that found their workflow in memory",
        "Per second. Forced out: for want of space, or after a failure; such a workflow is replayed from its history.",
        "ops",
        Query(rate(select(sdk("temporal_sticky_cache_hit_total"), QUEUE), "task_queue"), "{{task_queue}} in memory"),
        Query(
            rate(select(sdk("temporal_sticky_cache_total_forced_eviction_total"), QUEUE), "task_queue"),
            "{{task_queue}} forced out",
        ),
        width=24,
    )


def _workflows(this: Board) -> None:
    this.row("Workflows")
    queries = [
        Query(
            rate(select(sdk(f"temporal_workflow_{end}_total"), QUEUE), "workflow_type"), f"{{{{workflow_type}}}} {end}"
        )
        for end in ("completed", "failed")
    ]
    this.series(
        "Ended",
        "An order that was declined or cancelled is a workflow that completed. A ShippingWorkflow fails when it gives "
        "up.",
        "ops",
        *queries,
    )
    this.series(
        "From start to end, p95",
        "Includes the review: a person's time.",
        "s",
        Query(
            quantile(0.95, select(sdk("temporal_workflow_endtoend_latency_seconds_bucket"), QUEUE), "workflow_type"),
            "{{workflow_type}}",
        ),
    )
    failed = sdk("temporal_workflow_task_execution_failed_total")
    this.series(
        "Non-determinism",
        "Workflow code that does not fit a history: that order stands still until a worker comes whose code does.",
        "ops",
        Query(
            rate(select(failed, QUEUE, 'failure_reason="NonDeterminismError"'), "workflow_type"), "{{workflow_type}}"
        ),
        runbook="TrellisNonDeterminism",
    )
    this.series(
        "Other failures of workflow tasks",
        "An error in workflow code that is none of ours: a defect. The task is repeated until the code is mended.",
        "ops",
        Query(
            rate(select(failed, QUEUE, 'failure_reason!="NonDeterminismError"'), "workflow_type", "failure_reason"),
            "{{workflow_type}} {{failure_reason}}",
        ),
    )
    for what, meaning in (
        ("execution", "Time in workflow code. A second without an await would be a deadlock for the SDK."),
        ("replay", "Time to bring a workflow back to where it was; long histories and a small cache make it grow."),
    ):
        bucket = sdk(f"temporal_workflow_task_{what}_latency_seconds_bucket")
        this.series(
            f"Workflow task {what}, p95",
            meaning,
            "s",
            Query(quantile(0.95, select(bucket, QUEUE), "workflow_type"), "{{workflow_type}}"),
        )


def _connection(this: Board) -> None:
    this.row("Calls to Temporal")
    failed = select(sdk("temporal_request_failure_total"))
    calls, polls = select(sdk("temporal_request_total")), select(sdk("temporal_long_request_total"))
    lost = rate(select(sdk("temporal_long_request_failure_total")), "operation", "status_code")
    this.series(
        "Failed calls",
        "By operation and status, retries included. NOT_FOUND is an answer; UNAVAILABLE and DEADLINE_EXCEEDED are not.",
        "ops",
        Query(rate(failed, "operation", "status_code"), "{{operation}} {{status_code}}"),
        Query(lost, "{{operation}} {{status_code}}"),
    )
    this.series(
        "Share of calls that fail",
        "Of all calls that are not polls.",
        "percentunit",
        Query(ratio(f"({rate(failed)} or vector(0))", rate(calls)), "failed"),
    )
    this.series("Calls", "Calls and polls per second.", "ops", Query(rate(calls), "calls"), Query(rate(polls), "polls"))
    this.series(
        "Time of a call, p95",
        "By operation; polls are left out, which are meant to wait.",
        "s",
        Query(
            quantile(0.95, select(sdk("temporal_request_latency_seconds_bucket")), "operation"),
            "{{operation}}",
        ),
    )
