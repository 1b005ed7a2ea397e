"""How hard a search looks, and which effort reaches a wanted recall on this database.

A calibration is a list of efforts with their measured recall, the cheapest first, as `retrieval.database.calibration`
measured them on a seeded sample; it stands in the manifest of the database.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt

from retrieval.errors import UserError

STREAMS = ("images", "texts")
"""What queries are like: rows of the database's kind, or texts, which lie apart and need more effort."""


ROUNDING = 1e-5
"""Similarities of unit vectors this close differ by the order of summation alone."""


@dataclass(frozen=True)
class Effort:
    """What a search visits."""

    probes: int
    """Partitions each query visits; more are visited where these hold fewer than k rows."""
    lists: int
    """Inverted lists it visits in each of them."""
    candidates: int
    """Rows ranked by their exact similarity in each of them, for each wanted result."""

    def __post_init__(self) -> None:
        if min(self.probes, self.lists, self.candidates) < 1:
            raise UserError(f"an effort counts from 1, got {self}")


@dataclass(frozen=True)
class Measured:
    """An effort and what it found: recall over `queries` queries with its 95 % interval."""

    effort: Effort
    recall: float
    low: float
    high: float
    queries: int
    k: int


def measured(values: dict[str, Any]) -> Measured:
    """A line of a calibration as the manifest holds it."""
    return Measured(effort=Effort(**values["effort"]), **{k: v for k, v in values.items() if k != "effort"})


def interval(recalls: npt.NDArray[Any]) -> tuple[float, float, float]:
    """The mean of recalls per query, (n,) in [0, 1], and its 95 % interval by the normal approximation.

    Where all n are perfect, their spread says nothing and the lower end is 1 - 3/n: were more than that share
    of queries imperfect, one would be in the sample 19 times in 20.
    """
    n, mean = len(recalls), float(recalls.mean())
    half = 1.96 * float(recalls.std(ddof=1)) / math.sqrt(n) if n > 1 else 1.0
    low = 1 - 3 / n if mean == 1 else mean - half
    return round(mean, 5), round(max(0.0, low), 5), round(min(1.0, mean + half), 5)


def choose(lines: list[Measured], recall: float) -> Effort:
    """The cheapest effort that reached a recall, or the hardest there is where none did."""
    if not 0 < recall <= 1:
        raise UserError(f"recall must be above 0 and at most 1, got {recall}")
    reached = [line for line in lines if line.recall >= recall]
    return (reached[0] if reached else lines[-1]).effort
