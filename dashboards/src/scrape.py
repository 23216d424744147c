"""Makes the lists of names that the Temporal SDK, the Temporal server and the collector publish, from real scrapes.

    python -m dashboards.src.scrape temporal-sdk http://127.0.0.1:9464/metrics
    python -m dashboards.src.scrape temporal-server http://127.0.0.1:9233/metrics
    python -m dashboards.src.scrape collector http://127.0.0.1:8889/metrics

Scrape after some load with failures in it (`trellis load`; a server that was stopped for a while; a workflow that did
not replay), because a counter is published from its first increment on. So a name that is in the list already stays;
`--fresh` begins anew, as is due after an upgrade.
"""

from __future__ import annotations

import argparse
import re
import urllib.request

from dashboards.src.names import SCRAPED

#: Which lines of a scrape belong to the list: a worker's page has the product's metrics and the SDK's.
PREFIXES = {"temporal-sdk": "temporal_", "temporal-server": "", "collector": "traces_span_metrics_"}
_TYPE = re.compile(r"^# TYPE (\S+) (\S+)", re.MULTILINE)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m dashboards.src.scrape")
    parser.add_argument("name", choices=PREFIXES)
    parser.add_argument("url", nargs="+")
    parser.add_argument("--fresh", action="store_true", help="forget the names of earlier scrapes")
    arguments = parser.parse_args()
    file = SCRAPED / f"{arguments.name}.txt"
    known = {} if arguments.fresh or not file.exists() else _read(file.read_text())
    for url in arguments.url:
        with urllib.request.urlopen(url, timeout=10) as page:  # noqa: S310 - an address that the developer gave
            found = dict(_TYPE.findall(page.read().decode()))
        known |= {name: kind for name, kind in found.items() if name.startswith(PREFIXES[arguments.name])}
    file.parent.mkdir(exist_ok=True)
    head = "# Made by `python -m dashboards.src.scrape`: the name and type of every metric that was seen.\n"
    file.write_text(head + "".join(f"{name} {kind}\n" for name, kind in sorted(known.items())))
    print(f"{file}: {len(known)} names")  # noqa: T201


def _read(text: str) -> dict[str, str]:
    return dict(line.split()[:2] for line in text.splitlines() if line and not line.startswith("#"))


if __name__ == "__main__":
    main()
