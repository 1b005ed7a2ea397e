"""Leave-one-group-out attribution: samples a picture again without a group of database rows, and compares.

Takes a sampler, a request and a condition on the metadata, returns both samples; writes no files. Seed and settings
stay the same, so only the group explains a difference. What the model learned from the group in training remains.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from retrieval.index.conditions import parse_condition
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

    A picture without such neighbors is not drawn again: it is the same to the bit. A search of an approximate index
    without the group may return other rows too; `removed` and `added` list all. Raises UserError for an invalid
    condition or request.
    """
    parse_condition(group)
    condition = f"({request.without}) or ({group})" if request.without else group
    other = replace(request, without=condition)
    (batch,) = sampler.plan([other])  # first, so that an unknown column is refused before a picture is drawn
    (sample,) = sampler.sample([request])
    if _keys(batch.items[0].neighbors) == _keys(sample.neighbors):
        without = replace(sample, request=other)
    else:
        ((without,),) = sampler.draw([batch])
    first, second = sampler.encoder.encode_images([sample.picture, without.picture])
    pixels = [np.asarray(each.picture, np.float32) for each in (sample, without)]
    return Attribution(sample, without, float(first @ second), float(np.abs(pixels[0] - pixels[1]).mean()))


def _not_in(neighbors: Sequence[Neighbor], others: Sequence[Neighbor]) -> tuple[Neighbor, ...]:
    """Those of `others` that are not among `neighbors`."""
    known = _keys(neighbors)
    return tuple(each for each, key in zip(others, _keys(others), strict=True) if key not in known)


def _keys(neighbors: Sequence[Neighbor]) -> list[tuple[str, int]]:
    return [(each.database, each.image_id) for each in neighbors]
