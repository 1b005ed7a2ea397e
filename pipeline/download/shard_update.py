"""Brings a finished shard up to date: with the blocklist, with the rows that filter selects now and, for
`download --retry`, with what servers answer now.

Reads the files that the shard's record names, and `filter/<shard>.parquet`. Pictures that are still selected are not
fetched again. If rows changed, writes both files again under other names; the record,
which is written last, names them. So a kill at any moment leaves the old files or the new ones. A shard without
changes keeps its files, because a new file makes later stages run again.
"""

import hashlib
import json
from dataclasses import replace

import numpy as np
import pyarrow as pa

from pipeline.download.image_download import CONTENT_BLOCKED, PHASH_BLOCKED, URL_BLOCKED, RowStatus, SplitSettings
from pipeline.download.shard_download import ReadJpeg, Row, Rows, ShardDownload, blocked_urls, write_rows, write_tar
from pipeline.pictures.tars import picture_reader, sample_key
from pipeline.web.blocklist import Blocklist
from retrieval.storage.manifest import ShardRecord, delete_record, files_exist, read_record
from retrieval.storage.root import Root
from retrieval.storage.schema import DOWNLOADED, FROM_METADATA, SELECTED, Reason, read_table

NEW = "new"
"""Stands for the outcome of a row that was not requested yet."""
TRANSIENT = frozenset({Reason.UNAVAILABLE, Reason.NO_CONNECTION, Reason.TIMEOUT, Reason.TRUNCATED})


def is_transient(row: Row) -> bool:
    """True for a row of DOWNLOADED that another request may change: no complete body was received."""
    return row["reason"] in TRANSIENT and not row["sha256"]


def listed_rows(table: pa.Table, blocklist: Blocklist) -> dict[int, str]:
    """By number, the rows of DOWNLOADED that a blocklist lists, and why. `md5:` entries need the body: not here."""
    by_phash = blocklist.blocks_phashes(table["phash"].to_numpy())
    by_content = blocklist.blocks_contents(table["sha256"].combine_chunks())
    listed = dict.fromkeys(np.flatnonzero(by_phash).tolist(), PHASH_BLOCKED)
    listed |= dict.fromkeys(np.flatnonzero(by_content).tolist(), CONTENT_BLOCKED)
    return listed | dict.fromkeys(blocked_urls(table, blocklist), URL_BLOCKED)


class ShardUpdate:
    """Downloads unfinished shards by name and updates finished ones, for one worker process.

    retry: request the URLs again that failed for a transient reason, or that the blocklist no longer lists.
    """

    def __init__(self, shard_download: ShardDownload, retry: bool = False) -> None:
        self.shard_download = shard_download
        self.retry = retry

    def __call__(self, shard: str) -> ShardRecord:
        """The record of a shard, new or unchanged. The caller writes it."""
        root = self.shard_download.root
        stored = read_record(root, "download", shard)
        if stored is None or not files_exist(root, stored[1]):
            delete_record(root, "download", shard)  # the download writes files that it names
            return self.shard_download(shard)
        record = stored[1]
        selected = read_table(root, f"filter/{shard}.parquet", SELECTED)
        before = read_table(root, record.file(".parquet"), DOWNLOADED)
        is_selected = before.select(FROM_METADATA).equals(selected.select(FROM_METADATA))
        is_current = is_selected and record.inputs.get("blocklist") == self._settings(shard).blocklist.identity
        if is_current and not (self.retry and {*TRANSIENT, Reason.BLOCKED} & {*record.reasons}):
            return record
        rows = _selected_rows(selected, before)
        return self._update(record, rows, None if not is_selected else [_outcome(row) for row in rows])

    def _settings(self, shard: str) -> SplitSettings:
        return self.shard_download.settings[shard.partition("/")[0]]

    def _update(self, record: ShardRecord, before: Rows, outcomes: list[str] | None) -> ShardRecord:
        """Fetch what is missing and write the shard, unless that gives the same outcomes. before: rows by now."""
        table = pa.Table.from_pylist(before, DOWNLOADED)
        settings = self._settings(record.shard)
        listed = listed_rows(table, settings.blocklist)
        missing = [n for n, row in enumerate(before) if n not in listed and self._is_missing(row)]
        if not any(before[n]["reason"] == NEW for n in missing):
            # These hosts failed before: no answer from them does not mean that the network is down.
            settings = replace(settings, min_answered=0.0)
        with self.shard_download.download_rows(table.take(pa.array(missing, pa.int64())), settings) as (new, read_new):
            numbers = {n: i for i, n in enumerate(missing)}
            rows = [new[numbers[n]] if n in numbers else _blocked(row, listed.get(n)) for n, row in enumerate(before)]
            if [_outcome(row) for row in rows] == outcomes:
                return record
            return _write(self.shard_download.root, record, rows, (numbers, read_new))

    def _is_missing(self, row: Row) -> bool:
        """Whether to request the URL of a row, which is not listed now."""
        return row["reason"] == NEW or (self.retry and (is_transient(row) or row["reason"] == Reason.BLOCKED))


def without_listed(root: Root, record: ShardRecord, blocklist: Blocklist) -> ShardRecord:
    """The record of a finished shard without the pictures that a blocklist lists. Nothing is fetched."""
    table = read_table(root, record.file(".parquet"), DOWNLOADED)
    listed = listed_rows(table, blocklist)
    before = table.to_pylist()
    rows = [_blocked(row, listed.get(n)) for n, row in enumerate(before)]
    return record if rows == before else replace(_write(root, record, rows), inputs=record.inputs)


def _write(
    root: Root, record: ShardRecord, rows: Rows, new: tuple[dict[int, int], ReadJpeg] | None = None
) -> ShardRecord:
    """Write a shard again. new: numbers of the rows that were fetched now by those in the shard, and their reader."""
    digest = hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()[:8]
    name = f"download/{record.shard}.{digest}.tar"
    with root.local(record.file(".tar")) as path, picture_reader(path) as read_old, root.writing(name) as tar:

        def read_jpeg(n: int) -> bytes:
            if new and n in new[0]:
                return new[1](new[0][n])
            return read_old(sample_key(rows[n]["image_id"]))

        write_tar(tar.path, rows, read_jpeg)
    return write_rows(root, record.shard, rows, tar.record)


def _selected_rows(selected: pa.Table, before: pa.Table) -> Rows:
    """The rows of `selected` (SELECTED) with their stored outcome in `before` (DOWNLOADED), or with the reason NEW."""
    stored = {row["image_id"]: row for row in before.to_pylist()}
    new = vars(RowStatus(NEW))
    return [stored.get(row["image_id"], new) | row for row in selected.select(FROM_METADATA).to_pylist()]


def _blocked(row: Row, message: str | None) -> Row:
    """A row as the blocklist leaves it. message: why it is listed, None if it is not."""
    if message is None or row["reason"] == Reason.BLOCKED:
        return row
    status = vars(RowStatus(str(Reason.BLOCKED), message))
    if message != URL_BLOCKED:
        status["sha256"] = row["sha256"]
    if message == PHASH_BLOCKED:
        status["phash"] = row["phash"]
    return {**row, **status}


def _outcome(row: Row) -> str:
    """`stored`, `blocked` or `failed`: a row that fails for another reason is no change."""
    return {"": "stored", Reason.BLOCKED: "blocked"}.get(row["reason"], "failed")
