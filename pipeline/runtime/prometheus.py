"""What a stage tells Prometheus, on the metrics endpoint of the Ray node that its driver runs on.

Ray puts `ray_` before the names and adds its own tags. The numbers are those of the log's lines; the record
are the manifests.
"""

from collections import Counter as Counts
from collections.abc import Iterable

from ray.util.metrics import Counter, Histogram

from pipeline.runtime.memory import GB
from retrieval.storage.manifest import ShardRecord

SECONDS = [1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0]
GIGABYTES = [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0]


class Meters:
    """The meters of one stage, with the tags `stage` and `part` (train, database, or a pass such as scan)."""

    def __init__(self, stage: str) -> None:
        tags = ("stage", "part")
        self._rows = Counter("rdm_rows", "Rows kept", tags)
        self._not_kept = Counter("rdm_rows_not_kept", "Rows not kept, by reason", (*tags, "reason"))
        self._seconds = Histogram("rdm_shard_seconds", "Seconds a shard took", SECONDS, tags)
        self._asked = Counter("rdm_shards_asked", "Shards to make, finished ones left out", tags)
        self._peak = Histogram(
            "rdm_worker_peak_gb", "Most memory that the worker of a shard held", GIGABYTES, tags
        )
        self._lost = Counter("rdm_workers_lost", "Workers lost and replaced", ("stage",))
        for meter in (self._rows, self._not_kept, self._seconds, self._asked, self._peak, self._lost):
            meter.set_default_tags({"stage": stage})

    def asked(self, shards: Iterable[str]) -> None:
        """These shards are to be made."""
        for part, count in Counts(_part(shard) for shard in shards).items():
            self._asked.inc(count, {"part": part})

    def made(self, record: ShardRecord, peak: int) -> None:
        """A shard was made. peak: bytes that its worker held at most."""
        part = {"part": _part(record.shard)}
        if record.rows:
            self._rows.inc(record.rows, part)
        for reason, count in record.reasons.items():
            if count:
                self._not_kept.inc(count, {**part, "reason": reason})
        self._seconds.observe(record.seconds, part)
        self._peak.observe(peak / GB, part)

    def lost(self) -> None:
        """A worker was lost."""
        self._lost.inc()


def _part(shard: str) -> str:
    return shard.rpartition("/")[0]
