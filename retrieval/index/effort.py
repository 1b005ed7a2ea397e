"""Search effort. The manifest of a database lists efforts with the recall that the calibration measured."""

from dataclasses import dataclass
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
    """An effort and its recall over `queries` queries, with the 95 % interval `low` to `high`."""

    effort: Effort
    recall: float
    low: float
    high: float
    queries: int
    k: int

    @classmethod
    def from_manifest(cls, values: dict[str, Any]) -> Self:
        """An entry of a calibration as the manifest stores it."""
        return cls(**{**values, "effort": Effort(**values["effort"])})


def cheapest_effort(calibration: list[MeasuredEffort], recall: float) -> Effort:
    """The cheapest effort that reached a recall; the most expensive one where none reached it.

    calibration: ascending in cost. Raises UserError unless recall is in (0, 1].
    """
    if not 0 < recall <= 1:
        raise UserError(f"recall must be above 0 and at most 1, got {recall}")
    reached = [entry for entry in calibration if entry.recall >= recall]
    return (reached[0] if reached else calibration[-1]).effort
