"""Asks a real Prometheus every query of every panel and rule, and compares its counts with PostgreSQL's.

    python -m tests.queries --prometheus http://127.0.0.1:9090 --database-url postgresql://… --since 15

Let `trellis load` run for ten minutes first, and end it before counts are compared: an order that is under way is in
one of the two and not yet in the other; for the same reason `--since` has to reach back to a quiet moment. Each query
is printed with what came back. The exit code is 1 if a query was empty or not a number, but for those that are listed
below with a reason, or if a count differs by more than `--tolerance`.

An alert is silent when all is well, so what is asked of it are the series that it looks at.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import asyncpg
import httpx
import yaml

from app.domain.steps import FINAL_STEPS, PaymentStatus
from app.telemetry.metrics import ORDERS_CLOSED, ORDERS_STARTED, PAYMENTS, RETRIES
from dashboards.src.names import counter

CHART: Final = Path(__file__).parents[1] / "charts" / "trellis"

#: What is empty in a healthy system, and why: by a metric's name, or by words of the query.
MAY_BE_EMPTY: Final[dict[str, str]] = {
    "temporal_request_failure_total": "begins with the first call to Temporal that fails",
    "temporal_long_request_failure_total": "begins with the first poll that fails",
    "temporal_workflow_task_execution_failed_total": "begins with the first workflow task that fails",
    "temporal_sticky_cache_total_forced_eviction_total": "begins when a cache is full or a workflow task fails",
    "kube_job_status_failed": "needs kube-state-metrics and the audit as a CronJob",
    "kube_job_status_start_time": "needs kube-state-metrics and the audit as a CronJob",
    "ALERTS": "only while an alert fires",
    "route, status": "no request was refused or failed",
}
#: Left out where nothing is traced.
NEEDS_COLLECTOR: Final = re.compile(r"\btraces_span_metrics_")
#: Left out where the Temporal server is not scraped.
NEEDS_SERVER: Final = re.compile(r"\b(approximate_backlog_|service_|persistence_|poll_success|state_transition_)")


@dataclass(frozen=True)
class Asked:
    """A query, and whose it is."""

    whose: str
    expr: str
    #: The alert's own expression: what it answers is whether it fires.
    alert: bool = False


def panel_queries(prometheus: Prometheus, window: str) -> Iterator[Asked]:
    """Every query of every panel, with the values that `All` stands for and a fixed rate interval."""
    for file in sorted((CHART / "dashboards").glob("*.json")):
        board = json.loads(file.read_text())
        for values in _choices(prometheus, board["templating"]["list"]):
            for panel in all_panels(board):
                for target in panel.get("targets", []):
                    expr = substitute(target["expr"], values, window)
                    yield Asked(f"{board['title']} > {substitute(panel['title'], values, window)}", expr)
            for annotation in board["annotations"]["list"]:
                yield Asked(f"{board['title']} > annotation", substitute(annotation["expr"], values, window))


def all_panels(board: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The panels of a dashboard, out of their rows, without the rows."""
    for panel in board["panels"]:
        yield from panel.get("panels", [])
        if panel["type"] != "row":
            yield panel


def substitute(text: str, values: dict[str, str], window: str) -> str:
    """As Grafana does, as far as the dashboards need it."""
    text = text.replace("$__rate_interval", window)
    return re.sub(r"\$\{?(\w+)\}?", lambda match: values.get(match[1], match[0]), text)


def rule_queries() -> Iterator[Asked]:
    """Every recorded expression, the name it is recorded under, and every alert."""
    for file in sorted((CHART / "rules").glob("*.yaml")):
        for group in yaml.safe_load(file.read_text())["groups"]:
            for rule in group["rules"]:
                if "record" in rule:
                    yield Asked(f"rule {rule['record']}", rule["expr"])
                    yield Asked(f"rule {rule['record']}, recorded", rule["record"])
                else:
                    yield Asked(f"alert {rule['alert']}", rule["expr"], alert=True)


