"""Dashboards, rules and runbooks: fresh, complete, and about metrics that exist.

Grafana itself is not started here. The dashboards are built with Grafana's own types, and the rules of its dashboard
linter are restated below; that every query has an answer is shown by `python -m tests.queries`.
"""

from __future__ import annotations

import itertools
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import REGISTRY as DEFAULT_REGISTRY
from prometheus_client import Counter

from dashboards.src import FOLDER, dashboards, names
from dashboards.src.board import OURS
from tests.queries import all_panels, substitute

ROOT = Path(__file__).parents[1]
RULES = sorted((ROOT / "charts/trellis/rules").glob("*.yaml"))
RULE_TESTS = sorted((ROOT / "tests/rules").glob("*.yaml"))
RUNBOOKS = ROOT / "docs/runbooks"

BOARDS: dict[str, dict[str, Any]] = {name: json.loads(text) for name, text in dashboards().items()}
PANELS = [
    pytest.param(panel, id=f"{name}: {panel['title']}") for name, each in BOARDS.items() for panel in all_panels(each)
]

#: Published by Prometheus itself, or by kube-state-metrics, which Trellis does not bring along.
FOREIGN = {"up", "ALERTS", "kube_job_status_failed", "kube_job_status_start_time"}


def _rules(path: Path) -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(path.read_text())["groups"] for rule in group["rules"]]


ALERTS = {path: rule for path in RULES for rule in _rules(path) if "alert" in rule}
RECORDED = {rule["record"] for path in RULES for rule in _rules(path) if "record" in rule}


# --- names

#: Words of PromQL that are no metrics, as far as they are used here.
PROMQL = (
    {"sum", "max", "min", "avg", "count", "rate", "increase", "histogram_quantile", "by", "on", "or", "and", "unless"}
    | {"absent", "offset", "vector", "time", "max_over_time", "ignoring"}
)  # fmt: skip


def metrics_of(expr: str) -> set[str]:
    """The metrics that a query names."""
    bare = re.sub(r"\$\w+|\"[^\"]*\"", "", expr)
    bare = re.sub(r"\{[^}]*\}|\[[^\]]*\]|\b(by|on|ignoring)\s*\([^)]*\)|\boffset\s+\w+", " ", bare)
    return set(re.findall(r"(?<![\w.])[a-zA-Z_:][\w:]*", bare)) - PROMQL


def known_metrics() -> dict[str, str]:
    """Everything that is published, with its type."""
    scraped = [names.scraped(which) for which in ("temporal-sdk", "temporal-server", "collector")]
    return dict(itertools.chain(names.ours().items(), *(each.items() for each in scraped)))


def test_the_names_are_found_in_a_query() -> None:
    expr = 'sum by (a, le) (rate(x_total{b="y_total",c=~"$d"}[$__rate_interval])) / (t:u:v5m > 0) unless z offset 15m'
    assert metrics_of(expr) == {"x_total", "t:u:v5m", "z"}


@pytest.mark.parametrize("panel", PANELS)
def test_every_metric_of_a_panel_exists(panel: dict[str, Any]) -> None:
    used = set().union(*(metrics_of(target["expr"]) for target in panel["targets"]))
    assert used
    assert used - known_metrics().keys() - RECORDED - FOREIGN == set()


@pytest.mark.parametrize("path", RULES, ids=lambda path: path.stem)
def test_every_metric_of_a_rule_exists(path: Path) -> None:
    used = set().union(*(metrics_of(rule["expr"]) for rule in _rules(path)))
    assert used
    assert used - known_metrics().keys() - RECORDED - FOREIGN == set()


def test_a_renamed_metric_breaks_the_build() -> None:
    renamed = Counter("trellis_orders_begun_total", "", registry=None)
    assert names.counter(renamed) == "trellis_orders_begun_total"
    with pytest.raises(LookupError, match="trellis_orders_lost is not in"):
        names.gauge("trellis_orders_lost")
    assert "trellis_orders_started_total" not in {f.name for f in DEFAULT_REGISTRY.collect()}


# --- dashboards


def test_the_json_is_fresh() -> None:
    kept = {path.name: path.read_text() for path in FOLDER.glob("*.json")}
    assert kept == dashboards(), "stale: python -m dashboards.src"


def test_there_are_three_with_addresses_that_stay() -> None:
    assert {each["uid"]: each["title"] for each in BOARDS.values()} == {
        "trellis-orders": "Trellis / Orders",
        "trellis-workflows": "Trellis / Workflows and workers",
        "trellis-api": "Trellis / API and database",
    }


