"""What `helm upgrade --reuse-values` does, which takes all values of an earlier chart for the defaults of the new one.

    python reuse_values.py CHART [EARLIER_CHART]

Each map of the chart's values is left out once, and all that the earlier chart did not have at once. The chart must
render without it, or name it.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

_PRINT = "{{- toYaml .Values | nindent 0 }}\n"
_ARGUMENTS = ["--set", "sandbox.enabled=true"]


def maps(values: dict[str, Any], *above: str) -> list[tuple[str, ...]]:
    """The paths of all maps in it."""
    found = [(*above, key) for key, value in values.items() if isinstance(value, dict) and value]
    return found + [path for one in found for path in maps(values[one[-1]], *one)]


def without(values: dict[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
    """A copy that lacks one."""
    first, *rest = path
    if rest:
        return values | {first: without(values[first], tuple(rest))}
    return {key: value for key, value in values.items() if key != first}


def render(chart: Path, values: str, *arguments: str) -> str:
    """What is wrong, which may be nothing."""
    (chart / "values.yaml").write_text(values)
    command = ["helm", "template", "trellis", str(chart), *_ARGUMENTS, *arguments]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    in_words = "is missing, as after an upgrade" in run.stderr or "these values do not work" in run.stderr
    return "" if run.returncode == 0 or in_words else run.stderr


def computed(chart: Path) -> str:
    """The values of a chart with those of its subcharts, as Helm stores them."""
    (chart / "templates" / "everything.yaml").write_text(_PRINT)
    command = ["helm", "template", "trellis", str(chart), "--show-only", "templates/everything.yaml"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def main() -> int:
    """How many are neither named nor done without."""
    wrong = {}
    with tempfile.TemporaryDirectory() as folder:
        charts = [Path(folder, str(number)) for number, _ in enumerate(sys.argv[1:])]
        for source, copy in zip(sys.argv[1:], charts, strict=True):
            shutil.copytree(source, copy)
        values = yaml.safe_load((charts[0] / "values.yaml").read_text())
        paths = maps(values)
        for path in paths:
            wrong["without " + ".".join(path)] = render(charts[0], yaml.safe_dump(without(values, path)))
        for earlier in charts[1:]:
            wrong["after the earlier chart"] = render(charts[0], computed(earlier))
    wrong = {what: fault for what, fault in wrong.items() if fault}
    said = "\n".join(f"{what}: {fault}" for what, fault in wrong.items())
    print(said or f"cluster: {len(paths)} maps of values, each named or done without")  # noqa: T201
    return len(wrong)


sys.exit(main())
