"""Tunes every method, then times the chosen settings in turns, so that a noisy minute hits all alike.

Settings are chosen on the first half of the queries and reported on the other half. A ratio is taken
between two methods within one round, then the median over the rounds.
"""

import statistics
from dataclasses import dataclass, field
from typing import Any

from benchmarks.retrieval.catalog import Effort
from benchmarks.retrieval.data import ASKED, K
from benchmarks.retrieval.workers import Worker

TARGETS = (0.95, 0.99)
MODES = ("single", "batch")
ROUNDS = 5
MARGIN = 0.002
"""Recall above the target that tuning asks for, so that most choices hold on the other half."""
HALF = ASKED // 2
WORTH_TIMING = 0.85
"""Settings of lower recall are not timed."""
SINGLE_S, BATCH_S = 1.0, 2.0
"""A slow method is asked fewer queries, to stay within so many seconds."""


@dataclass
class Point:
    """One setting of one method, measured once while tuning."""

    effort: Effort
    recall: float
    seconds: dict[str, float] = field(default_factory=dict)
    """Per query, by mode."""


@dataclass
class Chosen:
    """One method at one target in one mode."""

    method: str
    mode: str
    target: float
    effort: Effort
    recall: float = 0.0
    seconds: list[float] = field(default_factory=list)
    """Per query, one for each round."""
    ratios: list[float] = field(default_factory=list)
    """How many times faster than the baseline in the same round."""

    def summary(self) -> dict[str, Any]:
        """For the report."""
        return {
            "method": self.method,
            "mode": self.mode,
            "target": self.target,
            "effort": list(self.effort),
            "recall": round(self.recall, 4),
            "ms": round(statistics.median(self.seconds) * 1e3, 4),
            "ratio": round(statistics.median(self.ratios), 3) if self.ratios else None,
            "ratio_range": [round(end(self.ratios), 3) for end in (min, max)] if self.ratios else None,
        }


def tune(workers: list[Worker]) -> dict[str, list[Point]]:
    """Every setting of every method, interleaved: recall, and times where the recall is worth it."""
    points: dict[str, list[Point]] = {worker.entry.name: [] for worker in workers}
    for step in range(max(len(worker.entry.efforts) for worker in workers)):
        for worker in workers:
            if step < len(worker.entry.efforts):
                points[worker.entry.name].append(_point(worker, worker.entry.efforts[step]))
    return points


def _point(worker: Worker, effort: Effort) -> Point:
    probe = worker.ask("measure", mode="single", k=K, effort=effort, start=0, count=20)
    slow = probe["wall_s"] * HALF / 2 > BATCH_S
    first = worker.ask("measure", mode="batch", k=K, effort=effort, start=0, count=100 if slow else HALF)
    point = Point(effort, first["recall"])
    if point.recall >= WORTH_TIMING:
        count = min(300, max(20, int(SINGLE_S / probe["wall_s"])))
        single = worker.ask("measure", mode="single", k=K, effort=effort, start=0, count=count)
        point.seconds = {"single": single["wall_s"], "batch": first["wall_s"]}
    return point


def choose(points: list[Point], mode: str, target: float) -> Point | None:
    """The fastest setting that reaches the target; none if no setting does."""
    good = [point for point in points if point.recall >= target + MARGIN and point.seconds]
    return min(good, key=lambda point: point.seconds[mode], default=None)


def best_effort(points: list[Point], mode: str, target: float) -> Point | None:
    """The choice for a target; a method with one setting takes part with that, whatever it reaches."""
    return points[0] if len(points) == 1 and points[0].seconds else choose(points, mode, target)


def compare(workers: list[Worker], points: dict[str, list[Point]], baseline: str) -> list[Chosen]:
    """Interleaved rounds at every target in every mode."""
    results = []
    for target in TARGETS:
        for mode in MODES:
            chosen = []
            for worker in workers:
                point = best_effort(points[worker.entry.name], mode, target)
                if point is not None:
                    chosen.append((worker, point, Chosen(worker.entry.name, mode, target, point.effort)))
            for _ in range(ROUNDS):
                _round([(worker, point.seconds[mode], result) for worker, point, result in chosen], baseline)
            results += [result for _, _, result in chosen]
    return results


def _round(chosen: list[tuple[Worker, float, Chosen]], baseline: str) -> None:
    for worker, seconds, result in chosen:
        options = {"mode": result.mode, "k": K, "effort": result.effort}
        limit = int((SINGLE_S if result.mode == "single" else BATCH_S) / seconds)
        if not result.seconds:
            count = HALF if seconds * HALF < 4 * BATCH_S else max(10, limit)
            result.recall = worker.ask("measure", start=HALF, count=count, **{**options, "mode": "batch"})[
                "recall"
            ]
        most = HALF if result.mode == "single" else ASKED
        count = max(10, min(most, limit))
        measured = worker.ask("measure", start=max(0, HALF - max(0, count - HALF)), count=count, **options)
        result.seconds.append(measured["wall_s"])
    base = next((result for _, _, result in chosen if result.method == baseline), None)
    if base is not None:
        for _, _, result in chosen:
            result.ratios.append(base.seconds[-1] / result.seconds[-1])
