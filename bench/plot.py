"""Plots as SVG: throughput and latency by concurrency; growth, drain and memory with their fits."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("svg")
mpl.rcParams.update(
    {"svg.hashsalt": "trellis", "svg.fonttype": "none", "font.size": 9, "axes.grid": True, "grid.alpha": 0.3}
)

import matplotlib.pyplot as plt  # noqa: E402 - chooses its backend when it is imported
from matplotlib.axes import Axes  # noqa: E402

from bench.report import Results, median  # noqa: E402


def draw(results: Results, folder: Path) -> list[str]:
    """Write the plots of what was measured; their file names."""
    drawn = []
    if results.get("orders"):
        drawn.append(_save(_by_concurrency(results), folder / "performance.svg"))
    if any(part in results for part in ("growth", "drain", "memory")):
        drawn.append(_save(_by_size(results), folder / "performance-growth.svg"))
    return drawn


def _save(figure: Any, path: Path) -> str:
    # Without the date: the same figures are the same file.
    figure.savefig(path, metadata={"Date": None}, bbox_inches="tight")
    plt.close(figure)
    return path.name


def _by_concurrency(results: Results) -> Any:
    backends = list(dict.fromkeys(turn["backend"] for turn in results["orders"]))
    figure, grid = plt.subplots(len(backends), 3, figsize=(12, 3.6 * len(backends)), squeeze=False)
    for row, backend in zip(grid, backends, strict=True):
        turns = [turn for turn in results["orders"] if turn["backend"] == backend]
        for name in dict.fromkeys(turn["contestant"] for turn in turns):
            own = [turn for turn in turns if turn["contestant"] == name]
            levels = sorted({turn["at_once"] for turn in own})

            def curve(figure: str, own: Any = own, levels: Any = levels) -> list[float | None]:
                return [median([turn for turn in own if turn["at_once"] == level], figure) for level in levels]

            [plotted] = row[0].plot(levels, curve("orders_per_second"), marker="o", label=name)
            for axes, latency in ((row[1], "end_to_end"), (row[2], "start")):
                axes.plot(levels, curve(f"{latency}_p50_ms"), marker="o", color=plotted.get_color())
                axes.plot(levels, curve(f"{latency}_p99_ms"), linestyle=":", color=plotted.get_color())
        row[0].set(title=f"orders/s, {backend}", ylim=(0, None))
        row[1].set(title="end to end, ms: p50, p99 dotted", yscale="log")
        row[2].set(title="start call, ms: p50, p99 dotted", yscale="log")
        for axes in row:
            axes.set(xlabel="orders at once", xscale="log", xticks=levels, xticklabels=levels)
            axes.minorticks_off()
        row[0].legend()
    figure.tight_layout()
    return figure


def _by_size(results: Results) -> Any:
    figure, [[growth, drain, memory]] = plt.subplots(1, 3, figsize=(12, 3.6), squeeze=False)
    if "growth" in results:
        _draw_growth(growth, results["growth"])
    if "drain" in results:
        _draw_drain(drain, results["drain"])
    if "memory" in results:
        _draw_memory(memory, results["memory"])
    figure.tight_layout()
    return figure


def _draw_growth(axes: Axes, part: dict[str, Any]) -> None:
    points = [(turn["rows"], turn["cpu_ms_postgres"] + turn["cpu_ms_python"]) for turn in part["turns"]]
    axes.scatter([rows for rows, _ in points], [cost for _, cost in points])
    sizes = sorted({rows for rows, _ in points})
    fitted = part["fit"]
    line = [fitted["intercept"] + fitted["slope"] * math.log10(rows) for rows in sizes]
    axes.plot(sizes, line, label=f"{fitted['slope']:+.2f} ms per tenfold, R² {fitted['r2']:.2f}")
    axes.set(title="CPU ms per order: PostgreSQL + Python", xlabel="orders in the tables", xscale="log", ylim=(0, None))
    axes.legend()


def _draw_drain(axes: Axes, part: dict[str, Any]) -> None:
    for turn in part["turns"]:
        at, shipped = zip(*turn["curve"], strict=True)
        fitted = turn["fit"]
        told = f"workers: {turn['workers']}" + (f", {fitted['slope']:.1f}/s, R² {fitted['r2']:.3f}" if fitted else "")
        [plotted] = axes.plot(at, shipped, label=told)
        if fitted:
            line = [fitted["intercept"] + fitted["slope"] * each for each in at]
            axes.plot(at, line, linestyle=":", color=plotted.get_color())
    axes.set(title="drain of a backlog", xlabel="seconds", ylabel="shipped", ylim=(0, None))
    axes.legend()


def _draw_memory(axes: Axes, part: dict[str, Any]) -> None:
    turns = part["turns"]
    axes.plot([turn["parked"] for turn in turns], [turn["resident_bytes"] / 1e6 for turn in turns], marker="o")
    axes.axvline(part["cached"], linestyle=":", color="grey", label=f"cached: {part['cached']:,}")
    axes.set(title="resident MB of a worker", xlabel="orders parked in review", ylim=(0, None))
    axes.legend()
