"""A straight line through measured points, and how well it fits."""

from __future__ import annotations

import statistics
from collections.abc import Sequence


def line(points: Sequence[tuple[float, float]]) -> dict[str, float]:
    """`slope` and `intercept` of the least squares, and `r2`, the share of the spread that the line explains."""
    xs, ys = [x for x, _ in points], [y for _, y in points]
    slope, intercept = statistics.linear_regression(xs, ys)
    rest = sum((y - intercept - slope * x) ** 2 for x, y in points)
    mean = statistics.fmean(ys)
    spread = sum((y - mean) ** 2 for y in ys)
    return {"slope": slope, "intercept": intercept, "r2": 1 - rest / spread if spread else 1.0}
