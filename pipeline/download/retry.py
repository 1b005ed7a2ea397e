"""Fetches again what a later day may give: the URLs of a finished shard that failed for a passing reason.

Reads `download/<shard>.{tar,parquet}`; writes both anew, with what came now beside what was there, as one
run would have that found all servers well. A shard that gains no picture stays as it is, since whatever
was made from it would otherwise be made again.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pipeline.download import tars
from pipeline.download.shard_download import ShardDownload, write_tar
from retrieval.storage.manifest import ShardRecord, delete_record, files_stand, read_record
from retrieval.storage.schema import DOWNLOADED, Reason, read_table

PASSING = frozenset({Reason.UNAVAILABLE, Reason.NO_CONNECTION, Reason.TIMEOUT, Reason.TRUNCATED})


def may_change(row: Mapping[str, Any]) -> bool:
    """True for a row of DOWNLOADED that another attempt may better: no whole body ever came."""
    return row["reason"] in PASSING and not row["sha256"]


class ShardRetry:
    """The work of one worker process. Safe to repeat: a shard it was killed in is downloaded whole."""

    def __init__(self, download: ShardDownload) -> None:
        self.download = download

    def __call__(self, shard: str) -> ShardRecord:
        """Better a shard that is finished; download one that is not."""
        root = self.download.root
        found = read_record(root, "download", shard)
        if found is None or not files_stand(root, found[1]):
            return self.download(shard)
        if PASSING.isdisjoint(found[1].reasons):
            return found[1]
        facts = read_table(root, f"download/{shard}.parquet", DOWNLOADED).to_pylist()
        again = [number for number, row in enumerate(facts) if may_change(row)]
        return (self._bettered(shard, facts, again) if again else None) or found[1]

    def _bettered(self, shard: str, facts: list[dict[str, Any]], again: list[int]) -> ShardRecord | None:
        root = self.download.root
        rows = self.download.selected(shard).take(again)
        # These hosts failed before: that they are silent says nothing of the network.
        storing = replace(self.download.storing[shard.partition("/")[0]], min_success=0.0)
        with self.download.fetched(shard, rows, storing) as (fresh, fresh_picture):
            if all(row["reason"] for row in fresh):
                return None
            place = {number: i for i, number in enumerate(again)}
            merged = [fresh[place[n]] if n in place else row for n, row in enumerate(facts)]
            tar_name = f"download/{shard}.tar"
            with (
                root.local(tar_name) as path,
                tars.reading(path) as old_picture,
                root.writing(tar_name) as tar,
            ):

                def picture(number: int) -> bytes:
                    if number in place:
                        return fresh_picture(place[number])
                    return old_picture(tars.key_of(facts[number]["image_id"]))

                write_tar(tar.path, merged, picture)
                # The next two files replace those that the record describes.
                delete_record(root, "download", shard)
            return self.download.recorded(shard, merged, tar.record)
