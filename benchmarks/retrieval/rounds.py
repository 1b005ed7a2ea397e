"""Tunes every method, then times the chosen settings in interleaved rounds, so that all meet the same load.

Settings are chosen on the first half of the queries and timed on the other half. Ratios of two methods are
taken within one round; the result is the median over the rounds.
"""

import statistics
from dataclasses import dataclass, field
from typing import Any

from benchmarks.retrieval.catalog import Effort
from benchmarks.retrieval.data import NUM_QUERIES, K
from benchmarks.retrieval.workers import WorkerProcess

TARGETS = (0.95, 0.99)
MODES = ("single", "batch")
ROUNDS = 5
MARGIN = 0.002
"""Tuning requires this much more than the target, so that most settings reach it on the other half."""
TUNING_QUERIES = NUM_QUERIES // 2
MIN_TIMED_RECALL = 0.85
"""Settings with a lower recall are not timed."""
SINGLE_S, BATCH_S = 1.0, 2.0
"""Slow methods run fewer queries, so that a measurement takes at most so many seconds."""


@dataclass
class TuningResult:
    """A setting of a method with its recall and time, measured once."""

    effort: Effort
    recall: float
    seconds: dict[str, float] = field(default_factory=dict)
    """Seconds per query, by mode."""


@dataclass
class TimingResult:
    """A method at a target recall in a mode, timed in several rounds."""

    method: str
    mode: str
    target: float
    effort: Effort
    recall: float = 0.0
    seconds: list[float] = field(default_factory=list)
    """Seconds per query, one value for each round."""
    ratios: list[float] = field(default_factory=list)
    """Time of the baseline over time of this method, in the same round."""

    def summary(self) -> dict[str, Any]:
        """Medians over the rounds, as the report stores them."""
        return {
            "method": self.method,
            "mode": self.mode,
            "target": self.target,
            "effort": list(self.effort),
            "recall": round(self.recall, 4),
            "ms": round(statistics.median(self.seconds) * 1e3, 4),
            "ratio": round(statistics.median(self.ratios), 3) if self.ratios else None,
            "ratio_range": [round(extreme(self.ratios), 3) for extreme in (min, max)] if self.ratios else None,
        }


def tune(workers: list[WorkerProcess]) -> dict[str, list[TuningResult]]:
    """Recall of every setting of every method, and its time if the recall is at least MIN_TIMED_RECALL."""
    points: dict[str, list[TuningResult]] = {worker.method.name: [] for worker in workers}
    for step in range(max(len(worker.method.efforts) for worker in workers)):
        for worker in workers:
            if step < len(worker.method.efforts):
                points[worker.method.name].append(_measure_setting(worker, worker.method.efforts[step]))
    return points


def _measure_setting(worker: WorkerProcess, effort: Effort) -> TuningResult:
    trial = worker.call("measure", mode="single", k=K, effort=effort, start=0, count=20)
    slow = trial["wall_s"] * TUNING_QUERIES / 2 > BATCH_S
    first = worker.call("measure", mode="batch", k=K, effort=effort, start=0, count=100 if slow else TUNING_QUERIES)
    point = TuningResult(effort, first["recall"])
    if point.recall >= MIN_TIMED_RECALL:
        count = min(300, max(20, int(SINGLE_S / trial["wall_s"])))
        single = worker.call("measure", mode="single", k=K, effort=effort, start=0, count=count)
        point.seconds = {"single": single["wall_s"], "batch": first["wall_s"]}
    return point


def fastest_setting(points: list[TuningResult], mode: str, target: float) -> TuningResult | None:
    """The fastest setting that reaches the target, or None."""
    good = [point for point in points if point.recall >= target + MARGIN and point.seconds]
    return min(good, key=lambda point: point.seconds[mode], default=None)


def best_setting(points: list[TuningResult], mode: str, target: float) -> TuningResult | None:
    """The fastest setting that reaches the target; for a method with one setting, always that setting."""
    return points[0] if len(points) == 1 and points[0].seconds else fastest_setting(points, mode, target)


def compare(workers: list[WorkerProcess], points: dict[str, list[TuningResult]], baseline: str) -> list[TimingResult]:
    """Interleaved rounds at every target in every mode."""
    results = []
    for target in TARGETS:
        for mode in MODES:
            chosen = []
            for worker in workers:
                point = best_setting(points[worker.method.name], mode, target)
                if point is not None:
                    chosen.append((worker, point, TimingResult(worker.method.name, mode, target, point.effort)))
            for _ in range(ROUNDS):
                _round([(worker, point.seconds[mode], result) for worker, point, result in chosen], baseline)
            results += [result for _, _, result in chosen]
    return results


def _round(chosen: list[tuple[WorkerProcess, float, TimingResult]], baseline: str) -> None:
    for worker, seconds, result in chosen:
        options = {"mode": result.mode, "k": K, "effort": result.effort}
        limit = int((SINGLE_S if result.mode == "single" else BATCH_S) / seconds)
        if not result.seconds:
            count = TUNING_QUERIES if seconds * TUNING_QUERIES < 4 * BATCH_S else max(10, limit)
            batch = worker.call("measure", start=TUNING_QUERIES, count=count, **{**options, "mode": "batch"})
            result.recall = batch["recall"]
        most = TUNING_QUERIES if result.mode == "single" else NUM_QUERIES
        count = max(10, min(most, limit))
        start = max(0, TUNING_QUERIES - max(0, count - TUNING_QUERIES))
        measured = worker.call("measure", start=start, count=count, **options)
        result.seconds.append(measured["wall_s"])
    base = next((result for _, _, result in chosen if result.method == baseline), None)
    if base is not None:
        for _, _, result in chosen:
            result.ratios.append(base.seconds[-1] / result.seconds[-1])
