"""The documents say what the code says. `UPDATE_DOCS=1 pytest tests/test_docs.py` writes the generated tables anew."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import typer
from pydantic import SecretStr
from pydantic.fields import FieldInfo
from typer.core import TyperGroup

from app.cli.client import ExitCode
from app.cli.main import app as cli
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


def _leaves(group: TyperGroup, *names: str) -> Iterator[tuple[str, str]]:
    """Each command, and what its `--help` says."""
    for name, command in group.commands.items():
        if isinstance(command, TyperGroup):
            yield from _leaves(command, *names, name)
        else:
            yield " ".join([*names, name]), " ".join(f"{command.help} {command.epilog or ''}".split())


def _ends() -> dict[str, str]:
    """What the `--help` of each command says of its exit codes."""
    root = typer.main.get_command(cli)
    assert isinstance(root, TyperGroup)
    return {name: text.partition("Exit codes: ")[2].removesuffix(".") for name, text in _leaves(root)}


def _exit_codes() -> str:
    commands: dict[str, list[str]] = {}
    for name, ends in _ends().items():
        commands.setdefault(ends, []).append(f"`{name}`")
    lines = ["| command | exit codes |", "|---|---|"]
    lines += [f"| {', '.join(names)} | {ends} |" for ends, names in commands.items()]
    return "\n".join(lines)


def _numbers(ends: str) -> list[int]:
    return [int(number) for number in re.findall(r"(?:^|; )(\d+) ", ends)]


def test_every_command_says_how_it_ends() -> None:
    numbers = {name: _numbers(ends) for name, ends in _ends().items()}
    known = {int(code) for code in ExitCode} | {128 + signal.SIGINT, 128 + signal.SIGTERM}
    assert {name: codes for name, codes in numbers.items() if not {0, 2, 4} <= set(codes) <= known} == {}
    assert all(codes == sorted(set(codes)) for codes in numbers.values())


@pytest.mark.parametrize(("command", "heading"), [("audit", "Look"), ("reconcile", "Repair")])
def test_exit_codes_of_a_section_are_those_of_its_command(command: str, heading: str) -> None:
    text = (ROOT / "docs/reliability.md").read_text()
    section = text.partition(f"\n## {heading}: ")[2].partition("\n## ")[0]
    rows = section.partition("| exit code | meaning |\n|---|---|\n")[2].partition("\n\n")[0]
    assert [int(row.split("|")[1]) for row in rows.splitlines()] == _numbers(_ends()[command])


@pytest.mark.parametrize(
    ("document", "name", "table"),
    [
        ("docs/operations.md", ": exit codes", _exit_codes),
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
