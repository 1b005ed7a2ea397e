"""Charts of the experiments: Fig. 4a and 4b, controls, held-out loss, distances and retrieval time.

Takes the values of `paper.json`, returns PNG bytes. Needs no display.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Patch

from trainer.evaluation.charts import COLORS, INK, LABELS, figure_png, new_figure
from trainer.evaluation.paper.controls import OTHER_PROMPT, RANDOM_ROWS, SHUFFLED
from trainer.evaluation.paper.copy_distances import Comparison
from trainer.evaluation.styles import RETRIEVAL, SUFFIX

MODE_LABELS = LABELS | {
    SHUFFLED: "control: neighbors of another style and prompt",
    RANDOM_ROWS: "control: random rows of the training database",
    OTHER_PROMPT: "control: the style's database, neighbors of another prompt",
}
TITLES = {
    "database_clip": "to the nearest row of their database, CLIP",
    "database_hash": "to the nearest row of their database, perceptual hash",
    "neighbors_clip": "to their own neighbors, CLIP",
    "neighbors_hash": "to their own neighbors, perceptual hash",
    "training_clip": "to the nearest training image, CLIP",
    "training_hash": "to the nearest training image, perceptual hash",
}
"""Earlier versions stored the distances to the neighbors, of which a sample has fewer than a real image has others."""
REAL, CONTROL = "#c9c4ba", "#b3574a"
OURS = COLORS[RETRIEVAL]


def improvement_chart(tables: dict[str, Any]) -> bytes:
    """Top: accuracy relative to the style in the prompt (Fig. 4a). Bottom: logits of the style (Fig. 4b)."""
    rows = tables["styles"]
    figure, (top, bottom) = new_figure((max(7.0, 0.95 * len(rows) + 1.5), 6.4), 2)
    for x, row in enumerate(rows):
        improvement = row["relative_improvement"]
        if improvement["value"] is None:
            top.text(x, 0, "suffix: none right", rotation=90, ha="center", va="bottom", fontsize=8)
            continue
        top.bar(x, improvement["value"], 0.55, color=OURS)
        if improvement["interval"] is not None:
            top.vlines(x, *improvement["interval"], color=INK, linewidth=1)
    top.axhline(0, color=INK, linewidth=0.8)
    top.yaxis.set_major_formatter(lambda value, _: f"{value:+.0%}")
    top.set_ylabel("accuracy relative to suffix")
    for offset, mode in ((-0.2, RETRIEVAL), (0.2, SUFFIX)):
        values = np.array([row["modes"][mode]["logit"] for row in rows], np.float64)
        _bars(bottom, np.arange(len(rows)) + offset, values, COLORS[mode])
    bottom.axhline(0, color=INK, linewidth=0.8)
    bottom.set_ylabel("logit above the mean")
    handles = [Patch(color=COLORS[mode], label=LABELS[mode]) for mode in (RETRIEVAL, SUFFIX)]
    figure.legend(handles=handles, loc="outside upper center", ncols=2, frameon=False)
    for axes in (top, bottom):
        axes.set_xlim(-0.6, len(rows) - 0.4)
        axes.set_xticks(range(len(rows)), [row["style"].replace("_", "\n") for row in rows])
    return figure_png(figure)


def modes_chart(tables: dict[str, Any]) -> bytes:
    """Accuracy of all modes of the evaluation and, below, of the controls; chance is a dotted line."""
    modes = list(tables["modes"])
    figure, (axes,) = new_figure((8.0, 0.5 * len(modes) + 0.9), 1)
    values = np.array([tables["modes"][mode]["accuracy"] for mode in modes])
    y = np.arange(len(modes))
    colors = [COLORS.get(mode, CONTROL) for mode in modes]
    axes.barh(y, values[:, 0], 0.6, xerr=_spread(values), color=colors, error_kw={"ecolor": INK, "elinewidth": 1})
    axes.grid(False, axis="y")
    axes.axvline(tables["chance"], color=INK, linewidth=1, linestyle=":")
    axes.set_yticks(y, [MODE_LABELS[mode] for mode in modes])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.02)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.set_xlabel("taken for the wanted style (dotted: chance)")
    return figure_png(figure)


def loss_chart(held_out: dict[str, Any]) -> bytes:
    """Increase of the held-out loss with other and with no neighbors, by timestep quartile and in total."""
    figure, (axes,) = new_figure((7.0, 3.2), 1)
    names = {"shuffled": ("neighbors of another image", CONTROL), "none": ("no neighbors", REAL)}
    for offset, (name, (_, color)) in zip((-0.2, 0.2), names.items(), strict=True):
        values = np.array([*held_out["added_by_quartile"][name], held_out["added"][name]], np.float64)
        _bars(axes, np.arange(len(values)) + offset, values, color)
    axes.axhline(0, color=INK, linewidth=0.8)
    axes.set_xticks(range(5), ["t: first\nquartile", "second", "third", "last\n(most noise)", "all"])
    axes.set_ylabel("added to the loss")
    axes.legend(handles=[Patch(color=color, label=label) for label, color in names.values()], frameon=False)
    return figure_png(figure)


def distance_chart(comparisons: Sequence[Comparison]) -> bytes:
    """Histograms of distances: samples to their nearest real image, and real images to each other."""
    columns = 2
    rows = -(-len(comparisons) // columns)
    figure, panels = new_figure((9.0, 2.7 * rows), rows, columns)
    for axes, comparison in zip(panels, comparisons, strict=False):
        samples, real = (comparison.scaled(values) for values in (comparison.samples, comparison.real))
        end = max(1e-6, float(np.quantile(np.concatenate([samples, real]), 0.995)))
        edges = np.arange(-1, end + 3, 2) if comparison.unit.startswith("bits") else np.linspace(0, end, 40)
        for values, color, label in ((real, REAL, "real to real"), (samples, OURS, "samples")):
            weights = np.full(len(values), 1 / len(values))
            axes.hist(values, edges.tolist(), weights=weights, color=color, alpha=0.75, label=label)
        axes.set_title(TITLES[comparison.name], fontsize=10)
        axes.set_xlabel(comparison.unit.replace("-", "−"))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    panels[0].legend(frameon=False, fontsize=9)
    for axes in panels[len(comparisons) :]:
        axes.set_visible(False)
    return figure_png(figure)


def time_chart(times: Sequence[dict[str, Any]]) -> bytes:
    """Milliseconds of a single query against the number of rows of its database."""
    figure, (axes,) = new_figure((7.0, 3.2), 1)
    for row in times:
        estimate = np.array([row["single_ms"]], np.float64)
        axes.errorbar(row["rows"], estimate[0, 0], _spread(estimate), fmt="o", color=OURS)
    rows = sorted({row["rows"] for row in times})
    axes.set_xscale("log")
    axes.set_xticks(rows, [f"{count:,}" for count in rows], rotation=30, ha="right")
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_xlabel("rows of the database")
    axes.set_ylabel(f"ms for {max(row['k'] for row in times)} neighbors")
    return figure_png(figure)


def tradeoff_chart(tradeoff: dict[str, Any]) -> bytes:
    """Style against content. The line joins the Pareto front, whose settings are named; dotted: goals."""
    figure, (axes,) = new_figure((7.0, 4.6), 1)
    for row in tradeoff["settings"]:
        x, y = (np.array([row[name]], np.float64) for name in ("content", "style"))
        color = OURS if row["on_front"] else REAL
        layer = 3 if row["on_front"] else 2
        axes.errorbar(x[0, 0], y[0, 0], _spread(y), _spread(x), fmt="o", elinewidth=0.6, color=color, zorder=layer)
    front = sorted(
        (row for row in tradeoff["settings"] if row["on_front"]), key=lambda row: (row["content"][0], row["style"][0])
    )
    points = [(row["content"][0], row["style"][0]) for row in front]
    axes.plot(*zip(*points, strict=True), color=OURS, linewidth=1)
    for row, point, end in zip(front, points, itertools.cycle(("left", "right")), strict=False):
        low, high = row["guidance_interval"]
        label = f"{row['guidance']:g}, {row['k']}, {row['neighbor_weight']:g}"
        label += "" if high - low == 1 else f", {low:g} to {high:g}"
        offset = (5, 4) if end == "left" else (-5, -10)
        axes.annotate(label, point, xytext=offset, textcoords="offset points", ha=end, fontsize=7, color=INK)
    axes.axvline(tradeoff["wanted"]["content"], color=INK, linewidth=1, linestyle=":")
    axes.axhline(tradeoff["wanted"]["style"], color=INK, linewidth=1, linestyle=":")
    axes.set_xlabel("CLIP score relative to samples without neighbors")
    axes.set_ylabel("taken for the style")
    axes.set_title("guidance, k, weight of neighbors, interval of guidance", fontsize=9)
    return figure_png(figure)


def _bars(axes: Axes, x: Any, values: Any, color: str) -> None:
    axes.bar(x, values[:, 0], 0.36, yerr=_spread(values), color=color, error_kw={"ecolor": INK, "elinewidth": 1})


def _spread(estimates: Any) -> Any:
    """Lengths (2, n) of the error bars of estimates (n, 3), each a value and the ends of its interval.

    An unknown end is nan, which matplotlib does not draw.
    """
    return np.maximum([estimates[:, 0] - estimates[:, 1], estimates[:, 2] - estimates[:, 0]], 0)
