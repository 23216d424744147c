"""Orders: how many, where, how long, with what end, and whether the objective is met."""

from __future__ import annotations

from typing import Final

from app.domain.steps import FINAL_STEPS, PaymentStatus, Step
from app.telemetry.metrics import ORDERS_CLOSED, ORDERS_STARTED, PAYMENTS, REFUNDS, SIGNALS, STEP_DURATION
from dashboards.src.board import RELEASE, Board, Query, percentiles, quantile, rate, ratio, select
from dashboards.src.names import buckets, count, counter, gauge

STARTED: Final = counter(ORDERS_STARTED)
CLOSED: Final = counter(ORDERS_CLOSED)
STAYS: Final = buckets(STEP_DURATION)
OPEN: Final = gauge("trellis_orders_open")
OLDEST: Final = gauge("trellis_orders_oldest_age_seconds")
IN_DOUBT: Final = gauge("trellis_payments_unsettled_age_seconds")
DUE: Final = gauge("trellis_reviews_due")

#: As in the rules: 99.9 % of the stays at a step that only the system holds up end within a minute.
BUDGET: Final = 0.001
BURN: Final = {"5m": "5 min", "1h": "1 h", "6h": "6 h"}


def board() -> Board:
    """The dashboard."""
    this = Board(
        "trellis-orders",
        "Trellis / Orders",
        "What happens to orders and to the money, and whether the objective is met: 99.9 % of the steps that only the "
        "system holds up are left within a minute.",
    )
    this.choice("step", "Step", [step for step in Step if step not in FINAL_STEPS], Step.CHARGING)
    _now(this)
    _flow(this)
    _time(this)
    _reviews(this)
    _money(this)
    _objective(this)
    return this


def _now(this: Board) -> None:
    this.row("Now")
    this.number(
        "Open orders",
        "Orders that have not ended, as PostgreSQL has them. Every process publishes the same number or none.",
        "short",
        Query(f"sum (max by (namespace, step) ({select(OPEN)}))"),
    )
    this.number("Started", "Orders written down for the first time.", "ops", Query(rate(select(STARTED))))
    this.number("Closed", "Orders that entered a final step.", "ops", Query(rate(select(CLOSED))))
    this.number(
        "Oldest payment in doubt",
        "Age of the oldest payment whose outcome is not known; 0 without one. A provider that is down shows here "
        "first.",
        "s",
        Query(f"max ({select(IN_DOUBT)})"),
        runbook="TrellisPaymentsInDoubt",
        limits=[(60, "orange"), (300, "red")],
    )
    this.number(
        "Charged, not settled",
        "Time the order that waits longest has been paid, and neither shipped nor refunded.",
        "s",
        Query(f"max ({select(OLDEST, _steps(Step.CHARGED, Step.PREPARED))})"),
        runbook="TrellisChargedUnsettled",
        limits=[(300, "orange"), (900, "red")],
    )
    this.number(
        "Error budget left",
        "Of the 0.1 % of 30 days; negative when it is overdrawn. Counts from when Prometheus began, if that is less.",
        "percentunit",
        Query(f"min (1 - trellis:slow_stays:ratio_rate30d{{{RELEASE}}} / {BUDGET})"),
        runbook="TrellisOrdersSettleSlowly",
    )


def _flow(this: Board) -> None:
    this.row("Flow")
    this.series(
        "Started and closed",
        "Orders per second. They part where orders pile up: in a review, at the provider, or without workers.",
        "ops",
        Query(rate(select(STARTED)), "started", exemplar=True),
        Query(rate(select(CLOSED)), "closed", exemplar=True),
    )
    this.series(
        "Closed, by outcome",
        "Orders per second that entered each final step.",
        "ops",
        Query(rate(select(CLOSED), "step"), "{{step}}", exemplar=True),
        stacked=True,
    )
    this.series(
        "Open, by step",
        "Where the orders are that have not ended.",
        "short",
        Query(f"max by (namespace, step) ({select(OPEN)})", "{{step}}"),
        stacked=True,
    )
    this.series(
        "Oldest, by step",
        "How long the order has been there that has been there longest. A line that climbs is one that is stuck.",
        "s",
        Query(f"max by (namespace, step) ({select(OLDEST)})", "{{step}}"),
    )


def _time(this: Board) -> None:
    this.row("Time in each step")
    this.series(
        "p95, by step",
        "One order in twenty spends longer than this in the step. A buckets' estimate.",
        "s",
        Query(quantile(0.95, select(STAYS), "step"), "{{step}}", exemplar=True),
        width=24,
    )
    chosen = 'step="$step"'
    this.series(
        "In $step",
        "Median, p95 and p99 of the step chosen above. A click on an exemplar opens the order's trace.",
        "s",
        *percentiles(select(STAYS, chosen)),
    )
    this.heat(
        "In $step, all orders", "How the times are spread: two humps mean two causes.", "s", select(STAYS, chosen)
    )