@pytest.mark.parametrize("board", BOARDS.values(), ids=BOARDS)
def test_a_dashboard_keeps_the_rules_of_the_linter(board: dict[str, Any]) -> None:
    variables = {each["name"]: each for each in board["templating"]["list"]}
    assert [each["name"] for each in variables.values() if each["type"] == "datasource"] == ["datasource"]
    assert variables["datasource"]["query"] == "prometheus"
    for name in ("job", "instance", "namespace", "release", "queue"):
        assert variables[name]["multi"]
        assert variables[name]["includeAll"]
        assert variables[name]["datasource"]["uid"] == "${datasource}"
    # Where the linter wants `.+`: see `dashboards.src.board`.
    assert "allValue" not in variables["job"]
    assert board["editable"] is False
    assert board.get("id") is None
    assert board["description"]
    titles = [panel["title"] for panel in all_panels(board)]
    assert len(titles) == len(set(titles))
    ids = [panel["id"] for panel in board["panels"]]
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize("panel", PANELS)
def test_a_panel_keeps_the_rules_of_the_linter(panel: dict[str, Any]) -> None:
    assert panel["title"]
    assert panel["description"].endswith(".")
    assert panel["fieldConfig"]["defaults"]["unit"]
    assert panel["datasource"]["uid"] == "${datasource}"
    for target in panel["targets"]:
        assert target["datasource"]["uid"] == "${datasource}"
        assert target["legendFormat"]
        assert "$__interval" not in target["expr"]
    refs = [target["refId"] for target in panel["targets"]]
    assert len(refs) == len(set(refs))


@pytest.mark.parametrize("panel", PANELS)
def test_counters_are_rated_over_the_right_interval(panel: dict[str, Any]) -> None:
    for target in panel["targets"]:
        expr, kinds = target["expr"], known_metrics()
        for metric in metrics_of(expr) & kinds.keys():
            for found in re.finditer(rf"(\w+)\(\s*{metric}\{{[^}}]*\}}(\[[^]]*\])?", expr):
                function, interval = found.groups()
                counts = kinds[metric] in {"counter", "histogram"}
                assert (function == "rate") is counts, f"{metric}: {function}"
                assert interval == ("[$__rate_interval]" if counts else None), metric


@pytest.mark.parametrize("panel", PANELS)
def test_what_is_ours_is_selected_by_job_and_instance(panel: dict[str, Any]) -> None:
    mine = names.ours().keys() | names.scraped("temporal-sdk").keys()
    for target in panel["targets"]:
        for metric in metrics_of(target["expr"]) & mine:
            selectors = re.findall(rf"\b{metric}(\{{[^}}]*\}})", target["expr"])
            assert selectors
            assert all(OURS in selector for selector in selectors)


@pytest.mark.parametrize("board", BOARDS.values(), ids=BOARDS)
def test_every_variable_in_use_is_defined(board: dict[str, Any]) -> None:
    defined = {each["name"]: "" for each in board["templating"]["list"]}
    texts = [target["expr"] for panel in all_panels(board) for target in panel["targets"]]
    texts += [link["url"] for panel in all_panels(board) for link in panel.get("links", [])]
    assert [text for text in texts if "$" in substitute(text, defined, "1m")] == []


def test_links_lead_to_runbooks_that_exist() -> None:
    links = [link["url"] for each in BOARDS.values() for panel in all_panels(each) for link in panel.get("links", [])]
    named = {url.removeprefix("${runbooks}/") for url in links}
    assert len(named) >= 10
    assert {name for name in named if not (RUNBOOKS / name).exists()} == set()


def test_exemplars_lead_to_traces() -> None:
    exemplars = {
        t["expr"] for each in BOARDS.values() for panel in all_panels(each) for t in panel["targets"] if t["exemplar"]
    }
    assert any("trellis_step_duration_seconds_bucket" in expr for expr in exemplars)
    sources = {
        each["uid"]: each
        for each in yaml.safe_load((ROOT / "compose/grafana/datasources.yaml").read_text())["datasources"]
    }
    [destination] = sources["prometheus"]["jsonData"]["exemplarTraceIdDestinations"]
    assert destination == {"name": "trace_id", "datasourceUid": "jaeger"}
    assert sources["jaeger"]["type"] == "jaeger"


# --- rules and runbooks


