"""Failpoints: off, armed, and in the right places."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from app import failpoints
from app.errors import ServiceUnavailable
from app.failpoints import NAMES, Action, arm, reach

APP = Path(failpoints.__file__).parent

#: `locate` only reads. What `reconcile` changes goes through the activities and repositories of the others.
WITHOUT_EFFECT = {"locate", "reconcile"}


@pytest.fixture(autouse=True)
def disarmed() -> Iterator[None]:
    """Leave nothing armed behind."""
    yield
    arm(None)


def in_attempt(*names: str) -> str:
    """Reach failpoints one after the other, as one attempt would; where it broke off, and how."""

    async def attempt() -> str:
        for name in names:
            try:
                reach(name)
            except ServiceUnavailable as error:
                return f"{name}: {error.detail}"
        return "through"

    return asyncio.run(attempt())


def test_off_by_default() -> None:
    assert in_attempt(*NAMES) == "through"


def test_fail_breaks_off_where_it_is_named() -> None:
    arm("charge.before_gateway=fail")
    assert in_attempt("charge.before_claim", "charge.before_gateway") == (
        "charge.before_gateway: failpoint charge.before_gateway"
    )


def test_timeout_lets_the_work_be_done_first() -> None:
    arm("charge.before_gateway=timeout")
    assert in_attempt("charge.before_gateway", "charge.after_gateway") == (
        "charge.after_gateway: failpoint charge.before_gateway timed out"
    )


def test_timeout_inside_a_transaction_does_not_undo_it() -> None:
    arm("refund.after_gateway=timeout")
    assert in_attempt("refund.after_gateway", "refund.in_settlement", "refund.before_reply") == (
        "refund.before_reply: failpoint refund.after_gateway timed out"
    )


def test_timeout_of_the_reply_is_told_at_once() -> None:
    arm("charge.before_reply=timeout")
    assert "timed out" in in_attempt("charge.before_reply")


def test_an_attempt_does_not_inherit_what_another_owes() -> None:
    arm("charge.before_gateway=timeout:1:1")
    assert in_attempt("charge.before_gateway") == "through"
    assert in_attempt("charge.after_gateway") == "through"


def test_at_most_so_often() -> None:
    arm("charge.*=fail:1:1")
    assert [in_attempt("charge.before_claim") for _ in range(2)] == [
        "charge.before_claim: failpoint charge.before_claim",
        "through",
    ]


def test_the_seed_repeats_the_dice() -> None:
    def throws() -> list[str]:
        arm("note.before_reply=fail:0.5", seed=7)
        return [in_attempt("note.before_reply") for _ in range(20)]

    assert throws() == throws()
    assert len(set(throws())) == 2


@pytest.mark.parametrize("spec", ["charge.nowhere=fail", "charge.before_reply=explode", "charge.before_reply"])
def test_what_does_not_exist_is_refused(spec: str) -> None:
    with pytest.raises(ValueError, match=r"failpoint|Action"):
        arm(spec)


def test_die_ends_the_process_and_is_written_down_before(tmp_path: Path) -> None:
    log = tmp_path / "hits"
    script = (
        "from pathlib import Path; from app.failpoints import arm, reach; "
        f"arm('refund.after_gateway=die', log=Path({str(log)!r})); reach('refund.after_gateway'); print('survived')"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (failpoints.EXIT_CODE, "")
    assert log.read_text().split()[2:] == ["refund.after_gateway", Action.DIE]


def test_every_name_is_reached_by_the_code_and_the_other_way_round() -> None:
    reached = [name for file in APP.rglob("*.py") for name in re.findall(r'\breach\("([^"]+)"\)', file.read_text())]
    assert set(reached) == set(NAMES)


def test_no_workflow_has_one() -> None:
    assert [file.parent.name for file in APP.rglob("workflows.py") if "failpoint" in file.read_text()] == []


def test_every_name_is_in_the_documents() -> None:
    documented = (APP.parent / "docs/reliability.md").read_text()
    assert [name for name in NAMES if f"`{name}`" not in documented] == []


def test_every_activity_that_has_an_effect_has_one_before_its_news() -> None:
    activities = [
        name
        for file in APP.glob("*/activities.py")
        for name in re.findall(r"@activity\.defn\n +async def (\w+)", file.read_text())
    ]
    named = {name.split(".")[0] for name in NAMES if name.endswith(".before_reply")}
    assert set(activities) - named == WITHOUT_EFFECT
