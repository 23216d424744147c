"""The recipes of docs/extending.md, carried out word for word in a copy of the source."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from app.db.pool import SCHEMA_VERSION
from app.sandbox.app import create_sandbox
from app.sandbox.ledger import Ledger
from tests.conftest import Servers
from tests.support import serving

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"^```(python|diff)\n# (\S+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def recipe(title: str) -> list[tuple[str, str, str]]:
    """Kind, file and text of each block of a recipe."""
    text = (ROOT / "docs/extending.md").read_text()
    part = text.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    # The recipe is written for the newest migration of its time.
    newest = re.findall(r'^-SCHEMA_VERSION: Final = "(\d+)"$', part, re.MULTILINE)
    if newest:
        following = f"{int(SCHEMA_VERSION) + 1:04}"
        part = part.replace(f"{int(newest[0]) + 1:04}", "NEXT").replace(newest[0], SCHEMA_VERSION)
        part = part.replace("NEXT", following)
    return [(kind, file, text) for kind, file, text in BLOCK.findall(part)]


def changes(diff: str) -> Iterator[tuple[str, str]]:
    """What is replaced by what: the lines with `-`, by the lines with `+` that follow them."""
    for hunk in re.findall(r"((?:^-.*\n)+)((?:^\+.*\n)*)", diff, re.MULTILINE):
        removed, added = ("\n".join(line[1:] for line in part.splitlines()) for part in hunk)
        yield removed, added


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    folder = tmp_path / "copy"
    without = shutil.ignore_patterns("__pycache__")
    for name in ("app", "tests", "dashboards", "charts"):
        shutil.copytree(ROOT / name, folder / name, ignore=without)
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def carry_out(title: str, copy: Path) -> None:
    blocks = recipe(title)
    assert len(blocks) > 2
    for kind, file, text in blocks:
        path = copy / file
        if kind == "python":
            assert not path.exists(), f"{file} is there already"
            path.write_text(text)
            continue
        content = path.read_text()
        for removed, added in changes(text):
            assert content.count(removed) == 1, f"{file}: {removed!r} is there {content.count(removed)} times"
            content = content.replace(removed, added)
        path.write_text(content)


async def passes(copy: Path, *command: str, **environment: str) -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", *command),
        cwd=copy,
        env={**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1", **environment},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await process.communicate()
    assert process.returncode == 0, output.decode()


PYTEST: Any = ("pytest", "-q", "-p", "no:cacheprovider")


@pytest.mark.timeout(600)
async def test_a_payment_provider_is_added(copy: Path, database_url: str) -> None:
    carry_out("Add a payment provider", copy)
    async with Ledger(database_url) as ledger, serving(create_sandbox(ledger)) as url:
        contract = (*PYTEST, "tests/test_partner_contract.py", "-k", "payments or charge or provider or key")
        await passes(copy, *contract, "--gateway", "tests.acme:opened", ACME_URL=f"{url}/payments")


@pytest.mark.timeout(600)
async def test_a_step_is_added(copy: Path, servers: Servers) -> None:
    carry_out("Add a step", copy)
    tests = ("tests/test_screening.py", "tests/test_replay.py", "tests/test_repository.py")
    # The new way, the tables, and orders of before it: with each way past the step, and those of the release before.
    before = "recorded_history_replays and (approved_early or cancelled_in_review or local_steps or 31b9616)"
    await passes(
        copy,
        *(*PYTEST, *tests, "-k", f"screened or tables_are_the_same or {before}"),
        TRELLIS_TEST_DATABASE_URL=servers.admin_url,
        TRELLIS_TEST_TEMPORAL_ADDRESS=servers.temporal_address,
    )
