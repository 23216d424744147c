"""JSON schemas for kubeconform from the custom resource definitions of other projects: `crds.py OUT YAML…`.

Strict as the API server is not: a field that the definition does not know is an error here, and would be dropped there.
Read by the Python beside kubeconform, which needs PyYAML.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import yaml


def strict(schema: Any) -> Any:
    """The same schema in the words of JSON Schema, closed to unknown fields."""
    if isinstance(schema, list):
        return [strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: strict(value) for key, value in schema.items() if not key.startswith("x-kubernetes-")}
    if schema.get("x-kubernetes-int-or-string"):
        closed["type"] = ["integer", "string"]
        closed.pop("anyOf", None)
    if isinstance(schema.get("properties"), dict):
        closed["properties"] = {name: strict(value) for name, value in schema["properties"].items()}
        if "additionalProperties" not in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
            closed["additionalProperties"] = False
    return closed


def main() -> None:
    """Write `{kind}_{version}.json` for every version of every definition."""
    out = Path(sys.argv[1])
    for file in sys.argv[2:]:
        for definition in yaml.safe_load_all(Path(file).read_text()):
            kind = definition["spec"]["names"]["kind"].lower()
            for version in definition["spec"]["versions"]:
                schema = strict(version["schema"]["openAPIV3Schema"])
                # Served by the API server for every kind, whether or not the definition says so.
                schema["properties"] |= {name: {"type": "string"} for name in ("apiVersion", "kind")}
                schema["properties"]["metadata"] = {"type": "object"}
                (out / f"{kind}_{version['name']}.json").write_text(json.dumps(schema))


main()
