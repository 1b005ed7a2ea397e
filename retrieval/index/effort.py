"""Search effort, and the choice of an effort by the recalls that a calibration measured.

A calibration is a list of efforts with their recall for several k. The manifest of a database contains one for each
kind of queries.
"""

import itertools
import math
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any, Self

from retrieval.errors import UserError

QUERY_KINDS = ("images", "texts")
"""Kinds of queries, calibrated separately: text vectors lie apart from image vectors and need more effort."""


@dataclass(frozen=True)
class Effort:
    """How many partitions, lists and candidates a search visits."""

    partitions_per_query: int
    """Partitions that a query visits; more are visited where these hold fewer than k rows."""
    lists_per_partition: int
    """Inverted lists that it visits in each of these partitions."""
    candidates_per_result: int
    """Rows per wanted result that each partition ranks by their exact similarity."""

    def __post_init__(self) -> None:
        if min(self.partitions_per_query, self.lists_per_partition, self.candidates_per_result) < 1:
            raise UserError(f"all numbers of an effort must be at least 1, got {self}")


@dataclass(frozen=True)
class MeasuredEffort:
    """An effort and its recall of k neighbors over `queries` queries, with the 95 % interval `low` to `high`.

    An effort that compares all rows has `low` 1 and 0 queries, because its recall is 1 without a measurement.
    """

    effort: Effort
    recall: float
    low: float
    high: float
    queries: int
    k: int

    @property
    def is_exact(self) -> bool:
        """Whether the effort compares all rows."""
        return self.low == 1

    @classmethod
    def from_manifest(cls, values: dict[str, Any]) -> Self:
        """An entry of a calibration as the manifest stores it."""
        return cls(**{**values, "effort": Effort(**values["effort"])})


@dataclass(frozen=True)
class ChosenEffort:
    """The effort that a calibration selects for a recall and a k."""

    effort: Effort
    is_exact: bool
    """Whether all rows are compared, because no cheaper effort reached the recall."""
    max_k: int
    """Largest k that was measured. Beyond it the effort is scaled up and its recall was not measured."""
    best: float
    """Highest lower end of an interval that an effort reached for this k without comparing all rows."""


def choose_effort(calibration: list[MeasuredEffort], recall: float, k: int) -> ChosenEffort:
    """The cheapest effort that reached a recall of k neighbors, also with the lower end of its interval.

    calibration: for each k ascending in cost, the last one exact. Between two measured k partitions and lists are
    interpolated linearly over log k, which is above their true growth; of the candidates the larger value is taken.
    Where no effort reached the recall for a k, for example with few queries, that of a larger k serves.
    Raises UserError unless recall is a number in (0, 1].
    """
    if not (isinstance(recall, Real) and 0 < recall <= 1):
        raise UserError(f"recall must be above 0 and at most 1, got {recall!r}")
    cheapest: dict[int, MeasuredEffort] = {}
    for entry in calibration:
        if entry.low >= recall:
            cheapest.setdefault(entry.k, entry)
    max_k = max(cheapest)
    for smaller, larger in reversed([*itertools.pairwise(sorted(cheapest))]):
        if cheapest[smaller].is_exact and not cheapest[larger].is_exact:
            cheapest[smaller] = _for_fewer(cheapest[larger], smaller)
    below = cheapest[max((measured for measured in cheapest if measured <= k), default=min(cheapest))]
    above = cheapest[min((measured for measured in cheapest if measured >= k), default=max_k)]
    limit = below if below.is_exact else above
    lows = (entry.low for entry in calibration if entry.k == limit.k and not entry.is_exact)
    best = max(lows, default=0.0)
    if limit.is_exact:
        return ChosenEffort(limit.effort, True, max_k, best)
    if k > max_k:
        scale = math.ceil(k / max_k)
        lists, partitions = below.effort.lists_per_partition, below.effort.partitions_per_query
        effort = Effort(scale * partitions, scale * lists, below.effort.candidates_per_result)
        return ChosenEffort(effort, False, max_k, best)
    weight = math.log(k / below.k) / math.log(above.k / below.k) if above.k > below.k else 0.0
    return ChosenEffort(_between(below.effort, above.effort, weight), False, max_k, best)


def _for_fewer(entry: MeasuredEffort, k: int) -> MeasuredEffort:
    """The effort for fewer neighbors with the same lists and candidates: it returns nearer neighbors more often."""
    candidates = entry.effort.candidates_per_result * math.ceil(entry.k / k)
    return replace(entry, effort=replace(entry.effort, candidates_per_result=candidates), k=k)


def _between(low: Effort, high: Effort, weight: float) -> Effort:
    def value(first: int, second: int) -> int:
        return math.ceil(first + weight * (second - first))

    return Effort(
        value(low.partitions_per_query, high.partitions_per_query),
        value(low.lists_per_partition, high.lists_per_partition),
        max(low.candidates_per_result, high.candidates_per_result),
    )
