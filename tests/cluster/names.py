"""Renders the chart under names that Helm takes and Kubernetes may not, and twice in an umbrella chart.

    python names.py CHART

The umbrella has a PostgreSQL of its own. No two resources may have one name, every name must be one that Kubernetes
takes, and what one installation selects must not be there in the other.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

RELEASES = [
    "trellis",
    "shop",
    "trellis-v1.2",
    "trellis-v1-2",
    "2026-shop",
    "a-release-name-of-exactly-fifty-three-letters-aa-bb-1",
    "a-release-name-of-exactly-fifty-three-letters-aa-bb-2",
]
EVERYTHING = ["--set", "sandbox.enabled=true,metrics.serviceMonitor.enabled=true,metrics.prometheusRule.enabled=true"]
LABEL = re.compile(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?")
SERVERS = ["postgresql", "temporal"]


def render(release: str, chart: Path, *arguments: str) -> list[dict[str, Any]]:
    """What Helm makes of it."""
    command = ["helm", "template", release, str(chart), "--namespace", "test", *arguments]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        sys.exit(f"{' '.join(command)}: {run.stderr}")
    return [each for each in yaml.safe_load_all(run.stdout) if each]


def umbrella(folder: Path, chart: Path) -> Path:
    """Two aliases of the chart, and another chart called postgresql."""
    own = folder / "charts" / "postgresql"
    (own / "templates").mkdir(parents=True)
    (own / "Chart.yaml").write_text("{apiVersion: v2, name: postgresql, version: 1.0.0}\n")
    (own / "templates" / "_helpers.tpl").write_text(
        '{{- define "postgresql.fullname" -}}{{ .Release.Name }}-postgresql{{- end }}\n'
        '{{- define "postgresql.labels" -}}app: theirs{{- end }}\n'
    )
    (own / "templates" / "service.yaml").write_text(
        'apiVersion: v1\nkind: Service\nmetadata: {name: {{ include "postgresql.fullname" . }}}\n'
        "spec: {selector: {app.kubernetes.io/name: postgresql, app.kubernetes.io/instance: {{ .Release.Name }}}}\n"
    )
    (folder / "charts" / "trellis").symlink_to(chart.resolve())
    dependencies = [{"name": "trellis", "version": "*", "alias": alias} for alias in ("east", "west")]
    dependencies.append({"name": "postgresql", "version": "*"})
    values = {alias: {"sandbox": {"enabled": True}} for alias in ("east", "west")}
    about = {"apiVersion": "v2", "name": "umbrella", "version": "1.0.0", "dependencies": dependencies}
    (folder / "Chart.yaml").write_text(yaml.safe_dump(about))
    (folder / "values.yaml").write_text(yaml.safe_dump(values))
    return folder


def wrong_names(release: str, resources: list[dict[str, Any]]) -> list[str]:
    """Those that are there twice, or that Kubernetes does not take."""
    names = [f"{each['kind']} {each['metadata']['name']}" for each in resources]
    wrong = [f"{release}: {name} is there twice" for name in sorted({name for name in names if names.count(name) > 1})]
    wrong += [f"{release}: {name}" for name in names if not LABEL.fullmatch(name.split()[1])]
    # A pod's label has the name of its StatefulSet, a hyphen and a hash of ten.
    return wrong + [f"{release}: {name} is long" for name in names if name.startswith("Stateful") and len(name) > 64]


def pods(resources: list[dict[str, Any]]) -> dict[str, dict[str, str]]:
    """The labels of each kind of pod."""
    found = {}
    for each in resources:
        template = each.get("spec", {}).get("template")
        if template:
            found[each["metadata"]["name"]] = template["metadata"]["labels"]
    return found


def selected(resources: list[dict[str, Any]]) -> dict[str, set[str]]:
    """Which pods each Service and NetworkPolicy is for, and whom a policy lets in or out to."""
    by_name = pods(resources)

    def matching(selector: dict[str, Any]) -> set[str]:
        wanted = selector.get("matchLabels", {})
        return {name for name, labels in by_name.items() if wanted.items() <= labels.items()}

    found = {}
    for each in resources:
        kind, name, spec = each["kind"], each["metadata"]["name"], each.get("spec", {})
        if kind == "Service":
            found[f"{kind} {name}"] = matching({"matchLabels": spec["selector"]})
        elif kind == "NetworkPolicy":
            peers = [peer for rule in spec.get("ingress", []) for peer in rule.get("from", [])]
            peers += [peer for rule in spec.get("egress", []) for peer in rule.get("to", [])]
            selectors = [spec["podSelector"], *(p["podSelector"] for p in peers if "namespaceSelector" not in p)]
            found[f"{kind} {name}"] = set().union(*(matching(selector) for selector in selectors))
    return found


def main() -> int:
    """How many faults there are."""
    chart = Path(sys.argv[1])
    wrong: list[str] = []
    owners: dict[str, str] = {}
    for release in RELEASES:
        resources = render(release, chart, *EVERYTHING)
        wrong += wrong_names(release, resources)
        for name in {f"{each['kind']} {each['metadata']['name']}" for each in resources}:
            if owners.setdefault(name, release) != release:
                wrong.append(f"{release} and {owners[name]} both have {name}")
    with tempfile.TemporaryDirectory() as folder:
        resources = render("shop", umbrella(Path(folder), chart))
    wrong += wrong_names("umbrella", resources)
    for what, names in selected(resources).items():
        sides = {side for name in names for side in ("east", "west") if f"-{side}-" in name}
        mine = {side for side in ("east", "west") if f"-{side}-" in what}
        if sides - mine:
            wrong.append(f"umbrella: {what} selects {sorted(names)}")
    fine = f"cluster: {len(owners)} names of {len(RELEASES)} releases, {len(resources)} in an umbrella"
    print("\n".join(wrong) or fine)  # noqa: T201
    return len(wrong)


sys.exit(main())
