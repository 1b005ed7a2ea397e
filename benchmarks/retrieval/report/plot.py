"""The plot: recall@20 against queries per second, single queries and batches."""

from math import log10
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter

from benchmarks.retrieval.catalog import BARE, BY_NAME, DATABASE, SCANN
from benchmarks.retrieval.rounds import TuningResult, frontier

PANELS = {"single": "One query at a time, one thread", "batch": "Batches, two threads"}
COLORS = {
    "database": "#c8102e",
    "scann": "#14213d",
    "hnsw": "#2a9d8f",
    "hnswlib": "#7cb518",
    "usearch": "#5fa8d3",
    "fast-scan": "#e08e0b",
    "rabitq": "#9b5de5",
    "ivf-sq8": "#b08968",
    "ivf-sqfp16": "#8d99ae",
    "ivf-flat": "#adb5bd",
    "autofaiss": "#f15bb5",
    "brute": "#6c757d",
    "hnsw-rabitq": "#7209b7",
    "panorama": "#006d77",
    "rabitqlib-hnsw": "#d62828",
    "rabitqlib-hnsw8": "#f77f00",
    "symphony": "#3a0ca3",
    "zvec": "#588157",
}
MARKERS = dict(zip(COLORS, "osD^vPXh<>*pd1234s", strict=True))
MIN_RECALL = 0.88


def draw(result: dict[str, Any], path: Path) -> None:
    """Write the plot to a PNG file."""
    plt.rcParams.update({"font.family": "DejaVu Sans", "font.size": 10.5, "axes.titlesize": 12.5})
    figure, axes = plt.subplots(1, 2, figsize=(13, 6.2), constrained_layout=True)
    for axis, (mode, title) in zip(axes, PANELS.items(), strict=True):
        for name in COLORS:
            points = [TuningResult(**point) for point in result["search"]["points"].get(name, [])]
            _line(axis, name, [(point.recall, 1 / point.seconds[mode]) for point in frontier(points, mode)])
        _format_axis(axis, title)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle(f"Recall@20 against speed, {result['rows']:,} CLIP-like vectors of 768 dimensions", fontsize=14.5)
    figure.savefig(path, dpi=150, facecolor="white")
    plt.close(figure)


def _line(axis: Axes, name: str, points: list[tuple[float, float]]) -> None:
    """points: recall and queries per second of the settings that no other one exceeds in both."""
    visible = [(recall, rate) for recall, rate in points if recall >= MIN_RECALL]
    if not visible or name == BARE.name:
        return
    is_main = name in (DATABASE.name, SCANN.name)
    axis.plot(
        [_axis_position(recall) for recall, _ in visible],
        [rate for _, rate in visible],
        color=COLORS[name],
        marker=MARKERS[name],
        markersize=6.5 if is_main or len(visible) == 1 else 5,
        linewidth=2.8 if is_main else 1.5,
        alpha=1 if is_main else 0.9,
        zorder=5 if is_main else 3,
        label=BY_NAME[name].label,
        markeredgecolor="white",
        markeredgewidth=0.6,
    )


def _axis_position(recall: float) -> float:
    """Position of a recall on a logarithmic axis of the error 1 - recall, which ends at 0.9995."""
    return -log10(max(1 - recall, 5e-4))


def _format_axis(axis: Axes, title: str) -> None:
    ticks = (0.9, 0.95, 0.98, 0.99, 0.995, 0.999)
    axis.set_yscale("log")
    axis.set_xlim(_axis_position(MIN_RECALL), _axis_position(0.9995) + 0.06)
    axis.xaxis.set_major_locator(FixedLocator([_axis_position(tick) for tick in ticks]))
    axis.set_xticklabels([f"{tick:g}" for tick in ticks])
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.set_title(title, loc="left", pad=10)
    axis.set_xlabel("recall@20 (logarithmic axis of 1 - recall)")
    axis.set_ylabel("queries per second")
    axis.grid(which="major", color="#dddddd", linewidth=0.8)
    axis.grid(which="minor", axis="y", color="#f0f0f0", linewidth=0.5)
    axis.set_axisbelow(True)
    for target in (0.95, 0.99):
        axis.axvline(_axis_position(target), color="#999999", linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
