"""The documents say what the code says. `UPDATE_DOCS=1 pytest tests/test_docs.py` writes the generated tables anew."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import SecretStr
from pydantic.fields import FieldInfo

from app.domain.steps import NEXT_STEPS, Step
from app.http.problems import codes
from app.order.models import OTHER_EVENTS, STEP_EVENTS
from app.settings import Settings, variable

ROOT = Path(__file__).parent.parent


def _default(field: FieldInfo) -> str:
    value = field.default.get_secret_value() if isinstance(field.default, SecretStr) else field.default
    return "-" if value is None else f"`{value}`"


def _configuration() -> str:
    lines = ["| variable | default | meaning |", "|---|---|---|"]
    for name, field in Settings.model_fields.items():
        lines.append(f"| `{variable(name)}` | {_default(field)} | {field.description} |")
    return "\n".join(lines)


def _codes() -> str:
    lines = ["| code | status | meaning |", "|---|---|---|"]
    lines += [f"| `{code}` | {status} | {meaning} |" for code, (status, meaning) in codes().items()]
    return "\n".join(lines)


def _events() -> str:
    lines = ["| type | payload |", "|---|---|"]
    lines += [f"| `{name}` | {payload or 'nothing'} |" for name, payload in (STEP_EVENTS | OTHER_EVENTS).items()]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("document", "name", "table"),
    [
        ("docs/configuration.md", "", _configuration),
        ("docs/api.md", ": codes", _codes),
        ("docs/api.md", ": events", _events),
    ],
)
def test_generated_tables_are_those_of_the_code(document: str, name: str, table: Callable[[], str]) -> None:
    path = ROOT / document
    text = path.read_text()
    begin, end = f"<!-- begin generated{name} -->\n", f"<!-- end generated{name} -->"
    before, found, rest = text.partition(begin)
    assert found, f"{document} has no {begin}"
    _, _, after = rest.partition(end)
    fresh = f"{before}{begin}{table()}\n{end}{after}"
    if os.environ.get("UPDATE_DOCS"):
        path.write_text(fresh)
    assert text == fresh, f"{document} is stale: UPDATE_DOCS=1 pytest tests/test_docs.py"


def test_every_step_has_an_event() -> None:
    assert set(STEP_EVENTS) == set(Step)


def test_every_setting_is_described() -> None:
    assert [name for name, field in Settings.model_fields.items() if not field.description] == []


def test_state_diagram_has_exactly_the_moves_of_the_code() -> None:
    drawn = set(re.findall(r"^    (\w+) --> (\w+)", (ROOT / "docs/order-states.md").read_text(), re.MULTILINE))
    assert drawn == {(left, entered) for left, following in NEXT_STEPS.items() for entered in following}


def test_every_link_between_documents_leads_somewhere() -> None:
    documents = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]
    links = [
        (document, target)
        for document in documents
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", document.read_text())
    ]
    assert [f"{source.name}: {target}" for source, target in links if not (source.parent / target).exists()] == []