def test_one_file_per_alert_named_for_it() -> None:
    assert {path.stem for path in ALERTS} == {rule["alert"] for rule in ALERTS.values()}
    assert len(ALERTS) == 17
    assert {path.stem for path in RULES} - {path.stem for path in ALERTS} == {"TrellisRecorded"}


@pytest.mark.parametrize("path", ALERTS, ids=lambda path: path.stem)
def test_an_alert_says_what_how_bad_and_what_to_do(path: Path) -> None:
    rule = ALERTS[path]
    assert rule["labels"]["severity"] in {"critical", "warning"}
    assert rule["annotations"].keys() == {"summary", "description", "runbook"}
    assert rule["annotations"]["runbook"] == f"docs/runbooks/{path.stem}.md"
    runbook = (ROOT / rule["annotations"]["runbook"]).read_text()
    assert re.findall(r"^#+ .*$", runbook, re.MULTILINE) == [
        f"# {path.stem}",
        "## Meaning",
        "## Impact",
        "## Diagnosis",
        "## Mitigation",
    ]
    assert "```console\n$ " in runbook.partition("## Diagnosis")[2].partition("## Mitigation")[0]


def test_every_runbook_has_its_alert() -> None:
    assert {path.stem for path in RUNBOOKS.glob("*.md")} - {"README"} == {path.stem for path in ALERTS}
    assert set(re.findall(r"\((\w+)\.md\)", (RUNBOOKS / "README.md").read_text())) == {path.stem for path in ALERTS}


def test_the_metrics_of_the_runbooks_exist() -> None:
    for path in RUNBOOKS.glob("*.md"):
        for expr in re.findall(r"promtool query instant \"\$PROMETHEUS\" '([^']*)'", path.read_text()):
            assert metrics_of(expr) - known_metrics().keys() - FOREIGN == set(), path


@pytest.mark.parametrize("path", ALERTS, ids=lambda path: path.stem)
def test_every_alert_is_tested_firing_and_silent(path: Path) -> None:
    cases = yaml.safe_load((ROOT / "tests/rules" / path.name).read_text())["tests"]
    fires = [bool(test["exp_alerts"]) for case in cases for test in case["alert_rule_test"]]
    assert any(fires)
    assert not all(fires)
    assert [case["name"].partition(" - ")[0] for case in cases] == ["fires" if each else "silent" for each in fires]


promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="needs promtool, which comes with Prometheus")


@promtool
def test_the_rules_are_rules() -> None:
    _promtool("check", "rules", *RULES)


@promtool
@pytest.mark.parametrize("path", RULE_TESTS, ids=lambda path: path.stem)
def test_the_alerts_fire_when_they_should(path: Path) -> None:
    _promtool("test", "rules", path)


