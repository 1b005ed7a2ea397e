"""Bar chart of Fig. 4a and 4b: accuracy and logit of each style in each mode.

Takes the values of `evaluation.json`, returns PNG bytes. Needs no display.
"""

from io import BytesIO
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

INK = "#444444"
COLORS = {"retrieval": "#0b6e6e", "suffix": "#e08a3c", "suffix_retrieval": "#a9b8c6", "no_neighbors": "#d9d9d9"}
LABELS = {
    "retrieval": "neighbors of the style's database",
    "suffix": "style named in the prompt",
    "suffix_retrieval": "style named, neighbors of the training database",
    "no_neighbors": "neither",
}


def draw_bars(evaluation: dict[str, Any]) -> bytes:
    """PNG bytes. Top: accuracy by style with 95 % intervals; bottom: logit of the style minus the mean."""
    names = [row["style"].replace("_", "\n") for row in evaluation["styles"]]
    size = (max(8.0, 1.15 * (len(names) + 1)), 7.2)
    figure, (top, bottom) = new_figure(size, 2, sharex=True, height_ratios=[3, 2])
    rows = [*evaluation["styles"], {"modes": evaluation["modes"]}]
    for offset, mode in zip(np.linspace(-0.3, 0.3, len(COLORS)), COLORS, strict=True):
        _draw_mode(top, bottom, [row["modes"][mode] for row in rows], mode, float(offset))
    top.axhline(evaluation["chance"], color=INK, linewidth=1, linestyle=":")
    top.set_ylabel("taken for the style")
    top.set_ylim(0, 1.04)
    top.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    bottom.set_ylabel("logit above the mean")
    bottom.axhline(0, color=INK, linewidth=0.8)
    bottom.set_xticks(range(len(rows)), [*names, "all"])
    bottom.set_xlim(-0.6, len(rows) - 0.4)
    for axes in (top, bottom):
        axes.axvline(len(names) - 0.5, color="#bbbbbb", linewidth=0.8)
    position = (1.005, evaluation["chance"])
    top.annotate("chance", position, xycoords=("axes fraction", "data"), va="center", fontsize=9)
    figure.legend(*top.get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False)
    return figure_png(figure)


def new_figure(size: tuple[float, float], rows: int, columns: int = 1, **options: Any) -> tuple[Figure, list[Axes]]:
    """A figure and its panels, row by row. size: in inches; options: of matplotlib's `subplots`."""
    figure = Figure(figsize=size, dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, squeeze=False, **options).flatten().tolist()
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#eeeeee")
        axes.set_axisbelow(True)
    return figure, panels


def figure_png(figure: Figure) -> bytes:
    buffer = BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _draw_mode(top: Axes, bottom: Axes, rows: list[dict[str, Any]], mode: str, offset: float) -> None:
    x = np.arange(len(rows)) + offset
    accuracies = np.array([row["accuracy"] for row in rows])
    heights = accuracies[:, 0]
    errors = np.maximum([heights - accuracies[:, 1], accuracies[:, 2] - heights], 0)
    color, width = COLORS[mode], 0.19
    error_style = {"elinewidth": 0.9, "ecolor": "#666666"}
    top.bar(x, heights, width, yerr=errors, color=color, label=LABELS[mode], error_kw=error_style)
    bottom.bar(x, [row["logit"][0] for row in rows], width, color=color)