def _choices(prometheus: Prometheus, variables: list[dict[str, Any]]) -> Iterator[dict[str, str]]:
    """The values of the variables: `All` where there is such a value, otherwise each in turn."""
    values, offered = {}, {}
    for each in variables:
        if each["type"] == "query":
            found = prometheus.values(substitute(each["query"], values, ""))
            values[each["name"]] = each.get("allValue") or "|".join(found)
        elif each["type"] == "custom":
            offered[each["name"]] = [option["value"] for option in each["options"]]
    if not offered:
        yield values
    for name, choices in offered.items():
        for choice in choices:
            yield values | {name: choice}


class Prometheus:
    """The server that is asked."""

    def __init__(self, url: str) -> None:
        self._http = httpx.Client(base_url=url, timeout=30)

    def ask(self, query: str, at: float | None = None) -> list[dict[str, Any]]:
        """The series of an instant query."""
        data = self._get("query", query=query, **({"time": at} if at else {}))
        return (
            data["result"] if data["resultType"] in {"vector", "matrix"} else [{"metric": {}, "value": data["result"]}]
        )

    def values(self, query: str) -> list[str]:
        """The values of a label, asked for in Grafana's words.

        Raises:
            LookupError: there are none: the variable would be empty.
        """
        selector, label = query.removeprefix("label_values(").removesuffix(")").rsplit(", ", 1)
        values = {series.get(label) for series in self._get("series", **{"match[]": selector})}
        if not values:
            raise LookupError(f"{query}: nothing is selected; is Trellis scraped?")
        return sorted(value for value in values if value)

    def selectors(self, query: str) -> list[str]:
        """What the query selects, each as a query of its own, by Prometheus' own parser."""
        return sorted(set(_selectors(self._get("parse_query", query=query))))

    def broken_rules(self) -> list[str]:
        """Rules that could not be evaluated."""
        groups = self._get("rules")["groups"]
        return [
            f"{rule['name']}: {rule['lastError']}"
            for group in groups
            for rule in group["rules"]
            if rule.get("lastError")
        ]

    def has_rules(self) -> bool:
        """Whether it evaluates ours."""
        names = {rule["name"] for group in self._get("rules")["groups"] for rule in group["rules"]}
        return "TrellisPaymentsInDoubt" in names

    def _get(self, what: str, **query: Any) -> Any:
        response = self._http.get(f"/api/v1/{what}", params=query)
        body = response.json()
        if body["status"] != "success":
            raise LookupError(f"{query}: {body['error']}")
        return body["data"]


def _selectors(node: Any) -> Iterator[str]:
    if isinstance(node, list):
        for each in node:
            yield from _selectors(each)
    elif isinstance(node, dict):
        if node.get("type") == "vectorSelector":
            matchers = [
                f"{m['name']}{m['type']}{json.dumps(m['value'])}" for m in node["matchers"] if m["name"] != "__name__"
            ]
            yield f"{node['name']}{{{','.join(matchers)}}}"
        for each in node.values():
            yield from _selectors(each)


# --- every query


@dataclass
class Verdict:
    """What became of all that was asked."""

    asked: int = 0
    excused: int = 0
    failed: int = 0

    def say(self, state: str, whose: str, expr: str, answer: str) -> None:
        """A line for the reader."""
        self.asked += 1
        self.failed += state == "FAIL"
        self.excused += state == "----"
        print(f"{state}  {whose}\n      {' '.join(expr.split())}\n      {answer}")  # noqa: T201 - a script that prints its findings


