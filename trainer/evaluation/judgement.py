"""What the judge says of samples, as numbers: paper section 2.2, Fig. 4a and 4b.

Takes CLIP features of samples by mode and style and a trained classifier, gives the evaluation as plain
JSON values. Pure: `trainer.evaluation.evaluate` makes the samples and stores the result.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from trainer.evaluation.classifier import TrainedClassifier
from trainer.evaluation.metrics import (
    Balls,
    Features,
    balls,
    bootstrap_improvement,
    clip_score,
    frechet_distance,
    precision_recall,
    relative_improvement,
    wilson_interval,
)
from trainer.evaluation.styles import MODES, RETRIEVAL, SUFFIX


@dataclass(frozen=True)
class Shown:
    """CLIP features of the samples of one mode and style, and of the prompts without the style's name."""

    pictures: Features
    texts: Features


@dataclass(frozen=True)
class Judged:
    """The judge on the samples of one mode and style."""

    right: npt.NDArray[np.bool_]
    """(n,) whether the sample is taken for its style."""
    logits: npt.NDArray[np.float32]
    """(n,) of the style that was asked for, over the mean of all styles' logits: softmax ignores a common
    shift, so that only the difference means something."""
    shown: Shown


@dataclass(frozen=True)
class Reference:
    """Features of the style databases' pictures, with their balls for precision and recall."""

    features: Features
    manifold: Balls
    neighbors: int


Samples = Mapping[tuple[str, str], Shown]
"""By mode and style."""


def judge(trained: TrainedClassifier, style: str, shown: Shown) -> Judged:
    """Judge the samples that should be of a style."""
    label = trained.classifier.styles.index(style)
    logits = trained.classifier.logits(shown.pictures)
    return Judged(np.argmax(logits, axis=1) == label, logits[:, label] - logits.mean(axis=1), shown)


def evaluation(
    trained: TrainedClassifier, samples: Samples, reference: Reference, seed: int
) -> dict[str, Any]:
    """All figures: a row for each style, a total for each mode, and the flat names of the report."""
    styles = trained.classifier.styles
    judged = {(mode, style): judge(trained, style, shown) for (mode, style), shown in samples.items()}
    totals = {mode: pooled([judged[mode, style] for style in styles]) for mode in MODES}
    ours, baseline = totals[RETRIEVAL].right, totals[SUFFIX].right
    return {
        "styles": [_style(trained, style, {mode: judged[mode, style] for mode in MODES}) for style in styles],
        "modes": {
            mode: {**_figures(total), **_distances(total.shown.pictures, reference)}
            for mode, total in totals.items()
        },
        "relative_improvement": relative_improvement(float(ours.mean()), float(baseline.mean())),
        "relative_improvement_interval": bootstrap_improvement(ours, baseline, seed),
        "chance": 1 / len(styles),
        "num_styles": len(styles),
        "style_classifier_accuracy": trained.held_out_accuracy,
        "style_classifier_rows": trained.held_out_rows,
        **{f"style_accuracy_{mode}": float(total.right.mean()) for mode, total in totals.items()},
    }


def _style(trained: TrainedClassifier, style: str, by_mode: Mapping[str, Judged]) -> dict[str, Any]:
    ours, baseline = (float(by_mode[mode].right.mean()) for mode in (RETRIEVAL, SUFFIX))
    return {
        "style": style,
        "held_out_accuracy": trained.held_out_by_style[style],
        "relative_improvement": relative_improvement(ours, baseline),
        "modes": {mode: _figures(one) for mode, one in by_mode.items()},
    }


def pooled(parts: Sequence[Judged]) -> Judged:
    """The samples of several styles as one, in order."""
    return Judged(
        right=np.concatenate([part.right for part in parts]),
        logits=np.concatenate([part.logits for part in parts]),
        shown=Shown(
            pictures=np.concatenate([part.shown.pictures for part in parts]),
            texts=np.concatenate([part.shown.texts for part in parts]),
        ),
    )


def _figures(one: Judged) -> dict[str, Any]:
    count, right = len(one.right), int(one.right.sum())
    return {
        "samples": count,
        "right": right,
        "accuracy": right / count,
        "accuracy_interval": wilson_interval(right, count),
        "logit": float(one.logits.mean()),
        "clip_score": clip_score(one.shown.pictures, one.shown.texts),
    }


def _distances(pictures: Features, reference: Reference) -> dict[str, float]:
    found = precision_recall(reference.manifold, balls(pictures, reference.neighbors))
    return {
        "frechet_distance": frechet_distance(pictures, reference.features),
        "precision": found.precision,
        "recall": found.recall,
    }
