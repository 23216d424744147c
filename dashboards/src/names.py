"""The names a query may use. A name that nothing publishes is an error here, not an empty panel later.

The product's names are taken from its code; those of the Temporal SDK, the Temporal server and the collector from lists
that `python -m dashboards.src.scrape` makes of real scrapes.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Final

from app.telemetry.metrics import ORDER_GAUGES, REGISTRY

if TYPE_CHECKING:
    from prometheus_client import Counter, Histogram
    from prometheus_client.metrics_core import Metric

SCRAPED: Final = Path(__file__).parent.parent / "scraped"


def counter(metric: Counter) -> str:
    """Name of a counter of the product."""
    return f"{next(iter(metric.describe())).name}_total"


def buckets(metric: Histogram) -> str:
    """Name of the buckets of a histogram of the product."""
    return f"{next(iter(metric.describe())).name}_bucket"


def count(metric: Histogram) -> str:
    """Name of the count of a histogram of the product."""
    return f"{next(iter(metric.describe())).name}_count"


def gauge(name: str) -> str:
    """A gauge, or a metric of the process, that the product publishes without an object to hold."""
    return _known(name, ours(), "app.telemetry.metrics")


def sdk(name: str) -> str:
    """A metric of the Temporal SDK."""
    return _known(name, scraped("temporal-sdk"), "dashboards/scraped/temporal-sdk.txt")


def server(name: str) -> str:
    """A metric of the Temporal server."""
    return _known(name, scraped("temporal-server"), "dashboards/scraped/temporal-server.txt")


def spans(name: str) -> str:
    """A metric that the collector makes of spans."""
    return _known(name, scraped("collector"), "dashboards/scraped/collector.txt")


@cache
def ours() -> dict[str, str]:
    """Every series name of the product, with its type."""
    # Not published while PostgreSQL has not been asked, and so not collected here.
    families = [*ORDER_GAUGES.describe(), *REGISTRY.collect()]
    return {series: family.type for family in families for series in _series(family)}


@cache
def scraped(which: str) -> dict[str, str]:
    """Series names of a list, with their types."""
    lines = (SCRAPED / f"{which}.txt").read_text().splitlines()
    return {
        series: kind
        for line in lines
        if line and not line.startswith("#")
        for name, kind in [line.split()[:2]]
        for series in _spread(name, kind)
    }


def _series(family: Metric) -> list[str]:
    return [f"{family.name}_total"] if family.type == "counter" else _spread(family.name, family.type)


def _spread(name: str, kind: str) -> list[str]:
    return [f"{name}_bucket", f"{name}_sum", f"{name}_count"] if kind == "histogram" else [name]


def _known(name: str, names: dict[str, str], where: str) -> str:
    if name not in names:
        raise LookupError(f"{name} is not in {where}")
    return name
