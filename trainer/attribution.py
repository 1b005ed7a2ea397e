"""Leave-one-group-out attribution: samples a picture again without a group of database rows, and compares.

Takes a sampler, a request and a condition on the metadata, returns both samples; writes no files. Seed and settings
stay the same, so only the group explains a difference. What the model learned from the group in training remains.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from retrieval.database.database import Database
from retrieval.index.conditions import parse_condition, rows_that_meet
from trainer.sampling.conditioning import neighbor_table
from trainer.sampling.request import Neighbor, Request, Sample
from trainer.sampling.sampler import Sampler


@dataclass(frozen=True)
class Attribution:
    """A sample, the sample of the same request without a group of rows, and how far their pictures differ."""

    sample: Sample
    without: Sample
    clip_similarity: float
    """Cosine of the CLIP vectors of both pictures, -1..1."""
    pixel_difference: float
    """Mean absolute difference of the pixels, 0..255."""

    @property
    def removed(self) -> tuple[Neighbor, ...]:
        """Neighbors of `sample` that `without` does not have, in order."""
        return _not_in(self.without.neighbors, self.sample.neighbors)

    @property
    def added(self) -> tuple[Neighbor, ...]:
        """Neighbors of `without` in their place, in order."""
        return _not_in(self.sample.neighbors, self.without.neighbors)


def attribute(sampler: Sampler, request: Request, group: str) -> Attribution:
    """The picture of a request with and without the rows that meet the condition `group`, see `parse_condition`.

    A picture without such neighbors is neither searched for nor drawn again: it is the same to the bit. Otherwise the
    search without the group may return other rows of an approximate index, so `removed` may contain neighbors that do
    not meet the condition. Raises UserError for an invalid condition or request.
    """
    other = replace(request, without=_either(request.without, group))
    sampler.check([other])
    (batch,) = sampler.plan([request])
    databases = [sampler.database(name) for name in request.database_weights()]
    if any(_has_rows(group, batch.items[0].neighbors, database) for database in databases):
        (other_batch,) = sampler.plan([other])
        ((sample,),) = sampler.draw([batch])
        ((without,),) = sampler.draw([other_batch])
    else:
        ((sample,),) = sampler.draw([batch])
        without = replace(sample, request=other)
    first, second = sampler.encoder.encode_images([sample.picture, without.picture])
    pixels = [np.asarray(each.picture, np.float32) for each in (sample, without)]
    return Attribution(sample, without, float(first @ second), float(np.abs(pixels[0] - pixels[1]).mean()))


def _either(first: str, second: str) -> str:
    """The condition that one of two holds; `first` may be empty. Raises UserError if `second` is invalid."""
    parse_condition(second)
    # Each bracket is on a line of its own, since a condition may end in a comment.
    return second if first in ("", second) else f"({first}\n) or ({second}\n)"


def _has_rows(condition: str, neighbors: Sequence[Neighbor], database: Database) -> bool:
    """Whether a neighbor from this database meets a condition. Raises UserError if the database lacks its columns."""
    rows = neighbor_table([each for each in neighbors if each.database == database.name], database)
    return bool(rows_that_meet(parse_condition(condition), rows).any())


def _not_in(neighbors: Sequence[Neighbor], others: Sequence[Neighbor]) -> tuple[Neighbor, ...]:
    """Those of `others` that are not among `neighbors`."""
    known = _keys(neighbors)
    return tuple(each for each, key in zip(others, _keys(others), strict=True) if key not in known)


def _keys(neighbors: Sequence[Neighbor]) -> list[tuple[str, int]]:
    return [(each.database, each.image_id) for each in neighbors]
