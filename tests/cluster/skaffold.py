"""What skaffold.yaml says, compared with its schema and with the files it names: `skaffold.py FILE OUT [SCHEMA]`.

Writes `{profile}.values`: the values files that skaffold would hand to helm, one a line.
"""

from __future__ import annotations

import copy
import json
import re
import sys
from pathlib import Path
from typing import Any

import jsonschema
import yaml


def with_profile(config: dict[str, Any], name: str) -> dict[str, Any]:
    """The configuration with the patches of a profile, as skaffold applies them."""
    config = copy.deepcopy(config)
    [profile] = [each for each in config.get("profiles", []) if each["name"] == name]
    for patch in profile.get("patches", []):
        assert patch["op"] == "add", "only what is added is understood here"
        *way, last = patch["path"].strip("/").split("/")
        place: Any = config
        for key in way:
            place = place[int(key) if isinstance(place, list) else key]
        if isinstance(place, list):
            place.insert(int(last), patch["value"])
        else:
            assert last not in place, f"{patch['path']} is there already"
            place[last] = patch["value"]
    return config


def check(config: dict[str, Any]) -> None:
    """Every file that is named exists, and every image is built here."""
    for artifact in config["build"]["artifacts"]:
        docker = artifact["docker"]
        assert f"AS {docker['target']}\n" in Path(docker["dockerfile"]).read_text(), f"no target {docker['target']}"
        for rule in artifact.get("sync", {}).get("manual", []):
            assert list(Path().glob(rule["src"])), f"nothing matches {rule['src']}"
    images = {artifact["image"] for artifact in config["build"]["artifacts"]}
    for release in config["deploy"]["helm"]["releases"]:
        for file in (release["chartPath"], *release["valuesFiles"]):
            assert Path(file).exists(), f"there is no {file}"
        for template in release["setValueTemplates"].values():
            used = re.findall(r"\.IMAGE_(?:REPO|TAG|DIGEST)_(\w+)", template)
            assert used, f"{template} names no image"
            assert set(used) <= images, f"{template} names an image that is not built"
    forwarded = {(each["resourceName"], each["port"], each["localPort"]) for each in config["portForward"]}
    assert ("trellis-api", 8000, 8000) in forwarded, f"the API is not forwarded: {forwarded}"


def main() -> None:
    """All of it, for every profile."""
    file, out, schema = sys.argv[1:]
    config = yaml.safe_load(Path(file).read_text())
    profiles = {"default": config} | {each["name"]: with_profile(config, each["name"]) for each in config["profiles"]}
    for name, profile in profiles.items():
        if schema:
            jsonschema.validate(profile, json.loads(Path(schema).read_text()))
        check(profile)
        [release] = profile["deploy"]["helm"]["releases"]
        # Skaffold 2.16 removes the file it makes of them before helm reads it, when it renders.
        assert "overrides" not in release, "put them into a values file"
        (Path(out) / f"{name}.values").write_text("".join(f"{file}\n" for file in release["valuesFiles"]))
    print(f"cluster: skaffold.yaml, {config['apiVersion']}: {', '.join(profiles)}")  # noqa: T201


main()
