"""The page and the pictures of `make bench-curve`.

Takes the values of `curve.json` and the samples, returns Markdown and pictures. Writes no files.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.training.conditionings import CONDITIONINGS
from jobs.demo.judge.labels import CLASSES
from jobs.demo.judge.links import LINKS
from jobs.demo.judge.network import Pixels
from jobs.demo.report.numbers import CONTENT_GOALS
from jobs.reporting.estimates import estimate_text
from jobs.reporting.tables import markdown_table
from trainer.evaluation.charts import INK, figure_png, new_figure
from trainer.sampling.picture import Grid, draw_grid

SHEET_COLUMNS, CELL = 10, 128
MAX_TIMES = 100
"""Longer trainings are not told apart: the trend of few points says nothing about them."""
COLOR = "#0b6e6e"

PAGE = """# What samples show after more training

Written by `make bench-curve`; the numbers are in `curve.json`.

**Machine:** {hardware}.

**Run:** `{run}`, {planned:,} steps planned, {batch} images a step on {ranks} ranks. {start}
At each checkpoint the averaged weights sample {count} held-out prompts in {styles} styles (`--each {each}`),
with {k} neighbors from the style's database, guidance {guidance:g}, {steps} steps of {scheduler} (`--steps {steps}`).
Prompts, seeds and neighbors are the same in every row. The table has the share of samples in which the judge of
contents reads what the prompt asks for, and the style of the database; layout only of prompts with several figures.
Brackets contain Wilson's 95 % intervals; samples of one content are one cluster. Images and hours are those of all
steps so far; other work on the machine makes hours longer.

{table}

![Share of the samples with each attribute, by images seen](images/curve.png)

{trend}

![The same prompts, styles and seeds at each checkpoint](images/curve-samples.jpg)

## Where contents are lost

The same measure at each link of the demo's run, from its report ("Contents, link by link"). Its samples are all of the
evaluation; those above are the first {each} of each style.

{links}

### By conditioning

The same weights, seeds and measure as in the last row of the curve, with other conditionings. Real pictures have the
content of the prompt and the style of the database; they are drawn for this, and their CLIP vectors are the context.

{conditionings}
"""


def page(result: dict[str, Any]) -> str:
    start = result["start_from"]
    rows = [
        [
            f"{point['images']:,}",
            f"{point['step']:,}" if point["step"] else f"0: run `{start}`",
            f"{point['hours']:.1f}",
            f"{point['learning_rate']:.1e}" if point["step"] else "0",
            *(estimate_text(point["shares"][name]) for name in CLASSES),
        ]
        for point in result["points"]
    ]
    links = [_row(words, result["links"][name]) for name, words in LINKS.items()]
    conditionings = [
        _row(f"the prompt and its neighbors, guidance {result['guidance']:g}", result["points"][-1]["shares"]),
        *(_row(words, result["conditionings"][name]) for name, words in CONDITIONINGS.items()),
    ]
    attributes = [f"{name}:" for name in CLASSES]
    return PAGE.format(
        **{name: value for name, value in result.items() if name not in ("links", "conditionings", "trend")},
        each=result["count"] // result["styles"],
        start=f"It started from the finished run `{start}`." if start else "It started from random weights.",
        table=markdown_table(["images seen:", "step:", "hours:", "learning rate:", *attributes], rows),
        trend=trend_text(result["trend"], result["points"][0]["images"]),
        links=markdown_table(["", *attributes], links),
        conditionings=markdown_table(["", *attributes], conditionings),
    )


def _row(words: str, shares: Mapping[str, Any]) -> list[str]:
    """A line of a table: the share of each attribute, empty for one that was not asked for."""
    return [words, *(estimate_text(shares[name]) if name in shares else "" for name in CLASSES)]


def trend_text(values: dict[str, Any] | None, first_images: int) -> str:
    """What the points say about longer training, in words. first_images: images of the first point."""
    if values is None:
        return "Too few points for a trend."
    (slope, least, most), goal = values["slope"], values["goal"]
    line = (
        "**Trend of the shape:** a line through the log-odds of the shares over the logarithm of the images rises by "
        f"{slope:.2f} ({least:.2f} to {most:.2f}) for twice the images."
    )
    if least <= 0:
        return f"{line} That is not distinguishable from 0: these points do not tell whether longer training suffices."
    times, low, high = (_times(value, first_images) for value in values["images"])
    return (
        f"{line} If it went on like that, {goal:g} would be reached after {times} ({low} to {high}) times the images of"
        " the first row. That is an extrapolation: a line does not show where the curve flattens."
    )


def _times(images: float | None, first_images: int) -> str:
    if not images:
        return "endless"
    return f"{images / first_images:,.1f}" if images <= MAX_TIMES * first_images else f"more than {MAX_TIMES}"


def draw_curve(points: Sequence[dict[str, Any]]) -> bytes:
    """PNG bytes: the share of each attribute with its interval and its goal, by images seen."""
    figure, panels = new_figure((9.0, 5.0), 2, 3, sharex=True, sharey=True)
    images = [point["images"] / 1000 for point in points]
    for axes, name in zip(panels, CLASSES, strict=True):
        values = np.array([point["shares"][name] for point in points])
        axes.fill_between(images, values[:, 1], values[:, 2], color=COLOR, alpha=0.18, linewidth=0)
        axes.plot(images, values[:, 0], marker="o", markersize=4, color=COLOR)
        axes.axhline(CONTENT_GOALS[name], color=INK, linewidth=1, linestyle=":")
        axes.set_title(name)
        axes.set_ylim(0, 1.04)
    for axes in panels[3:]:
        axes.set_xlabel("images seen, thousands")
    return figure_png(figure)


def draw_samples(points: Sequence[dict[str, Any]], pictures: dict[int, Pixels], texts: Sequence[str]) -> Image.Image:
    """Some of the samples: a row for each checkpoint, a column for each prompt. texts: prompts and styles."""
    columns = np.linspace(0, len(texts), min(SHEET_COLUMNS, len(texts)), endpoint=False).astype(int)
    rows = [f"{point['images']:,} images" for point in points]
    cells = [[Image.fromarray(pictures[point["step"]][i]) for i in columns] for point in points]
    return draw_grid(Grid(cells, rows, [texts[i] for i in columns], cell=CELL))
