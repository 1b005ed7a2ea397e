"""The samples that an evaluation draws: modes, styles, prompts and seeds.

Takes a list of prompts and the names of the style databases, returns requests. Reads and writes no files.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from retrieval.errors import UserError
from trainer.model.context import Mode
from trainer.sampling.recipe import SamplingConfig
from trainer.sampling.request import TRAINING_DATABASE, Request

RETRIEVAL, SUFFIX, SUFFIX_RETRIEVAL, NO_NEIGHBORS = "retrieval", "suffix", "suffix_retrieval", "no_neighbors"
MODES = (RETRIEVAL, SUFFIX, SUFFIX_RETRIEVAL, NO_NEIGHBORS)
"""How a style is requested: by its database; by its name in the prompt; by its name, with neighbors from the
training database; not at all (control without neighbors)."""
BASELINES = {
    SUFFIX_RETRIEVAL: "the style named in the prompt, with neighbors of the training database",
    SUFFIX: "the style named in the prompt",
}
"""Modes that retrieval from a style database is compared with, in words."""


@dataclass(frozen=True)
class SampleGroup:
    """Samples that are drawn and stored together."""

    name: str
    """Name of the group's record, and its folder below `samples/`."""
    prompts: tuple[str, ...]
    """One per sample, without the name of the style."""
    requests: tuple[Request, ...]


@dataclass(frozen=True)
class StyleGroup(SampleGroup):
    """The samples of one mode and style."""

    mode: str
    style: str


def stronger_baseline(effects: Mapping[str, Sequence[Any]]) -> str:
    """That of BASELINES with the larger style accuracy by a judge. Judges may have different ones.

    effects: by mode, the estimate of retrieval's accuracy by this judge minus that of the mode.
    """
    return min(BASELINES, key=lambda mode: effects[mode][0])


def style_words(style: str) -> str:
    """The name of a style database as it is written in prompts."""
    return style.replace("_", " ").replace("-", " ")


def make_style_groups(
    config: SamplingConfig, count: int, styles: Sequence[str], prompts: Sequence[str], prompts_per_style: int = 0
) -> list[StyleGroup]:
    """`count` samples of each mode and style, by mode, then style. All modes have the same prompts and seeds.

    prompts_per_style: see `EvaluateConfig`. Raises UserError if there are too few prompts.
    """
    parts = divide_prompts(prompts, styles, prompts_per_style, config.seed)
    pairs = {style: draw_prompts(parts[style], count, style, config.seed) for style in styles}
    return [
        StyleGroup(
            name=f"{mode}/{style}",
            prompts=tuple(prompt for prompt, _ in pairs[style]),
            requests=tuple(_request(config, (mode, style), *pair) for pair in pairs[style]),
            mode=mode,
            style=style,
        )
        for mode in MODES
        for style in styles
    ]


def divide_prompts(prompts: Sequence[str], styles: Sequence[str], count: int, seed: int) -> dict[str, tuple[str, ...]]:
    """`count` prompts for each style that no other style has, drawn by the seed; all prompts if the count is 0."""
    if not count:
        return dict.fromkeys(styles, tuple(prompts))
    distinct, needed = tuple(dict.fromkeys(prompts)), count * len(styles)
    if len(distinct) < needed:
        raise UserError(
            f"evaluate.prompts_per_style = {count} needs {needed} different prompts for {len(styles)} styles, "
            f"prompts_file has {len(distinct)}. Add prompts or lower the number."
        )
    order = np.random.default_rng([seed, needed]).permutation(len(distinct))
    parts = order[:needed].reshape(len(styles), count)
    return {style: tuple(distinct[row] for row in part) for style, part in zip(styles, parts, strict=True)}


def draw_prompts(prompts: Sequence[str], count: int, style: str, seed: int) -> list[tuple[str, int]]:
    """`count` pairs of prompt and seed, a function of `seed` and style. Prompts repeat only after all were used."""
    rng = np.random.default_rng([seed, *style.encode()])
    rounds = -(-count // len(prompts))
    order = np.concatenate([rng.permutation(len(prompts)) for _ in range(rounds)])[:count]
    seeds = rng.integers(0, 2**31, count)
    return [(prompts[number], int(seed)) for number, seed in zip(order, seeds, strict=True)]


def require_read_styles(groups: Sequence[StyleGroup], truncated: Callable[[list[str]], list[str]]) -> None:
    """Raises UserError unless the text encoder reads the style at the end of every prompt that names one.

    truncated: returns those of some texts, at least one, that are longer than the context of the encoder.
    """
    requests = (request for group in groups if group.mode in (SUFFIX, SUFFIX_RETRIEVAL) for request in group.requests)
    prompts = [*dict.fromkeys(request.prompt for request in requests)]
    if prompts and (cut := truncated(prompts)):
        raise UserError(
            f"CLIP does not read the style at the end of {len(cut)} of {len(prompts)} prompts that name one, such as "
            f"{cut[0]!r}: they are longer than its context, so the baselines would miss the style. Shorten these "
            "prompts in evaluate.prompts_file."
        )


def _request(config: SamplingConfig, group: tuple[str, str], prompt: str, seed: int) -> Request:
    mode, style = group
    suffixed = f"{prompt} in the style of {style_words(style)}"
    conditions: dict[str, tuple[str, Mode, str]] = {
        RETRIEVAL: (prompt, "text_and_neighbors", style),
        SUFFIX: (suffixed, "text", ""),
        SUFFIX_RETRIEVAL: (suffixed, "text_and_neighbors", TRAINING_DATABASE),
        NO_NEIGHBORS: (prompt, "text", ""),
    }
    text, conditioning, database = conditions[mode]
    return config.request(text, seed, conditioning, database)
