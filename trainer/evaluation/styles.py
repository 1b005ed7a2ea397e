"""Which samples an evaluation needs: modes, styles, their prompts and seeds.

Takes a prompts list and the names of the style databases, gives requests. Nothing is read or written.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trainer.model.context import Mode
from trainer.sampling.recipe import SamplingConfig
from trainer.sampling.request import TRAINING_DATABASE, Request

RETRIEVAL, SUFFIX = "retrieval", "suffix"
MODES = (RETRIEVAL, SUFFIX, "suffix_retrieval", "no_neighbors")
"""How a style is asked for: by its database; by naming it; by naming it, with neighbors from the training
database; and not at all, which shows what the neighbors do."""


@dataclass(frozen=True)
class Cell:
    """The samples of one mode and style."""

    mode: str
    style: str
    prompts: tuple[str, ...]
    """Of each sample, without the style's name."""
    requests: tuple[Request, ...]

    @property
    def name(self) -> str:
        """Its piece of the stage, and its folder below `samples/`."""
        return f"{self.mode}/{self.style}"


def style_words(style: str) -> str:
    """A database's name as it stands in a prompt."""
    return style.replace("_", " ").replace("-", " ")


def make_cells(
    config: SamplingConfig, count: int, styles: Sequence[str], prompts: Sequence[str]
) -> list[Cell]:
    """`count` samples of each mode and style, by mode, then style.

    A style's prompts and seeds are the same in every mode, so that only the way of asking differs.
    """
    drawn = {style: draw_prompts(prompts, count, style, config.seed) for style in styles}
    return [
        Cell(
            mode=mode,
            style=style,
            prompts=tuple(prompt for prompt, _ in drawn[style]),
            requests=tuple(_request(config, (mode, style), *pair) for pair in drawn[style]),
        )
        for mode in MODES
        for style in styles
    ]


def draw_prompts(prompts: Sequence[str], count: int, style: str, seed: int) -> list[tuple[str, int]]:
    """Prompts with seeds for a style, decided by the seed and the style's name alone.

    No prompt comes again before all came as often.
    """
    rng = np.random.default_rng([seed, *style.encode()])
    rounds = -(-count // len(prompts))
    order = np.concatenate([rng.permutation(len(prompts)) for _ in range(rounds)])[:count]
    seeds = rng.integers(0, 2**31, count)
    return [(prompts[number], int(one)) for number, one in zip(order, seeds, strict=True)]


def _request(config: SamplingConfig, cell: tuple[str, str], prompt: str, seed: int) -> Request:
    mode, style = cell
    suffixed = f"{prompt} in the style of {style_words(style)}"
    ways: dict[str, tuple[str, Mode, str]] = {
        RETRIEVAL: (prompt, "text_and_neighbors", style),
        SUFFIX: (suffixed, "text", ""),
        "suffix_retrieval": (suffixed, "text_and_neighbors", TRAINING_DATABASE),
        "no_neighbors": (prompt, "text", ""),
    }
    text, kind, database = ways[mode]
    return config.request(text, seed, kind, database)
