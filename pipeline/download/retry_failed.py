"""`download --retry`: requests the URLs that failed for a transient reason, shard by shard.

Reads the finished `download/<shard>.{tar,parquet}`. Writes both again with the new images in their rows. A shard that
gains no image keeps its files, because a new file makes later stages run again.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pipeline.download.shard_download import Rows, ShardDownload, write_tar
from pipeline.pictures.tars import picture_reader, sample_key
from retrieval.storage.manifest import ShardRecord, delete_record, files_exist, read_record
from retrieval.storage.schema import DOWNLOADED, Reason, read_table

TRANSIENT = frozenset({Reason.UNAVAILABLE, Reason.NO_CONNECTION, Reason.TIMEOUT, Reason.TRUNCATED})


def is_transient(row: Mapping[str, Any]) -> bool:
    """True for a row of DOWNLOADED that another request may change: no complete body was received."""
    return row["reason"] in TRANSIENT and not row["sha256"]


class ShardRetry:
    """Retries shards by name, for one worker process. An interrupted shard is downloaded as a whole."""

    def __init__(self, shard_download: ShardDownload) -> None:
        self.shard_download = shard_download

    def __call__(self, shard: str) -> ShardRecord:
        """Retry the failed URLs of a finished shard, or download an unfinished one."""
        root = self.shard_download.root
        stored = read_record(root, "download", shard)
        if stored is None or not files_exist(root, stored[1]):
            return self.shard_download(shard)
        record = stored[1]
        if TRANSIENT.isdisjoint(record.reasons):
            return record
        rows = read_table(root, f"download/{shard}.parquet", DOWNLOADED).to_pylist()
        failed = [number for number, row in enumerate(rows) if is_transient(row)]
        return (self._retry(shard, rows, failed) if failed else None) or record

    def _retry(self, shard: str, rows: Rows, failed: list[int]) -> ShardRecord | None:
        """Download the failed rows again and merge them; None if no image was gained."""
        root = self.shard_download.root
        selected = self.shard_download.selected_rows(shard).take(failed)
        # These hosts failed before: no answer from them does not mean that the network is down.
        settings = replace(self.shard_download.settings[shard.partition("/")[0]], min_answered=0.0)
        with self.shard_download.download_rows(selected, settings) as (new_rows, read_new):
            if all(row["reason"] for row in new_rows):
                return None
            new_number = {number: i for i, number in enumerate(failed)}
            merged = [new_rows[new_number[n]] if n in new_number else row for n, row in enumerate(rows)]
            tar_name = f"download/{shard}.tar"
            with root.local(tar_name) as path, picture_reader(path) as read_old, root.writing(tar_name) as tar:

                def read_jpeg(number: int) -> bytes:
                    if number in new_number:
                        return read_new(new_number[number])
                    return read_old(sample_key(rows[number]["image_id"]))

                write_tar(tar.path, merged, read_jpeg)
                # The next two files replace the files that the record describes.
                delete_record(root, "download", shard)
            return self.shard_download.write_rows(shard, merged, tar.record)
