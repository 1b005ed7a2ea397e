"""Result tables of the paper with confidence intervals: Fig. 4a, 4b and the controls.

Takes CLIP features of samples by mode and style, returns plain values for JSON. Pure functions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trainer.evaluation.classifier import TrainedClassifier
from trainer.evaluation.metrics import (
    Gaussian,
    bootstrap_improvement,
    fit_manifold,
    relative_improvement,
    wilson_interval,
)
from trainer.evaluation.paper.controls import SHUFFLED, donor_styles
from trainer.evaluation.paper.intervals import Bootstrap, Estimate
from trainer.evaluation.scores import FeaturesByGroup, Reference, StyleScores, pool, score
from trainer.evaluation.styles import RETRIEVAL, SUFFIX


@dataclass(frozen=True)
class Evaluator:
    """The style classifier, the reference of distances, and the bootstrap of intervals."""

    classifier: TrainedClassifier
    reference: Reference
    bootstrap: Bootstrap

    @property
    def styles(self) -> tuple[str, ...]:
        """The styles, in the order of the classifier's logits."""
        return self.classifier.network.styles


def tables(features: FeaturesByGroup, evaluator: Evaluator) -> dict[str, Any]:
    """A row for each mode over all styles, and a row for each style (Fig. 4a and 4b)."""
    styles, bootstrap = evaluator.styles, evaluator.bootstrap
    scores = {key: score(evaluator.classifier, key[1], group) for key, group in features.items()}
    modes = list(dict.fromkeys(mode for mode, _ in features))
    totals = {mode: pool([scores[mode, style] for style in styles]) for mode in modes}
    gaussian = Gaussian.fit(evaluator.reference.features)
    ours, baseline = totals[RETRIEVAL].correct, totals[SUFFIX].correct
    return {
        "chance": 1 / len(styles),
        "judge_accuracy": evaluator.classifier.held_out_accuracy,
        "modes": {mode: _mode_row(total, gaussian, evaluator) for mode, total in totals.items()},
        "effect": {
            mode: bootstrap.mean(ours.astype(float) - totals[mode].correct) for mode in modes if mode != RETRIEVAL
        },
        "relative_improvement": _improvement(ours, baseline, bootstrap),
        "styles": [
            {
                "style": style,
                "relative_improvement": _improvement(
                    scores[RETRIEVAL, style].correct, scores[SUFFIX, style].correct, bootstrap
                ),
                "modes": {mode: _values(scores[mode, style], bootstrap) for mode in (RETRIEVAL, SUFFIX)},
            }
            for style in styles
        ],
        "shuffled_follows_its_neighbors": _donor_accuracy(features, styles, evaluator),
    }


def share(flags: Any) -> Estimate:
    """The share of true values (n,) with Wilson's interval, which has a width even if all are true."""
    return Estimate(float(np.mean(flags)), *wilson_interval(int(np.sum(flags)), len(flags)))


def _values(scores: StyleScores, bootstrap: Bootstrap) -> dict[str, Any]:
    pictures, texts = scores.features.pictures, scores.features.texts
    return {
        "samples": len(scores.correct),
        "accuracy": share(scores.correct),
        "logit": bootstrap.mean(scores.logits),
        "clip_score": bootstrap.mean(np.sum(pictures.astype(np.float64) * texts, axis=1)),
    }


def _mode_row(total: StyleScores, gaussian: Gaussian, evaluator: Evaluator) -> dict[str, Any]:
    """Values of a mode with Fréchet distance, precision (over samples) and recall (over the reference)."""
    # Precision and recall resample rows with fixed manifolds: duplicate rows would shrink a manifold.
    pictures, bootstrap, reference = total.features.pictures, evaluator.bootstrap, evaluator.reference
    covered = fit_manifold(pictures, reference.neighbors).contains(reference.features)
    return {
        **_values(total, bootstrap),
        "frechet_distance": bootstrap.basic_interval(lambda rows: gaussian.distance(pictures[rows]), len(pictures)),
        "precision": bootstrap.mean(reference.manifold.contains(pictures)),
        "recall": bootstrap.mean(covered),
    }


def _improvement(ours: Any, baseline: Any, bootstrap: Bootstrap) -> dict[str, Any]:
    """Accuracy relative to the style in the prompt; None if that baseline has no success."""
    return {
        "value": relative_improvement(float(ours.mean()), float(baseline.mean())),
        "interval": bootstrap_improvement(ours, baseline, bootstrap.seed, bootstrap.draws),
    }


def _donor_accuracy(features: FeaturesByGroup, styles: Sequence[str], evaluator: Evaluator) -> Estimate:
    """Share of shuffled samples that are classified as the style of their neighbors."""
    correct: list[bool] = []
    for style in styles:
        labels = np.argmax(evaluator.classifier.network.logits(features[SHUFFLED, style].pictures), axis=1)
        donors = donor_styles(styles, style, len(labels))
        correct += [styles[label] == donor for label, donor in zip(labels, donors, strict=True)]
    return share(correct)
