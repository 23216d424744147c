"""Runs every `$ helm template …` that the document shows with an error, and compares what helm says.

A block is console text: a line that begins with `$ `, and under it some lines of what it prints. Each of those must be
in the output, `…` standing for anything.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

LEAST = 3


def main() -> int:
    """How many of the blocks are not true."""
    text = Path(sys.argv[1]).read_text()
    blocks = re.findall(r"^```console\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    wrong = 0
    shown = 0
    for block in (block for block in blocks if "Error:" in block):
        for command, expected in re.findall(r"^\$ (helm .*)\n((?:(?!\$ ).*\n)+)", block, re.MULTILINE):
            shown += 1
            run = subprocess.run(shlex.split(command), capture_output=True, text=True, check=False)
            output = " ".join((run.stdout + run.stderr).split())
            lines = [" ".join(line.split()) for line in expected.splitlines() if line.strip()]
            missing = [line for line in lines if not re.search(re.escape(line).replace("…", ".*"), output)]
            if run.returncode == 0 or missing:
                wrong += 1
                print(f"$ {command}\nended with {run.returncode}: {output}\nand is shown with: {missing}")  # noqa: T201
    print(f"cluster: wrong values refused as documented: {shown - wrong} of {shown}")  # noqa: T201
    return wrong + (shown < LEAST)


sys.exit(main())