def _promtool(*arguments: str | Path) -> None:
    run = subprocess.run(["promtool", *map(str, arguments)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr


# --- where they are used


def test_kustomize_takes_every_file() -> None:
    for folder, pattern in (("rules", "*.yaml"), ("dashboards", "*.json")):
        where = ROOT / "charts/trellis" / folder
        listed = yaml.safe_load((where / "Kustomization").read_text())["configMapGenerator"]
        files = [name for generator in listed for name in generator["files"]]
        assert sorted(files) == sorted(path.name for path in where.glob(pattern))


# --- in the chart, for one release among others

chart = pytest.mark.skipif(shutil.which("helm") is None, reason="needs helm, which renders the chart")
#: Installations of one cluster, as (namespace, release, name): two in one namespace, one of them renamed.
INSTALLED = [("shop", "trellis", "trellis"), ("shop", "staging", "orders"), ("prod", "trellis", "trellis")]


def _rendered(template: str, namespace: str, release: str, name: str, *more: str) -> list[dict[str, Any]]:
    values = (
        f"sandbox.enabled=true,metrics.prometheusRule.enabled=true,metrics.dashboards.enabled=true,nameOverride={name}"
    )
    arguments = ["--namespace", namespace, "--set", values, *more, "--show-only", f"templates/monitoring/{template}"]
    command = ["helm", "template", release, str(ROOT / "charts/trellis"), *arguments]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return [each for each in yaml.safe_load_all(run.stdout) if each]


def _selectors(expr: str) -> list[str]:
    """What a query selects by, of each metric in it; empty where it takes all."""
    bare = re.sub(r"\b(by|on|ignoring)\s*\([^)]*\)", " ", expr)
    names = "|".join(re.escape(name) for name in sorted(metrics_of(expr), key=len, reverse=True))
    return [found[1] or "" for found in re.finditer(rf"(?<![\w:\"])(?:{names})(\{{[^}}]*\}})?", bare)]


@chart
@pytest.mark.parametrize(("namespace", "release", "name"), INSTALLED)
def test_every_query_of_the_chart_is_about_its_release(namespace: str, release: str, name: str) -> None:
    [rules] = _rendered("prometheusrule.yaml", namespace, release, name)
    exprs = [rule["expr"] for group in rules["spec"]["groups"] for rule in group["rules"]]
    for config_map in _rendered("dashboards.yaml", namespace, release, name):
        [text] = config_map["data"].values()
        exprs += [target["expr"] for panel in all_panels(json.loads(text)) for target in panel["targets"]]
    assert len(exprs) > 80
    spans_and_jobs = ("traces_span_metrics", "kube_job")
    for expr in exprs:
        selectors = _selectors(expr)
        assert selectors, expr
        for selector in selectors:
            assert f'namespace="{namespace}"' in selector, expr
            if not any(word in expr for word in spans_and_jobs):
                assert f'app_kubernetes_io_instance="{release}"' in selector, expr


@chart
def test_dashboards_of_two_releases_are_two() -> None:
    boards = [each for one in INSTALLED for each in _rendered("dashboards.yaml", *one)]
    texts = [text for each in boards for text in each["data"].values()]
    assert len({name for each in boards for name in each["data"]}) == len(boards) == 9
    assert len({json.loads(text)["uid"] for text in texts}) == 9
    assert all(len(json.loads(text)["uid"]) <= 40 for text in texts)


@chart
def test_a_temporal_of_others_is_told_by_its_own_namespace() -> None:
    external = ["--set", "temporal.enabled=false,temporalClient.address=t:7233,temporalClient.namespace=orders.a1b2c"]
    [rules] = _rendered("prometheusrule.yaml", "shop", "trellis", "trellis", *external)
    [rule] = [group["rules"][0] for group in rules["spec"]["groups"] if group["name"] == "TrellisBacklogAge"]
    assert set(_selectors(rule["expr"])) == {
        '{namespace="orders.a1b2c",taskqueue=~"default|shipping_tq"}',
        '{exported_namespace="orders.a1b2c",taskqueue=~"default|shipping_tq"}',
    }


def _series(namespace: str, release: str, name: str, *, alive: bool) -> list[dict[str, str]]:
    """What Prometheus has of an installation; a dead one died after five minutes."""
    labels = f'namespace="{namespace}",app_kubernetes_io_instance="{release}",job="{name}"'
    worker = 'task_queue="default",poller_type="workflow_task",service_name="temporal-core-sdk"'
    poller = f"temporal_num_pollers{{{labels},{worker}}}"
    values = "1x30" if alive else "1x5 stale"
    return [
        {"series": each, "values": values} for each in (f"up{{{labels}}}", f"trellis_orders_open{{{labels}}}", poller)
    ]


@chart
@promtool
@pytest.mark.parametrize("dead", [0, 1, 2])
def test_the_health_of_one_release_hides_no_other(dead: int, tmp_path: Path) -> None:
    """Each watches itself alone: of three, the alerts of the dead one fire, and those of the others are silent."""
    series = [each for n, one in enumerate(INSTALLED) for each in _series(*one, alive=n != dead)]
    # Of a program that is not ours, and whose Job is named alike.
    for metric, value in (("kube_job_status_failed", "1x30"), ("kube_job_status_start_time", "60x30")):
        series.append({"series": f'{metric}{{namespace="shop",job_name="security-audit-29"}}', "values": value})
    for number, (namespace, release, name) in enumerate(INSTALLED):
        [rules] = _rendered("prometheusrule.yaml", namespace, release, name)
        (tmp_path / "rules.yaml").write_text(yaml.safe_dump(rules["spec"]))
        tests = []
        for alert in ("TrellisTargetDown", "TrellisNoPollers", "TrellisAuditFailed"):
            fires = number == dead and alert != "TrellisAuditFailed"
            tests.append({"expr": f'count(ALERTS{{alertname="{alert}",alertstate="firing"}})', "eval_time": "20m"})
            tests[-1]["exp_samples"] = [{"labels": "{}", "value": 2}] if fires else []
        case = {"interval": "1m", "input_series": series, "promql_expr_test": tests}
        (tmp_path / "test.yaml").write_text(yaml.safe_dump({"rule_files": ["rules.yaml"], "tests": [case]}))
        _promtool("test", "rules", tmp_path / "test.yaml")
