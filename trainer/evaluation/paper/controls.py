"""Negative controls: the evaluation's requests with neighbors that were not retrieved for them.

Prompts, seeds and all settings stay the same, so that only the neighbors can explain a difference.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from retrieval.database.database import Database
from retrieval.errors import UserError
from trainer.evaluation.intervals import Estimate, Rows, share
from trainer.evaluation.scores import Evaluator, FeaturesByGroup, results
from trainer.model.context import Vectors, at_raw_norm
from trainer.model.recipe import ContextNorm
from trainer.sampling.conditioning import ConditionedRequest

SHUFFLED, RANDOM_ROWS, OTHER_PROMPT = "shuffled", "random_rows", "other_prompt"
CONTROLS = (SHUFFLED, RANDOM_ROWS, OTHER_PROMPT)
"""Neighbors of another prompt in another style's database; random rows of the training database; neighbors of
another prompt in the same style's database."""

RequestsByStyle = Mapping[str, Sequence[ConditionedRequest]]
"""Conditioned requests by style, the same number for each style."""


def control(name: str, style: str, requests: RequestsByStyle, rows: Sequence[Vectors]) -> list[ConditionedRequest]:
    """The requests of a style under a control. rows: random neighbors (k, dim) for each request."""
    originals = requests[style]
    if name == RANDOM_ROWS:
        return [_with_neighbors(request, vectors) for request, vectors in zip(originals, rows, strict=True)]
    count = len(originals)
    styles = donor_styles(list(requests), style, count) if name == SHUFFLED else [style] * count
    donors = [_other_prompt(requests[donor], i, originals[i].request.prompt) for i, donor in enumerate(styles)]
    return [
        replace(_with_neighbors(request, donor.context[1:]), neighbors=donor.neighbors)
        for request, donor in zip(originals, donors, strict=True)
    ]


def tables(features: FeaturesByGroup, evaluator: Evaluator) -> dict[str, Any]:
    """The results of all modes and controls (Fig. 4a and 4b), and the style that shuffled samples follow."""
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


def donor_styles(styles: Sequence[str], style: str, count: int) -> list[str]:
    """The style that provides the neighbors of each shuffled sample: cycles through all other styles."""
    at = list(styles).index(style)
    return [styles[(at + 1 + i % (len(styles) - 1)) % len(styles)] for i in range(count)]


def random_rows(
    database: Database, counts: Sequence[int], rng: np.random.Generator, norm: ContextNorm = "unit"
) -> list[Vectors]:
    """Random vectors of a database without its hidden rows: counts[i] distinct rows for sample i.

    norm: the length that the model needs of the vectors.
    """
    results = []
    for count in counts:
        positions = rng.choice(len(database), min(len(database), count + len(database.hidden)), replace=False)
        ids, vectors = database.rows_at(positions)
        if norm == "raw":
            vectors = at_raw_norm(vectors, database.norms_at(positions), f"database {database.name}")
        results.append(vectors[~np.isin(ids, database.hidden)][:count])
    return results


def derangement(count: int, rng: np.random.Generator) -> Rows:
    """A random permutation of `count` rows, at least 2, without fixed points."""
    order = rng.permutation(count)
    result = np.empty(count, np.int64)
    result[order] = np.roll(order, 1)
    return result


def _with_neighbors(request: ConditionedRequest, neighbors: Vectors) -> ConditionedRequest:
    context = np.concatenate([request.context[:1], neighbors])
    weights = np.full(len(context), request.request.neighbor_weight, np.float32)
    weights[0] = 1  # the prompt
    return replace(request, neighbors=(), context=context, weights=weights)


def _other_prompt(donors: Sequence[ConditionedRequest], i: int, prompt: str) -> ConditionedRequest:
    """The first donor after position i, cyclically, with another prompt."""
    for donor in (*donors[i + 1 :], *donors[: i + 1]):
        if donor.request.prompt != prompt:
            return donor
    raise UserError("the controls need at least 2 different prompts, [evaluate] prompts_file has 1. Add a prompt.")
