"""The dashboards, as programs: `python -m dashboards.src` writes them as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

#: Where the JSON is kept, once: Helm reads nothing outside of a chart; compose and k8s mount this folder.
FOLDER: Final = Path(__file__).parents[2] / "charts" / "trellis" / "dashboards"


def dashboards() -> dict[str, str]:
    """Every dashboard as JSON, by the name of its file."""
    from grafana_foundation_sdk.cog.encoder import JSONEncoder

    from dashboards.src import api, orders, workflows

    boards = [orders.board(), workflows.board(), api.board()]
    return {
        f"{board.uid}.json": json.dumps(board.build(), cls=JSONEncoder, indent=1, sort_keys=True) + "\n"
        for board in boards
    }
