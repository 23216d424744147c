"""Has a real API server look at what the chart renders, without keeping it, as `kubectl apply --server-side` does.

    python apply.py CHART NAMESPACE

Every values file, and every value that the schema lists where Kubernetes has a say. Server-side apply refuses what
others let through, such as a name that is twice in a list. Left out are resources whose API the cluster does not have.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
SANDBOX = "sandbox.enabled=true"
OPEN = "api.exposure.tls=none,api.exposure.authentication=none,networkPolicy.apiFrom[0].ipBlock.cidr=10.0.0.0/8"
INGRESS = (
    f"{OPEN},api.ingress.enabled=true,api.ingress.hosts[0].host=a.example.com,api.ingress.hosts[0].paths[0].path=/"
)

#: Values that are chosen from a list, or are written in several ways.
CHOICES = [
    *(f"{where}.strategy.type={kind}" for where in ("api", "workerDefaults") for kind in ("Recreate", "RollingUpdate")),
    *(f"{where}.strategy.rollingUpdate.maxSurge=25%" for where in ("api", "workerDefaults")),
    *(f"api.pdb.maxUnavailable={many}" for many in ("1", "50%")),
    *(f"api.service.type={kind},{OPEN}" for kind in ("ClusterIP", "NodePort", "LoadBalancer")),
    *(f"global.ipFamilyPolicy={policy}" for policy in ("", "SingleStack", "PreferDualStack")),
    "global.ipFamilyPolicy=SingleStack,global.ipFamilies={IPv4}",
    *(
        f"{INGRESS},api.ingress.hosts[0].paths[0].pathType={kind}"
        for kind in ("Prefix", "Exact", "ImplementationSpecific")
    ),
    *(
        f"image.pullPolicy={policy},postgresql.image.pullPolicy={policy},temporal.server.image.pullPolicy={policy}"
        for policy in ("Always", "IfNotPresent", "Never")
    ),
    *(
        f"{where}.dnsPolicy={policy},{where}.dnsConfig.nameservers={{10.0.0.10}}"
        for where in ("podDefaults", "postgresql", "temporal")
        for policy in ("ClusterFirst", "ClusterFirstWithHostNet", "Default", "None")
    ),
    *(f"temporal.services.mode={mode}" for mode in ("single", "split")),
    "jobs.ttlSecondsAfterFinished=null,temporal.jobs.ttlSecondsAfterFinished=null",
    "temporal.server.extraEnv[0].name=LOG_LEVEL,temporal.server.extraEnv[0].value=debug",
    "temporal.ui.extraEnv[0].name=TEMPORAL_ADDRESS,temporal.ui.extraEnv[0].value=elsewhere:7233",
    "global.trellis.arbitraryIds=true",
    "global.imagePullSecrets[0].name=one",
]


def cases(chart: Path) -> dict[str, list[str]]:
    """Arguments of Helm, by a name."""
    external = ["--values", f"{chart}/values-external.yaml"]
    development = ["--values", f"{chart}/values-dev.yaml"]
    files = {
        "values.yaml": ["--set", SANDBOX],
        "values-dev.yaml": development,
        "values-dev-reload.yaml": [*development, "--values", f"{chart}/values-dev-reload.yaml"],
        "values-external.yaml": external,
        "values-production.yaml": ["--values", f"{chart}/values-production.yaml", *external],
        "values-everything.yaml": ["--values", f"{HERE}/values-everything.yaml"],
    }
    return files | {choice: ["--set", f"{SANDBOX},{choice}"] for choice in CHOICES}


def render(chart: Path, arguments: list[str]) -> list[str]:
    """The resources, each as text."""
    command = ["helm", "template", "trellis", str(chart), "--no-hooks", *arguments]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        sys.exit(f"{' '.join(command)}: {run.stderr}")
    return [text for text in run.stdout.split("\n---\n") if yaml.safe_load(text)]


def refused(texts: list[str], namespace: str, served: set[str]) -> str:
    """What the API server says against it."""
    known = [text for text in texts if _version(text) in served]
    command = ["kubectl", "--namespace", namespace, "apply", "--server-side", "--dry-run=server", "--filename", "-"]
    run = subprocess.run(command, input="\n---\n".join(known), capture_output=True, text=True, check=False)
    return run.stderr if run.returncode else ""


def _version(text: str) -> str:
    resource: dict[str, str] = yaml.safe_load(text)
    return resource["apiVersion"]


def main() -> int:
    """How many are refused."""
    chart, namespace = Path(sys.argv[1]), sys.argv[2]
    listed: Any = subprocess.run(["kubectl", "api-versions"], capture_output=True, text=True, check=True)
    served = set(listed.stdout.split())
    plain: set[str] = set()
    wrong = 0
    for name, arguments in cases(chart).items():
        # Of a choice, what it changes.
        texts = [text for text in render(chart, arguments) if text not in plain]
        plain = plain or set(texts)
        if said := texts and refused(texts, namespace, served):
            wrong += 1
            print(f"{name}: {said}")  # noqa: T201
    print(f"cluster: applied by the server: {len(cases(chart))} sets of values, {wrong} refused")  # noqa: T201
    return wrong


sys.exit(main())
