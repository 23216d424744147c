"""The documents say what the code says. `UPDATE_DOCS=1 pytest tests/test_docs.py` writes the generated tables anew."""

from __future__ import annotations

import os
import re
from pathlib import Path

from pydantic import SecretStr
from pydantic.fields import FieldInfo

from app.settings import Settings, variable
from app.steps import NEXT_STEPS

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- begin generated -->", "<!-- end generated -->"


def _default(field: FieldInfo) -> str:
    value = field.default.get_secret_value() if isinstance(field.default, SecretStr) else field.default
    return "-" if value is None else f"`{value}`"


def _configuration() -> str:
    lines = ["| variable | default | meaning |", "|---|---|---|"]
    for name, field in Settings.model_fields.items():
        lines.append(f"| `{variable(name)}` | {_default(field)} | {field.description} |")
    return "\n".join(lines)


def test_configuration_table_is_that_of_the_settings() -> None:
    path = ROOT / "docs/configuration.md"
    text = path.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    fresh = f"{before}{BEGIN}\n{_configuration()}\n{END}{after}"
    if os.environ.get("UPDATE_DOCS"):
        path.write_text(fresh)
    assert text == fresh, "docs/configuration.md is stale: UPDATE_DOCS=1 pytest tests/test_docs.py"


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
