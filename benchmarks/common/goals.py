"""The goals that were set before anything was measured, and what one run says about them."""

from dataclasses import dataclass
from typing import Any

from benchmarks.retrieval.catalog import DATABASE


@dataclass(frozen=True)
class Goal:
    """One line of the table."""

    what: str
    wanted: float
    reached: float
    at_most: bool = False
    """Whether the goal is an upper bound."""
    unit: str = "x"

    @property
    def met(self) -> bool:
        """Whether it is reached."""
        return self.reached <= self.wanted if self.at_most else self.reached >= self.wanted

    @property
    def cells(self) -> list[str]:
        """A row of the table, with the distance in percent where it is missed."""
        sign, unit = "<=" if self.at_most else ">=", " x" if self.unit == "x" else self.unit
        verdict = "reached" if self.met else f"**missed by {abs(self.reached / self.wanted - 1):.1%}**"
        return [self.what, f"{sign} {self.wanted:g}{unit}", f"{self.reached:.3g}{unit}", verdict]


def goals(result: dict[str, Any]) -> list[Goal]:
    """Every goal that this run can judge."""
    return [*_search(result), *_join(result), *_engine(result)]


def _search(result: dict[str, Any]) -> list[Goal]:
    names = {"single": "single query, one thread", "batch": "batch, two threads"}
    wanted = {("single", 0.95): 2.0, ("single", 0.99): 1.2, ("batch", 0.95): 1.5, ("batch", 0.99): 1.2}
    return [
        Goal(
            f"{names[found['mode']]}, recall@20 >= {found['target']}, times ScaNN's rate",
            wanted[found["mode"], found["target"]],
            found["ratio"],
        )
        for found in result.get("search", {}).get("chosen", [])
        if found["method"] == DATABASE.name and found["ratio"] is not None
    ]


def _join(result: dict[str, Any]) -> list[Goal]:
    wanted = {"ivf-flat": 8.0, "fast-scan": 2.0}
    return [
        Goal(
            f"join, recall@8 >= 0.965, CPU time against {found['label']}",
            wanted[found["method"]],
            found["ours_cpu_ratio"],
        )
        for found in result.get("join", [])
        if found["method"] in wanted
    ]


def _engine(result: dict[str, Any]) -> list[Goal]:
    if "engine" not in result:
        return []
    over, opening = result["engine"]["overheads"], result["engine"]["opening"]
    texts = [
        row for row in result["engine"]["calibration"] if row["calibrated_on"] == row["queries"] == "texts"
    ]
    return [
        Goal(
            "`Database.search`, batches of 1,000, against bare faiss",
            1.1,
            over["database_ratio"],
            at_most=True,
        ),
        Goal("through Ray, batches of 1,000, against bare faiss", 1.25, over["cluster_ratio"], at_most=True),
        Goal(
            "opening, until the first answer", 0.5, opening["first_answer_seconds"], at_most=True, unit=" s"
        ),
        Goal(
            "resident after 100 searches, share of the vectors", 0.25, opening["share"], at_most=True, unit=""
        ),
        *(
            Goal(
                f"texts, recall asked for by calibration: {row['target']}",
                row["target"],
                row["recall"],
                unit="",
            )
            for row in texts
        ),
    ]
