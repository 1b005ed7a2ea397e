"""Scores of samples: accuracy, logits, CLIP score and distances (paper section 2.2, Fig. 4a and 4b).

Takes CLIP features of samples by mode and style and a trained style classifier, returns plain values for
JSON. Pure functions: `trainer.evaluation.evaluate` draws the samples and stores the result.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from trainer.evaluation.classifier import TrainedClassifier
from trainer.evaluation.metrics import (
    Features,
    Manifold,
    bootstrap_improvement,
    clip_score,
    fit_manifold,
    frechet_distance,
    precision_recall,
    relative_improvement,
    wilson_interval,
)
from trainer.evaluation.styles import MODES, RETRIEVAL, SUFFIX


@dataclass(frozen=True)
class SampleFeatures:
    """CLIP features (n, dim) of the samples of one mode and style, and of their prompts without the style."""

    pictures: Features
    texts: Features


@dataclass(frozen=True)
class StyleScores:
    """Output of the style classifier for the samples of one mode and style."""

    correct: npt.NDArray[np.bool_]
    """(n,) whether the sample is classified as its style."""
    logits: npt.NDArray[np.float32]
    """(n,) logit of the requested style minus the mean of all: softmax ignores a common shift."""
    features: SampleFeatures


@dataclass(frozen=True)
class Reference:
    """Features (n, dim) of the style databases and their manifold for precision and recall."""

    features: Features
    manifold: Manifold
    neighbors: int
    """The nearest neighbor that sets the radius of manifolds."""


FeaturesByGroup = Mapping[tuple[str, str], SampleFeatures]
"""Features by (mode, style)."""


def score(classifier: TrainedClassifier, style: str, features: SampleFeatures) -> StyleScores:
    """Classify samples that were requested in a style."""
    label = classifier.network.styles.index(style)
    logits = classifier.network.logits(features.pictures)
    return StyleScores(np.argmax(logits, axis=1) == label, logits[:, label] - logits.mean(axis=1), features)


def evaluation(
    classifier: TrainedClassifier, features: FeaturesByGroup, reference: Reference, seed: int
) -> dict[str, Any]:
    """All results: by style, by mode, and flat values that the demo's report reads."""
    styles = classifier.network.styles
    scores = {(mode, style): score(classifier, style, group) for (mode, style), group in features.items()}
    totals = {mode: pool([scores[mode, style] for style in styles]) for mode in MODES}
    ours, baseline = totals[RETRIEVAL].correct, totals[SUFFIX].correct
    return {
        "styles": [_style(classifier, style, {mode: scores[mode, style] for mode in MODES}) for style in styles],
        "modes": {
            mode: {**_values(total), **_distances(total.features.pictures, reference)} for mode, total in totals.items()
        },
        "relative_improvement": relative_improvement(float(ours.mean()), float(baseline.mean())),
        "relative_improvement_interval": bootstrap_improvement(ours, baseline, seed),
        "chance": 1 / len(styles),
        "num_styles": len(styles),
        "style_classifier_accuracy": classifier.held_out_accuracy,
        "style_classifier_rows": classifier.held_out_rows,
        **{f"style_accuracy_{mode}": float(total.correct.mean()) for mode, total in totals.items()},
    }


def _style(classifier: TrainedClassifier, style: str, by_mode: Mapping[str, StyleScores]) -> dict[str, Any]:
    ours, baseline = (float(by_mode[mode].correct.mean()) for mode in (RETRIEVAL, SUFFIX))
    return {
        "style": style,
        "held_out_accuracy": classifier.held_out_by_style[style],
        "relative_improvement": relative_improvement(ours, baseline),
        "modes": {mode: _values(scores) for mode, scores in by_mode.items()},
    }


def pool(parts: Sequence[StyleScores]) -> StyleScores:
    """The scores of several styles, concatenated in order."""
    return StyleScores(
        correct=np.concatenate([part.correct for part in parts]),
        logits=np.concatenate([part.logits for part in parts]),
        features=SampleFeatures(
            pictures=np.concatenate([part.features.pictures for part in parts]),
            texts=np.concatenate([part.features.texts for part in parts]),
        ),
    )


def _values(scores: StyleScores) -> dict[str, Any]:
    count, correct = len(scores.correct), int(scores.correct.sum())
    return {
        "samples": count,
        "right": correct,
        "accuracy": correct / count,
        "accuracy_interval": wilson_interval(correct, count),
        "logit": float(scores.logits.mean()),
        "clip_score": clip_score(scores.features.pictures, scores.features.texts),
    }


def _distances(pictures: Features, reference: Reference) -> dict[str, float]:
    samples = fit_manifold(pictures, reference.neighbors)
    precision, recall = precision_recall(reference.manifold, samples)
    return {
        "frechet_distance": frechet_distance(pictures, reference.features),
        "precision": precision,
        "recall": recall,
    }
