"""Result tables of the paper with the controls: Fig. 4a and 4b. Pure functions."""

from typing import Any

import numpy as np

from trainer.evaluation.intervals import Estimate, share
from trainer.evaluation.paper.controls import SHUFFLED, donor_styles
from trainer.evaluation.scores import Evaluator, FeaturesByGroup, results


def tables(features: FeaturesByGroup, evaluator: Evaluator) -> dict[str, Any]:
    """The results of all modes and controls, and the style that shuffled samples follow."""
    return {**results(features, evaluator), "shuffled_follows_its_neighbors": _donor_accuracy(features, evaluator)}


def _donor_accuracy(features: FeaturesByGroup, evaluator: Evaluator) -> Estimate:
    """Share of shuffled samples that are classified as the style of their neighbors."""
    correct: list[bool] = []
    prompts: list[str] = []
    for style in evaluator.styles:
        group = features[SHUFFLED, style]
        labels = np.argmax(evaluator.classifier.network.logits(group.pictures), axis=1)
        donors = donor_styles(evaluator.styles, style, len(labels))
        correct += [evaluator.styles[label] == donor for label, donor in zip(labels, donors, strict=True)]
        prompts += group.prompts
    return share(correct, prompts)
