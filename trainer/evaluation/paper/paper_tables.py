"""What the judge and the distances say of each way to ask, with intervals (paper Fig. 4a, 4b; controls).

Takes CLIP features of samples by mode and style, gives plain values for JSON. Pure.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trainer.evaluation.classifier import TrainedClassifier
from trainer.evaluation.judgement import Judged, Reference, Samples, judge, pooled
from trainer.evaluation.metrics import (
    Gaussian,
    balls,
    bootstrap_improvement,
    relative_improvement,
    wilson_interval,
)
from trainer.evaluation.paper.controls import SHUFFLED, donor_styles
from trainer.evaluation.paper.intervals import Bootstrap, Estimate
from trainer.evaluation.styles import RETRIEVAL, SUFFIX


@dataclass(frozen=True)
class Ruler:
    """What samples are measured with."""

    classifier: TrainedClassifier
    reference: Reference
    bootstrap: Bootstrap


def tables(samples: Samples, ruler: Ruler) -> dict[str, Any]:
    """A row for each mode over all styles, and one for each style: Fig. 4a and 4b."""
    styles = ruler.classifier.classifier.styles
    judged = {key: judge(ruler.classifier, key[1], shown) for key, shown in samples.items()}
    modes = list(dict.fromkeys(mode for mode, _ in samples))
    totals = {mode: pooled([judged[mode, style] for style in styles]) for mode in modes}
    gaussian = Gaussian.fit(ruler.reference.features)
    ours, baseline = totals[RETRIEVAL].right, totals[SUFFIX].right
    return {
        "chance": 1 / len(styles),
        "judge_accuracy": ruler.classifier.held_out_accuracy,
        "modes": {mode: _row(total, gaussian, ruler) for mode, total in totals.items()},
        "effect": {
            mode: ruler.bootstrap.mean(ours.astype(float) - total.right)
            for mode, total in totals.items()
            if mode != RETRIEVAL
        },
        "relative_improvement": _improvement(ours, baseline, ruler.bootstrap),
        "styles": [
            {
                "style": style,
                "relative_improvement": _improvement(
                    judged[RETRIEVAL, style].right, judged[SUFFIX, style].right, ruler.bootstrap
                ),
                "modes": {
                    mode: _figures(judged[mode, style], ruler.bootstrap) for mode in (RETRIEVAL, SUFFIX)
                },
            }
            for style in styles
        ],
        "shuffled_follows_its_neighbors": _followed(samples, styles, ruler),
    }


def share(right: Any) -> Estimate:
    """The share of true values (n,), with Wilson's interval: it has a width where all are true."""
    return Estimate(float(np.mean(right)), *wilson_interval(int(np.sum(right)), len(right)))


def _figures(one: Judged, bootstrap: Bootstrap) -> dict[str, Any]:
    return {
        "samples": len(one.right),
        "accuracy": share(one.right),
        "logit": bootstrap.mean(one.logits),
        "clip_score": bootstrap.mean(np.sum(one.shown.pictures.astype(np.float64) * one.shown.texts, axis=1)),
    }


def _row(total: Judged, gaussian: Gaussian, ruler: Ruler) -> dict[str, Any]:
    """The figures, the Fréchet distance in CLIP space, precision over samples and recall over the reference.

    Precision and recall draw rows again within fixed manifolds: rows drawn twice would make a smaller one.
    """
    pictures, bootstrap = total.shown.pictures, ruler.bootstrap
    real = ruler.reference
    covered = balls(pictures, real.neighbors).cover(real.features)
    return {
        **_figures(total, bootstrap),
        "frechet_distance": bootstrap.mirrored(lambda rows: gaussian.distance(pictures[rows]), len(pictures)),
        "precision": bootstrap.mean(real.manifold.cover(pictures)),
        "recall": bootstrap.mean(covered),
    }


def _improvement(ours: Any, baseline: Any, bootstrap: Bootstrap) -> dict[str, Any]:
    """Accuracy relative to naming the style, as a share; None where that is never taken for it."""
    return {
        "value": relative_improvement(float(ours.mean()), float(baseline.mean())),
        "interval": bootstrap_improvement(ours, baseline, bootstrap.seed, bootstrap.draws),
    }


def _followed(samples: Samples, styles: Sequence[str], ruler: Ruler) -> Estimate:
    """Share of shuffled samples that are taken for the style whose neighbors they got."""
    classifier = ruler.classifier.classifier
    right: list[bool] = []
    for style in styles:
        taken = np.argmax(classifier.logits(samples[SHUFFLED, style].pictures), axis=1)
        donors = donor_styles(styles, style, len(taken))
        right += [styles[label] == donor for label, donor in zip(taken, donors, strict=True)]
    return share(right)