def check(prometheus: Prometheus, verdict: Verdict, asked: Asked, left_out: dict[str, re.Pattern[str]]) -> None:
    """Ask one query."""
    for reason, names in left_out.items():
        if names.search(asked.expr):
            verdict.say("----", asked.whose, asked.expr, reason)
            return
    found = prometheus.ask(asked.expr)
    if asked.alert:
        _check_alert(prometheus, verdict, asked, found)
        return
    values = [float(series["value"][1]) for series in found]
    finite = [value for value in values if math.isfinite(value)]
    answer = f"{len(values)} series, {len(finite)} finite" + (f", such as {finite[0]:.6g}" if finite else "")
    if any(map(math.isinf, values)):
        verdict.say("FAIL", asked.whose, asked.expr, f"{answer}; infinite")
    elif finite and (len(finite) == len(values) or "histogram_quantile" in asked.expr):
        # A percentile of a series without observations in the window is NaN, and Grafana draws nothing.
        verdict.say("ok  ", asked.whose, asked.expr, answer)
    elif reason := _excuse(asked.expr):
        verdict.say("----", asked.whose, asked.expr, f"{answer}: {reason}")
    else:
        verdict.say("FAIL", asked.whose, asked.expr, answer)


def _check_alert(prometheus: Prometheus, verdict: Verdict, asked: Asked, found: list[dict[str, Any]]) -> None:
    for selector in prometheus.selectors(asked.expr):
        series = len(prometheus.ask(selector))
        if series:
            verdict.say("ok  ", f"{asked.whose} looks at", selector, f"{series} series")
        elif reason := _excuse(selector):
            verdict.say("----", f"{asked.whose} looks at", selector, f"nothing: {reason}")
        else:
            verdict.say("FAIL", f"{asked.whose} looks at", selector, "nothing")
    verdict.say("ok  ", asked.whose, asked.expr, f"TRUE for {len(found)} series" if found else "silent")


def _excuse(expr: str) -> str | None:
    return next((reason for name, reason in MAY_BE_EMPTY.items() if re.search(rf"\b{name}\b", expr)), None)


# --- counts


def counted(
    prometheus: Prometheus, selected: str, labels: tuple[str, ...], began: float, until: float
) -> Counter[tuple[str, ...]]:
    """How much a counter grew, exactly: the samples themselves, not the extrapolation of `increase()`.

    A process that starts within the window starts at zero; what it counted after its last scrape is lost.
    """
    growth: Counter[tuple[str, ...]] = Counter()
    length = int((until - began) * 1000)
    for series in prometheus.ask(f"{selected}[{length}ms]", at=until):
        values = [float(value) for _, value in series["values"]]
        last = prometheus.ask(_exactly(selected.partition("{")[0], series["metric"]) + "[5m]", at=began)
        before = float(last[0]["values"][-1][1]) if last else 0.0
        grown = 0.0
        for value in values:
            grown += value - before if value >= before else value
            before = value
        growth[tuple(series["metric"].get(label, "") for label in labels)] += round(grown)
    return Counter({key: value for key, value in growth.items() if value})


def _exactly(metric: str, labels: dict[str, str]) -> str:
    matchers = ",".join(f"{name}={json.dumps(value)}" for name, value in labels.items() if name != "__name__")
    return f"{metric}{{{matchers}}}"


_STEPS: Final = "SELECT type, count(*) FROM events WHERE ts > $1 AND ts <= $2 AND type = ANY($3) GROUP BY type"
_REPEATS: Final = """
SELECT payload_json ->> 'activity', payload_json ->> 'error_type', count(*) FROM events
WHERE ts > $1 AND ts <= $2 AND type = 'attempt_retried' GROUP BY 1, 2
"""


