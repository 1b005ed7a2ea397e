"""Prometheus metrics of a stage, served by the metrics endpoint of the Ray node on which the driver runs.

Ray prefixes the names with `ray_` and adds its own tags. The numbers are those of the log lines.
"""

from collections import Counter as Counts
from collections.abc import Iterable

from ray.util.metrics import Counter, Histogram

from pipeline.runtime.memory import GB
from retrieval.storage.manifest import ShardRecord

SECONDS = [1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0]
GIGABYTES = [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0]


class StageMetrics:
    """Metrics of one stage, with the tags `stage` and `part` (train, database, or a pass such as scan)."""

    def __init__(self, stage: str) -> None:
        tags = ("stage", "part")
        self._rows = Counter("rdm_rows", "Rows kept", tags)
        self._not_kept = Counter("rdm_rows_not_kept", "Rows not kept, by reason", (*tags, "reason"))
        self._seconds = Histogram("rdm_shard_seconds", "Seconds a shard took", SECONDS, tags)
        self._scheduled = Counter("rdm_shards_asked", "Shards to process, without finished ones", tags)
        self._peak = Histogram("rdm_worker_peak_gb", "Peak memory of a shard's worker", GIGABYTES, tags)
        self._lost = Counter("rdm_workers_lost", "Workers lost and replaced", ("stage",))
        for metric in (self._rows, self._not_kept, self._seconds, self._scheduled, self._peak, self._lost):
            metric.set_default_tags({"stage": stage})

    def shards_scheduled(self, shards: Iterable[str]) -> None:
        """Count the shards that are to be processed."""
        for part, count in Counts(_part(shard) for shard in shards).items():
            self._scheduled.inc(count, {"part": part})

    def shard_finished(self, record: ShardRecord, peak: int) -> None:
        """Count a finished shard. peak: peak memory of its worker in bytes."""
        part = {"part": _part(record.shard)}
        if record.rows:
            self._rows.inc(record.rows, part)
        for reason, count in record.reasons.items():
            if count:
                self._not_kept.inc(count, {**part, "reason": reason})
        self._seconds.observe(record.seconds, part)
        self._peak.observe(peak / GB, part)

    def worker_lost(self) -> None:
        self._lost.inc()


def _part(shard: str) -> str:
    return shard.rpartition("/")[0]
