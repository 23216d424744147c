"""`python -m tests.faults --minutes 3 --seed 1`: the real stack, broken at every point, and its books afterwards.

Exit code 0: no violation. Otherwise logs, histories and books are left in the folder that the last lines name, with
the command that replays the run.
"""

from __future__ import annotations

import argparse
import asyncio
import secrets
import sys
from pathlib import Path

from tests.faults.acts import ACTS
from tests.faults.run import Plan, Run


def main() -> int:
    """Run, and say how it went."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--minutes", type=float, default=3.0, help="how long things break (default 3)")
    parser.add_argument("--seed", type=int, default=None, help="draws schedule, stories and failpoints (default: any)")
    parser.add_argument("--rate", type=float, default=2.5, help="orders per second (default 2.5)")
    parser.add_argument("--pause", type=float, default=8.0, help="seconds between two faults (default 8)")
    parser.add_argument("--kill-everything", type=int, default=0, metavar="TIMES", help="instead: kill -9 of all")
    parser.add_argument(
        "--orders", type=int, default=None, help="most orders open at a time (80), or open at each kill of all (50)"
    )
    parser.add_argument("--out", type=Path, default=Path(".faults"), help="folder for reports and failed runs")
    parser.add_argument("--keep", action="store_true", help="keep the data of a run without violations, too")
    parser.add_argument(
        "--acts", default=",".join(ACTS), help=f"what operators do meanwhile: `none`, or some of {','.join(ACTS)} (all)"
    )
    given = parser.parse_args()
    acts = tuple(kind for kind in given.acts.split(",") if kind != "none")
    if unknown := set(acts) - set(ACTS):
        parser.error(f"--acts: unknown: {', '.join(sorted(unknown))}")
    seed = given.seed if given.seed is not None else secrets.randbelow(2**31)
    plan = Plan(
        seed=seed,
        minutes=given.minutes,
        rate=given.rate,
        pause=given.pause,
        kills=given.kill_everything,
        orders=given.orders or (50 if given.kill_everything else 80),
        out=given.out,
        keep=given.keep,
        acts=acts,
    )
    return asyncio.run(Run(plan).to_the_end())


sys.exit(main())
