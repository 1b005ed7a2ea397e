"""The negative controls: the evaluation's own requests, with neighbors that were found for something else.

Takes what retrieval gave for the prompts of each style, gives the same with other neighbors. Prompts,
seeds and all settings stay, so that the neighbors alone can explain a difference.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from retrieval.database.database import Database
from retrieval.errors import UserError
from trainer.evaluation.paper.intervals import Rows
from trainer.model.context import Vectors
from trainer.sampling.conditioning import Conditioned

SHUFFLED, RANDOM_ROWS, OTHER_PROMPT = "shuffled", "random_rows", "other_prompt"
CONTROLS = (SHUFFLED, RANDOM_ROWS, OTHER_PROMPT)
"""Neighbors that another prompt found in another style's database: no way to the wanted style; rows drawn
from the training database; neighbors that another prompt found in the wanted style's database."""

Found = Mapping[str, Sequence[Conditioned]]
"""By style; as many for each."""


def control(name: str, style: str, found: Found, rows: Sequence[Vectors]) -> list[Conditioned]:
    """The samples of a style under a control. rows: random neighbors (k, dim) for each of them."""
    own = found[style]
    if name == RANDOM_ROWS:
        return [_told(one, vectors) for one, vectors in zip(own, rows, strict=True)]
    donors = donor_styles(list(found), style, len(own)) if name == SHUFFLED else [style] * len(own)
    others = [_other(found[donor], i, own[i].request.prompt) for i, donor in enumerate(donors)]
    return [
        replace(_told(one, other.context[1:]), neighbors=other.neighbors)
        for one, other in zip(own, others, strict=True)
    ]


def donor_styles(styles: Sequence[str], style: str, count: int) -> list[str]:
    """Whose neighbors `count` shuffled samples of a style get: all other styles in turn, never its own."""
    at = list(styles).index(style)
    return [styles[(at + 1 + i % (len(styles) - 1)) % len(styles)] for i in range(count)]


def random_rows(database: Database, counts: Sequence[int], rng: np.random.Generator) -> list[Vectors]:
    """Unit vectors of rows drawn from those a database shows: counts[i] different ones for sample i."""
    results = []
    for count in counts:
        drawn = rng.choice(len(database), min(len(database), count + len(database.hidden)), replace=False)
        ids, vectors = database.rows_at(drawn)
        results.append(vectors[~np.isin(ids, database.hidden)][:count])
    return results


def deranged(count: int, rng: np.random.Generator) -> Rows:
    """A permutation of `count` rows, at least 2, that leaves none in its place."""
    order = rng.permutation(count)
    result = np.empty(count, np.int64)
    result[order] = np.roll(order, 1)
    return result


def _told(one: Conditioned, neighbors: Vectors) -> Conditioned:
    context = np.concatenate([one.context[:1], neighbors])
    return replace(one, neighbors=(), context=context, weights=np.ones(len(context), np.float32))


def _other(donors: Sequence[Conditioned], i: int, prompt: str) -> Conditioned:
    """The next donor of another prompt."""
    for donor in (*donors[i + 1 :], *donors[: i + 1]):
        if donor.request.prompt != prompt:
            return donor
    raise UserError("the controls need at least 2 different prompts; [evaluate] prompts_file has 1.")
