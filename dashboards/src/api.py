"""API and database: requests, statements, connections, processes, the Temporal server."""

from __future__ import annotations

from typing import Final

from app.telemetry.metrics import HTTP_DURATION, QUERY_DURATION
from dashboards.src.board import RELEASE, Board, Query, of_server, of_spans, percentiles, quantile, rate, ratio, select
from dashboards.src.names import buckets, count, gauge, server, spans

ASKED: Final = count(HTTP_DURATION)
ANSWERED: Final = buckets(HTTP_DURATION)
STATEMENTS: Final = buckets(QUERY_DURATION)


def board() -> Board:
    """The dashboard."""
    this = Board(
        "trellis-api",
        "Trellis / API and database",
        "Requests, SQL statements, connections, the processes, and the Temporal server behind them. PostgreSQL is "
        "seen from "
        "its callers: what an exporter of its own would add is not here.",
    )
    _requests(this)
    _database(this)
    _processes(this)
    _temporal(this)
    _traced(this)
    return this


def _requests(this: Board) -> None:
    this.row("API")
    all_requests, failed = rate(select(ASKED)), rate(select(ASKED, 'status=~"5.."'))
    this.number("Requests", "Probes are left out.", "reqps", Query(all_requests))
    this.number(
        "Errors",
        "Share of requests answered with a 5xx.",
        "percentunit",
        Query(ratio(f"({failed} or vector(0))", all_requests)),
        limits=[(0.01, "orange"), (0.05, "red")],
    )
    this.number("p95", "One request in twenty takes longer.", "s", Query(quantile(0.95, select(ANSWERED))))
    this.series(
        "Requests, by route",
        "Per second; the route's template, never a path.",
        "reqps",
        Query(rate(select(ASKED), "method", "route"), "{{method}} {{route}}"),
        stacked=True,
        width=24,
    )
    this.series(
        "Refused and failed, by route and status",
        "4xx: the caller has to change something; 409 is usual when customers and clerks race. 5xx: we have to.",
        "reqps",
        Query(rate(select(ASKED, 'status=~"4..|5.."'), "route", "status"), "{{status}} {{route}}", exemplar=True),
    )
    this.series("Time to answer", "Of an event stream: to its first byte.", "s", *percentiles(select(ANSWERED)))
    this.series(
        "Time to answer, p95 by route",
        "A start writes to Temporal; reads ask PostgreSQL alone.",
        "s",
        Query(quantile(0.95, select(ANSWERED), "method", "route"), "{{method}} {{route}}", exemplar=True),
    )
    this.heat("Time to answer, all requests", "How the times are spread.", "s", select(ANSWERED))


def _database(this: Board) -> None:
    this.row("PostgreSQL, seen from its callers")
    pool = select(gauge("trellis_db_pool_connections"))
    this.series(
        "Connections, by what they do",
        "Of all pools. A pool opens more when it needs them, up to TRELLIS_DATABASE_POOL_SIZE per process.",
        "short",
        Query(f"sum by (state) ({pool})", "{{state}}"),
        stacked=True,
    )
    this.series(
        "Tasks that wait for a connection",
        "By process. More than none for long: the pool is too small or a statement too slow.",
        "short",
        Query(f"sum by (instance) ({select(gauge('trellis_db_pool_waiters'))})", "{{instance}}"),
    )
    this.series(
        "Statements, by operation",
        "Per second, verb and table.",
        "ops",
        Query(rate(select(count(QUERY_DURATION)), "operation"), "{{operation}}"),
    )
    this.series(
        "Time of a statement, p95 by operation",
        "What writes waits for the disk, as it is a transaction of its own; UPDATE orders also for another that holds "
        "the order's row.",
        "s",
        Query(quantile(0.95, select(STATEMENTS), "operation"), "{{operation}}", exemplar=True),
    )
    this.heat("Time of a statement, all of them", "How the times are spread.", "s", select(STATEMENTS))
    this.series("Time of a statement", "Median, p95 and p99.", "s", *percentiles(select(STATEMENTS)))


def _processes(this: Board) -> None:
    this.row("Processes")
    this.series(
        "Up",
        "1: the process answered Prometheus.",
        "short",
        Query(f"sum by (job, instance) (up{{{RELEASE}}})", "{{job}} {{instance}}"),
        runbook="TrellisTargetDown",
    )
    this.series(
        "CPU",
        "Cores used by each process.",
        "short",
        Query(rate(select(gauge("process_cpu_seconds_total")), "instance"), "{{instance}}"),
    )
    this.series(
        "Memory",
        "Resident.",
        "bytes",
        Query(f"max by (instance) ({select(gauge('process_resident_memory_bytes'))})", "{{instance}}"),
    )
    this.series(
        "Files and sockets",
        "Open descriptors, as a share of the most there may be.",
        "percentunit",
        Query(
            f"max by (instance) ({select(gauge('process_open_fds'))} / {select(gauge('process_max_fds'))})",
            "{{instance}}",
        ),
    )


def _temporal(this: Board) -> None:
    this.row("Temporal server")
    requests = of_server(server("service_requests"))
    errors = of_server(server("service_error_with_type"))
    this.series(
        "Requests, by service",
        "Calls between its services included.",
        "reqps",
        Query(rate(requests, "service_name"), "{{service_name}}"),
    )
    this.series(
        "Errors, by kind",
        "Many are answers (not found, already started), and cancelled polls.",
        "ops",
        Query(rate(errors, "service_name", "error_type"), "{{service_name}} {{error_type}}"),
    )
    this.series(
        "Time of a frontend call, p95",
        "What API and workers feel; polls are meant to wait and are left out.",
        "s",
        Query(
            quantile(
                0.95,
                of_server(
                    server("service_latency_bucket"),
                    'service_name="frontend"',
                    'operation!~"Poll.*|GetWorkflowExecutionHistory"',
                ),
                "operation",
            ),
            "{{operation}}",
        ),
    )
    this.series(
        "Time of persistence, p95",
        "Its own database. When this grows, everything does.",
        "s",
        Query(quantile(0.95, of_server(server("persistence_latency_bucket")), "operation"), "{{operation}}"),
    )
    this.series(
        "State transitions",
        "Per second: the server's own measure of how much it does.",
        "ops",
        Query(rate(of_server(server("state_transition_count_count")), "namespace_state"), "{{namespace_state}}"),
        width=24,
    )


def _traced(this: Board) -> None:
    this.row("From traces: the collector counts spans")
    calls = of_spans(spans("traces_span_metrics_calls_total"), 'span_kind="SPAN_KIND_CLIENT"')
    took = of_spans(spans("traces_span_metrics_duration_milliseconds_bucket"), 'span_name=~"POST /v1/.*"')
    failed = of_spans(spans("traces_span_metrics_calls_total"), 'status_code="STATUS_CODE_ERROR"')
    this.series(
        "Calls to partners, p95",
        "Payment provider and carrier, from the client's span. Only orders whose traces are sent.",
        "ms",
        Query(quantile(0.95, took, "span_name"), "{{span_name}}"),
    )
    this.series(
        "Calls to others", "Statements, partners, Temporal.", "ops", Query(rate(calls, "span_name"), "{{span_name}}")
    )
    this.series(
        "Spans with an error",
        "Per second, by name.",
        "ops",
        Query(rate(failed, "span_name"), "{{span_name}}"),
        width=24,
    )