async def compare(
    prometheus: Prometheus, verdict: Verdict, database_url: str, namespace: str | None, began: float, tolerance: int
) -> None:
    """Orders started, closed by outcome, charged and refunded, and retries by activity and error."""
    until = time.time()
    # Of the one installation whose database it is: Prometheus may see others.
    where = f"{{namespace={json.dumps(namespace)}}}" if namespace else ""
    window = datetime.fromtimestamp(began, UTC), datetime.fromtimestamp(until, UTC)
    connection = await asyncpg.connect(database_url)
    try:
        steps = dict(await connection.fetch(_STEPS, *window, ["received", "charged", "refunded", *FINAL_STEPS]))
        repeats = {(row[0], row[1]): row[2] for row in await connection.fetch(_REPEATS, *window)}
    finally:
        await connection.close()

    def both(what: str, metric: str, measured: int, written: int) -> None:
        state = "ok  " if abs(measured - written) <= tolerance else "FAIL"
        verdict.say(state, f"count of {what}", metric, f"Prometheus {measured}, PostgreSQL {written}")

    started = counted(prometheus, counter(ORDERS_STARTED) + where, (), began, until)
    both("orders started", counter(ORDERS_STARTED), started.total(), steps.get("received", 0))
    closed = counted(prometheus, counter(ORDERS_CLOSED) + where, ("step",), began, until)
    for step in sorted(FINAL_STEPS):
        both(f"orders {step}", counter(ORDERS_CLOSED), closed[step,], steps.get(step, 0))
    paid = counted(prometheus, counter(PAYMENTS) + where, ("status",), began, until)
    for status, event in ((PaymentStatus.CHARGED, "charged"), (PaymentStatus.REFUNDED, "refunded")):
        both(f"payments {event}", counter(PAYMENTS), paid[status,], steps.get(event, 0))
    repeated = counted(prometheus, counter(RETRIES) + where, ("activity", "error_type"), began, until)
    for key in sorted(repeats.keys() | repeated.keys()):
        both(f"retries of {' after '.join(key)}", counter(RETRIES), repeated[key], repeats.get(key, 0))


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m tests.queries", description=__doc__.split("\n")[0])
    parser.add_argument("--prometheus", required=True, metavar="URL")
    parser.add_argument("--window", default="10m", help="what $__rate_interval stands for [10m]")
    parser.add_argument("--no-server", action="store_true", help="the Temporal server is not scraped")
    parser.add_argument("--no-collector", action="store_true", help="no collector makes metrics of spans")
    parser.add_argument("--no-rules", action="store_true", help="the rules are not loaded")
    parser.add_argument("--database-url", metavar="URL", help="compare counts with this PostgreSQL")
    parser.add_argument("--namespace", help="count what is in this namespace of Kubernetes, which has that PostgreSQL")
    parser.add_argument(
        "--since", type=float, default=15, metavar="MINUTES", help="compare the last so many minutes [15]"
    )
    parser.add_argument("--tolerance", type=int, default=0, help="how far counts may be apart [0]")
    arguments = parser.parse_args()
    prometheus, verdict = Prometheus(arguments.prometheus), Verdict()
    left_out = {
        reason: names
        for reason, names, wanted in (
            ("the Temporal server is not scraped", NEEDS_SERVER, arguments.no_server),
            ("no collector", NEEDS_COLLECTOR, arguments.no_collector),
            ("the rules are not loaded", re.compile(r"^trellis:|[( ]trellis:"), arguments.no_rules),
        )
        if wanted
    }
    if not arguments.no_rules and not prometheus.has_rules():
        verdict.say("FAIL", "rules", "", "not loaded; --no-rules if that is meant")
    for broken in prometheus.broken_rules():
        verdict.say("FAIL", "rules", "", broken)
    for asked in dict.fromkeys([*panel_queries(prometheus, arguments.window), *rule_queries()]):
        check(prometheus, verdict, asked, left_out)
    if arguments.database_url:
        began = time.time() - arguments.since * 60
        database_url, namespace = arguments.database_url, arguments.namespace
        asyncio.run(compare(prometheus, verdict, database_url, namespace, began, arguments.tolerance))
    print(f"\n{verdict.asked} asked, {verdict.excused} excused, {verdict.failed} failed")  # noqa: T201
    return 1 if verdict.failed else 0


if __name__ == "__main__":
    sys.exit(main())
