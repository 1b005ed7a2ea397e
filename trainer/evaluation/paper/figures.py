"""Contact sheets of the paper: Fig. 2 (two databases), Fig. 3 and 6 (all styles), Fig. 1 and 5 (samples), and modes.

Takes the recipe's prompts and databases, returns the requests of each figure and the drawn sheet.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from trainer.evaluation.charts import LABELS
from trainer.evaluation.paper.recipe import PaperConfig
from trainer.evaluation.sample_groups import picture_path
from trainer.evaluation.styles import SampleGroup, StyleGroup, style_words
from trainer.sampling.picture import Grid, cell_edge, grid_png, open_picture
from trainer.sampling.recipe import SamplingConfig
from trainer.sampling.request import TRAINING_DATABASE
from trainer.sampling.resumable import ResumableItems

SHEET_COLUMNS = 6


@dataclass(frozen=True)
class Figure:
    """A contact sheet: name of its file without suffix, its samples row by row, and the labels."""

    name: str
    group: SampleGroup
    rows: tuple[str, ...]
    columns: tuple[str, ...]


def make_figures(
    config: PaperConfig, sampling: SamplingConfig, prompts: Sequence[str], styles: Sequence[str]
) -> list[Figure]:
    """`swap`: databases by prompts, one seed; `styles`: prompts by databases, one seed; `samples`: prompts by seeds."""
    swapped, numbers = config.swapped_databases or tuple(styles[:2]), range(config.pictures_per_prompt)
    cells = {
        "swap": [(prompt, style, 0) for style in swapped for prompt in prompts],
        "styles": [(prompt, style, 0) for prompt in prompts for style in styles],
        "samples": [(prompt, TRAINING_DATABASE, n) for prompt in prompts for n in numbers],
    }
    labels = {
        "swap": (map(style_words, swapped), prompts),
        "styles": (prompts, map(style_words, styles)),
        "samples": (prompts, [""] * len(numbers)),
    }
    return [
        Figure(
            name=name,
            group=SampleGroup(
                name=f"figures/{name}",
                prompts=tuple(prompt for prompt, _, _ in cells[name]),
                requests=tuple(
                    sampling.request(prompt, sampling.seed + n, "text_and_neighbors", database)
                    for prompt, database, n in cells[name]
                ),
            ),
            rows=tuple(rows),
            columns=tuple(columns),
        )
        for name, (rows, columns) in labels.items()
    ]


def draw_figure(figure: Figure, items: ResumableItems) -> bytes:
    """The sheet as PNG bytes. Its pictures must be stored already."""
    width = len(figure.columns)
    pictures = [
        [open_picture(items.root, picture_path(figure.group, items, row * width + n)) for n in range(width)]
        for row in range(len(figure.rows))
    ]
    edge = min(128, cell_edge(pictures[0][0]))
    return grid_png(Grid(cells=pictures, rows=figure.rows, columns=figure.columns, cell=edge))


def draw_by_mode(groups: Sequence[StyleGroup], items: ResumableItems) -> bytes:
    """The first stored samples of each style and mode, a row for each, by style: PNG bytes."""
    rows = sorted(groups, key=lambda group: group.style)
    numbers = range(min(SHEET_COLUMNS, *(len(group.requests) for group in rows)))
    cells = [[open_picture(items.root, picture_path(group, items, n)) for n in numbers] for group in rows]
    labels = [f"{style_words(group.style)}: {LABELS[group.mode]}" for group in rows]
    return grid_png(Grid(cells=cells, rows=labels, columns=[""] * len(numbers), cell=128))
