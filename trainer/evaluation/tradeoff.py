"""Style against content: samples at several guidances, intervals of it, and numbers and weights of neighbors.

Content is the CLIP score of samples relative to that of samples without neighbors. Takes requests and features, returns
groups and plain values for JSON. Pure functions: `trainer.evaluation.paper` draws the samples and stores the result.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any

from trainer.evaluation.intervals import interval, share
from trainer.evaluation.scores import Evaluator, FeaturesByGroup, StyleScores, pool, score
from trainer.evaluation.styles import NO_NEIGHBORS, StyleGroup

MIN_STYLE, MIN_CONTENT = 0.95, 0.95
"""What a setting must reach to become the default: style accuracy, and share of the content without neighbors."""
Row = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """How strongly samples follow their prompts and neighbors, see `Request`."""

    guidance: float
    k: int
    guidance_interval: tuple[float, float]
    neighbor_weight: float = 1.0

    @property
    def name(self) -> str:
        """Mode of its samples, and part of their folder."""
        low, high = self.guidance_interval
        return f"guidance-{self.guidance:g}-k-{self.k}-from-{low:g}-to-{high:g}-weight-{self.neighbor_weight:g}"


def make_settings(
    guidances: Sequence[float],
    ks: Sequence[int],
    intervals: Sequence[tuple[float, float]],
    weights: Sequence[float] = (1.0,),
) -> list[Setting]:
    """All combinations, without repetition. An interval has no effect at guidance 1: only the first is kept there."""
    guided = [(scale, part) for scale in guidances for part in intervals if scale != 1 or part == intervals[0]]
    combinations = product(dict.fromkeys(guided), dict.fromkeys(ks), dict.fromkeys(weights))
    return [Setting(scale, k, part, weight) for (scale, part), k, weight in combinations]


def setting_groups(retrieved: Sequence[StyleGroup], settings: Sequence[Setting], count: int) -> list[StyleGroup]:
    """The first `count` samples of each group at each setting, with the same prompts, seeds and databases."""
    return [
        replace(
            group,
            name=f"tradeoff/{setting.name}/{group.style}",
            mode=setting.name,
            prompts=group.prompts[:count],
            requests=tuple(replace(request, **vars(setting)) for request in group.requests[:count]),
        )
        for setting in settings
        for group in retrieved
    ]


def tradeoff(settings: Sequence[Setting], features: FeaturesByGroup, evaluator: Evaluator) -> Row:
    """Style and content of each setting, whether it is on the Pareto front, and the default by rule.

    features: by name of a setting or NO_NEIGHBORS, and style; all have the same prompts and seeds in the same order.
    """
    modes = [NO_NEIGHBORS, *(setting.name for setting in settings)]
    plain, *totals = (
        pool([score(evaluator, style, features[mode, style]) for style in evaluator.styles]) for mode in modes
    )
    pairs = zip(settings, totals, strict=True)
    rows = [asdict(setting) | _style_and_content(scores, plain, evaluator) for setting, scores in pairs]
    for row in rows:
        row["on_front"] = not any(_dominates(other, row) for other in rows)
    return {
        "judge": "pixels" if evaluator.pixel_classifier else "clip",
        "samples": len(plain.prompts),
        "prompts": len(set(plain.prompts)),
        "wanted": {"style": MIN_STYLE, "content": MIN_CONTENT},
        "settings": rows,
        "default": default_setting(rows),
    }


def default_setting(rows: Sequence[Row]) -> Row:
    """Of the settings that reach MIN_STYLE and MIN_CONTENT, that with the most content.

    If none does, that which misses its worse goal by the smallest share. `reached` tells which case it is.
    """
    reached = [row for row in rows if row["style"][0] >= MIN_STYLE and row["content"][0] >= MIN_CONTENT]
    if reached:
        best = max(reached, key=lambda row: (row["content"][0], row["style"][0]))
    else:
        best = max(rows, key=lambda row: min(row["style"][0] / MIN_STYLE, row["content"][0] / MIN_CONTENT))
    return {**best, "reached": bool(reached)}


def _style_and_content(scores: StyleScores, plain: StyleScores, evaluator: Evaluator) -> Row:
    """Style accuracy, by the judge on pixels if there is one, and content, with intervals by prompt."""
    flags = scores.correct_pixels if evaluator.pixel_classifier else scores.correct
    weights = evaluator.bootstrap.weights(scores.prompts)
    ratios = (weights @ scores.clip_scores) / (weights @ plain.clip_scores)
    return {
        "style": share(flags, scores.prompts),
        "content": interval(float(scores.clip_scores.mean() / plain.clip_scores.mean()), ratios, scores.prompts),
    }


def _dominates(other: Row, row: Row) -> bool:
    """Whether another setting has at least the style and the content of a row, and more of one of them."""
    gains = [other[name][0] - row[name][0] for name in ("style", "content")]
    return min(gains) >= 0 and max(gains) > 0
