"""Tunes every method, then times the chosen settings in interleaved rounds, so that all run under the same load.

Settings are tuned on the first half of the queries. The tables compare times at equal recall on the other half: the
time is interpolated between the two settings next to the target, one below and one above it. The rounds of a method
alternate with those of the baseline; the ratio of both is taken within one round, and the result is the median.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from typing import Any

from benchmarks.retrieval.catalog import Effort
from benchmarks.retrieval.data import NUM_QUERIES, K
from benchmarks.retrieval.workers import WorkerProcess

TARGETS = (0.95, 0.99)
MODES = ("single", "batch")
ROUNDS = 5
MARGIN = 0.002
"""The effort for a single measurement must exceed its target by so much on the tuning queries."""
TUNING_QUERIES = NUM_QUERIES // 2
NEAR = 0.02
"""Settings that miss the target by more on the tuning queries are not measured on the other half."""
ENOUGH = 0.996
"""Settings that cost more than one with this recall are not tried."""
MIN_TIMED_RECALL = 0.85
"""Settings with a lower recall are not timed."""
SINGLE_S, BATCH_S = 1.0, 2.0
"""Slow methods run fewer queries, so that a measurement takes at most so many seconds."""


@dataclass(frozen=True)
class Case:
    """A kind of queries, and the number of results."""

    stream: str
    """`images` or `texts`."""
    k: int

    @property
    def name(self) -> str:
        """Key of the results of this case."""
        return f"{self.stream}-{self.k}"


CASES = tuple(Case(stream, k) for stream, k in product(("images", "texts"), (K, 100)))


@dataclass
class TuningResult:
    """A setting of a method with its recall and time, measured once."""

    effort: Effort
    recall: float
    seconds: dict[str, float] = field(default_factory=dict)
    """Seconds per query, by mode."""


@dataclass(frozen=True)
class HeldOutSetting:
    """A setting with its recall on the queries that did not tune it, and its time per query while tuning."""

    effort: Effort
    recall: float
    seconds: float


@dataclass
class TimingResult:
    """A method at a target recall in a mode, timed in several rounds."""

    method: str
    case: Case
    mode: str
    target: float
    settings: list[HeldOutSetting]
    """The setting above the target, or the only setting of the method, and that below it if there is one."""
    seconds: list[float] = field(default_factory=list)
    """Seconds per query at the recall `recall`, one value for each round."""
    ratios: list[float] = field(default_factory=list)
    """Time of the baseline over time of this method, in the same round."""

    @property
    def recall(self) -> float:
        """The recall on held-out queries for which the times hold."""
        return self.target if len(self.settings) == 2 else self.settings[0].recall

    def add_round(self, seconds: list[float]) -> None:
        """Add the times of the settings in one round, interpolated linearly at the target."""
        if len(seconds) == 1:
            self.seconds.append(seconds[0])
            return
        above, below = self.settings
        weight = (self.target - below.recall) / (above.recall - below.recall)
        self.seconds.append(seconds[1] + weight * (seconds[0] - seconds[1]))

    def summary(self) -> dict[str, Any]:
        """Medians over the rounds, as the report stores them."""
        return {
            "method": self.method,
            **vars(self.case),
            "mode": self.mode,
            "target": self.target,
            "effort": list(self.settings[0].effort),
            "recall": round(self.recall, 4),
            "held_out": [[list(setting.effort), round(setting.recall, 4)] for setting in self.settings],
            "ms": round(statistics.median(self.seconds) * 1e3, 4),
            "ratio": round(statistics.median(self.ratios), 3) if self.ratios else None,
            "ratio_range": [round(extreme(self.ratios), 3) for extreme in (min, max)] if self.ratios else None,
        }


def tune(worker: WorkerProcess, case: Case) -> list[TuningResult]:
    """Recall of every setting of a method, and its time if the recall is at least MIN_TIMED_RECALL."""
    points: list[TuningResult] = []
    for effort in worker.method.efforts:
        if not any(point.recall >= ENOUGH and is_at_least(effort, point.effort) for point in points):
            points.append(_measure_setting(worker, effort, case))
    return points


def is_at_least(effort: Effort, other: Effort) -> bool:
    """True if no number of the effort is smaller than that of the other."""
    return all(number >= least for number, least in zip(effort, other, strict=True))


def _measure_setting(worker: WorkerProcess, effort: Effort, case: Case) -> TuningResult:
    options = {**vars(case), "effort": effort, "start": 0}
    trial = worker.call("measure", mode="single", count=20, **options)
    slow = trial["wall_s"] * TUNING_QUERIES / 2 > BATCH_S
    first = worker.call("measure", mode="batch", count=100 if slow else TUNING_QUERIES, **options)
    point = TuningResult(effort, first["recall"])
    if point.recall >= MIN_TIMED_RECALL:
        count = min(300, max(20, int(SINGLE_S / trial["wall_s"])))
        single = worker.call("measure", mode="single", count=count, **options)
        point.seconds = {"single": single["wall_s"], "batch": first["wall_s"]}
    return point


def fastest_setting(points: list[TuningResult], mode: str, target: float) -> TuningResult | None:
    """The fastest setting that reaches the target, or None."""
    good = [point for point in points if point.recall >= target + MARGIN and point.seconds]
    return min(good, key=lambda point: point.seconds[mode], default=None)


def best_setting(points: list[TuningResult], mode: str, target: float) -> TuningResult | None:
    """The fastest setting that reaches the target; for a method with one setting, always that setting."""
    return points[0] if len(points) == 1 and points[0].seconds else fastest_setting(points, mode, target)


def frontier(points: list[TuningResult], mode: str) -> list[TuningResult]:
    """The timed settings for which no faster one has an equal or higher recall, ascending in recall and time."""
    best: list[TuningResult] = []
    for point in sorted((point for point in points if point.seconds), key=lambda point: point.seconds[mode]):
        if not best or point.recall > best[-1].recall:
            best.append(point)
    return best


def settings_at(
    settings: list[TuningResult], mode: str, target: float, held_out_recall: Callable[[Effort], float]
) -> list[HeldOutSetting]:
    """The first setting whose held-out recall reaches the target, and the one before it; none if no setting does.

    settings: a frontier. A method with one setting is always compared at it.
    """
    below: list[HeldOutSetting] = []
    for point in settings:
        if point.recall < target - NEAR and point is not settings[-1]:
            continue  # far below on the tuning queries, so below on the others too
        setting = HeldOutSetting(point.effort, held_out_recall(point.effort), point.seconds[mode])
        if setting.recall >= target or len(settings) == 1:
            return [setting, *below]
        below = [setting]
    return []


Points = dict[str, dict[str, list[TuningResult]]]
"""The tuned settings by name of the method and of the case."""


def compare(workers: list[WorkerProcess], points: Points, case: Case, baseline: str) -> list[TimingResult]:
    """Interleaved rounds of the workers at every target in every mode."""
    results = []
    for target, mode in product(TARGETS, MODES):
        chosen = []
        for worker in workers:
            name = worker.method.name
            ascending = frontier(points[name][case.name], mode)
            settings = settings_at(ascending, mode, target, partial(_held_out_recall, worker, case))
            if settings:
                chosen.append((worker, TimingResult(name, case, mode, target, settings)))
        for _ in range(ROUNDS):
            _round(chosen, baseline)
        results += [result for _, result in chosen]
    return results


def _held_out_recall(worker: WorkerProcess, case: Case, effort: Effort) -> float:
    options = {**vars(case), "effort": effort, "start": TUNING_QUERIES, "count": TUNING_QUERIES}
    return float(worker.call("measure", mode="batch", **options)["recall"])


def _round(chosen: list[tuple[WorkerProcess, TimingResult]], baseline: str) -> None:
    for worker, result in chosen:
        result.add_round([_seconds(worker, result, setting) for setting in result.settings])
    base = next((result for _, result in chosen if result.method == baseline), None)
    if base is not None:
        for _, result in chosen:
            result.ratios.append(base.seconds[-1] / result.seconds[-1])


def _seconds(worker: WorkerProcess, result: TimingResult, setting: HeldOutSetting) -> float:
    limit = int((SINGLE_S if result.mode == "single" else BATCH_S) / setting.seconds)
    count = max(10, min(TUNING_QUERIES if result.mode == "single" else NUM_QUERIES, limit))
    start = max(0, TUNING_QUERIES - max(0, count - TUNING_QUERIES))
    options = {**vars(result.case), "mode": result.mode, "effort": setting.effort, "start": start, "count": count}
    return float(worker.call("measure", **options)["wall_s"])
