"""The paper's pictures: Fig. 2 (two databases swapped), Fig. 3 and 6 (all styles), Fig. 1 and 5 (samples).

Takes the recipe's prompts and databases, gives the requests of each figure as a cell, and the drawn sheet.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from trainer.evaluation.drawing import place
from trainer.evaluation.paper.recipe import PaperConfig
from trainer.evaluation.styles import Cell, style_words
from trainer.sampling.picture import Grid, cell_edge, grid_png, open_picture
from trainer.sampling.recipe import SamplingConfig
from trainer.sampling.request import TRAINING_DATABASE
from trainer.sampling.resumable import Pieces


@dataclass(frozen=True)
class Figure:
    """A sheet; its cell holds the pictures row by row."""

    cell: Cell
    rows: tuple[str, ...]
    columns: tuple[str, ...]

    @property
    def name(self) -> str:
        """Of its file, without the ending."""
        return self.cell.style


def make_figures(
    config: PaperConfig, sampling: SamplingConfig, prompts: Sequence[str], styles: Sequence[str]
) -> list[Figure]:
    """`swap`: databases by prompts; `styles`: prompts by databases; `samples`: prompts by seeds.

    Pictures that stand beside each other for their databases share prompt and seed.
    """
    swap, numbers = config.swap or tuple(styles[:2]), range(config.pictures_per_prompt)
    asked = {
        "swap": [(prompt, one, 0) for one in swap for prompt in prompts],
        "styles": [(prompt, one, 0) for prompt in prompts for one in styles],
        "samples": [(prompt, TRAINING_DATABASE, n) for prompt in prompts for n in numbers],
    }
    labels = {
        "swap": (map(style_words, swap), prompts),
        "styles": (prompts, map(style_words, styles)),
        "samples": (prompts, [""] * len(numbers)),
    }
    return [
        Figure(
            cell=Cell(
                mode="figures",
                style=name,
                prompts=tuple(prompt for prompt, _, _ in asked[name]),
                requests=tuple(
                    sampling.request(prompt, sampling.seed + n, "text_and_neighbors", database)
                    for prompt, database, n in asked[name]
                ),
            ),
            rows=tuple(rows),
            columns=tuple(columns),
        )
        for name, (rows, columns) in labels.items()
    ]


def draw_figure(figure: Figure, pieces: Pieces) -> bytes:
    """The sheet of a figure whose pictures are stored, as a PNG."""
    width = len(figure.columns)
    pictures = [
        [open_picture(pieces.root, place(figure.cell, pieces, row * width + n)) for n in range(width)]
        for row in range(len(figure.rows))
    ]
    edge = min(128, cell_edge(pictures[0][0]))
    return grid_png(Grid(cells=pictures, rows=figure.rows, columns=figure.columns, cell=edge))