def _reviews(this: Board) -> None:
    this.row("Reviews")
    stays = select(count(STEP_DURATION), _steps(Step.AWAITING_REVIEW))
    this.series(
        "Outcome of reviews",
        "Orders per second that left the review. Approved are those that were charged, whatever became of that.",
        "ops",
        Query(rate(select(counter(PAYMENTS), f'status="{PaymentStatus.INIT}"')), "approved", exemplar=True),
        Query(
            rate(select(CLOSED, _steps(Step.EXPIRED, Step.REJECTED, Step.CANCELLED)), "step"), "{{step}}", exemplar=True
        ),
        stacked=True,
        runbook="TrellisReviewsExpire",
    )
    this.series(
        "Share that expires",
        "Of the orders that left the review. Above a half, clerks do not keep up or the window is too short.",
        "percentunit",
        Query(ratio(rate(select(CLOSED, _steps(Step.EXPIRED))), rate(stays)), "expired"),
        runbook="TrellisReviewsExpire",
        limits=[(0.5, "red")],
    )
    waiting = f"max by (namespace) ({select(OPEN, _steps(Step.AWAITING_REVIEW))})"
    this.series(
        "Waiting for a clerk",
        "Due: with a quarter of the window left, or less. Who is not decided then expires.",
        "short",
        Query(waiting, "in review"),
        Query(f"max by (namespace) ({select(DUE)})", "due"),
        runbook="TrellisReviewsDue",
    )
    this.series(
        "Signals",
        "Of customers and clerks. Ignored: it changed nothing. Refused: too late, by the workflow or with 409 by the "
        "API.",
        "ops",
        Query(rate(select(counter(SIGNALS)), "signal", "outcome"), "{{signal}} {{outcome}}"),
    )


def _money(this: Board) -> None:
    this.row("Money")
    this.series(
        "Charged and refunded",
        "Payments per second, by what became of them. Amounts are in no metric: ask the table `payments`.",
        "ops",
        Query(
            rate(select(counter(PAYMENTS), f'status!="{PaymentStatus.INIT}"'), "status"), "{{status}}", exemplar=True
        ),
    )
    this.series(
        "Refunds",
        "Succeeded: once per refund. Refused: each time the provider says no; an operator has to look at it.",
        "ops",
        Query(rate(select(counter(REFUNDS)), "outcome"), "{{outcome}}", exemplar=True),
        runbook="TrellisRefundErrors",
    )
    this.series(
        "Payments in doubt: age of the oldest",
        "From the first question to the provider until its answer is written down. A saw is retries that succeed.",
        "s",
        Query(f"max by (namespace) ({select(IN_DOUBT)})", "oldest"),
        runbook="TrellisPaymentsInDoubt",
        limits=[(300, "red")],
    )
    this.series(
        "Orders that wait for money or parcel",
        "Charging: the payment is in doubt. Charged, prepared: paid, and not settled.",
        "short",
        Query(
            f"max by (namespace, step) ({select(OPEN, _steps(Step.CHARGING, Step.CHARGED, Step.PREPARED))})", "{{step}}"
        ),
        stacked=True,
        runbook="TrellisChargedUnsettled",
    )


def _objective(this: Board) -> None:
    this.row("Objective: 99.9 % of the system's steps within a minute")
    this.series(
        "How fast the budget burns",
        "1 spends the budget of 30 days in 30 days. The alert wakes somebody above 14.4 in 1 h and 5 min, or above 6 "
        "in 6 h "
        "and 30 min.",
        "short",
        *(
            Query(f"max by (namespace) (trellis:slow_stays:ratio_rate{window}{{{RELEASE}}}) / {BUDGET}", name)
            for window, name in BURN.items()
        ),
        runbook="TrellisOrdersSettleSlowly",
        limits=[(6, "orange"), (14.4, "red")],
    )
    system = _steps(Step.RECEIVED, Step.CHARGING, Step.CHARGED, Step.PREPARED)
    stays, in_time = select(count(STEP_DURATION), system), select(STAYS, system, 'le="60.0"')
    this.series(
        "Slow stays, by step",
        "Stays of more than a minute that ended, per second. Those that have not ended are not in it: see the ages "
        "above.",
        "ops",
        Query(f"{rate(stays, 'step')} - {rate(in_time, 'step')}", "{{step}}"),
        runbook="TrellisOrdersSettleSlowly",
    )


def _steps(*steps: Step) -> str:
    return f'step=~"{"|".join(steps)}"' if len(steps) > 1 else f'step="{steps[0]}"'
