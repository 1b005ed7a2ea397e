"""How hard a search looks, and which effort reaches a wanted recall on this database.

A calibration is a list of efforts with their measured recall, the cheapest first, as `retrieval.calibration`
measured them on a seeded sample; it stands in the manifest of the database.
"""

from dataclasses import dataclass
from typing import Any

from retrieval.errors import UserError

STREAMS = ("images", "texts")
"""What queries are like: rows of the database's kind, or texts, which lie apart and need more effort."""


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


def choose(lines: list[Measured], recall: float) -> Effort:
    """The cheapest effort that reached a recall, or the hardest there is where none did."""
    if not 0 < recall <= 1:
        raise UserError(f"recall must be above 0 and at most 1, got {recall}")
    reached = [line for line in lines if line.recall >= recall]
    return (reached[0] if reached else lines[-1]).effort
