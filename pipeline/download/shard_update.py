"""Brings a finished shard up to date: with the blocklist, with the rows that filter selects now and, for
`download --retry`, with what servers answer now.

Reads the files that the shard's record names, or those of `former_shards`, and `filter/<shard>.parquet`. Pictures that
are still selected are not fetched again. If rows changed, writes both files again under other names; the record,
which is written last, names them. So a kill at any moment leaves the old files or the new ones. A shard without
changes keeps its files, because a new file makes later stages run again.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import replace
from itertools import chain

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.download.former_shards import former_shards, rows_in, stored_pictures
from pipeline.download.image_download import CONTENT_BLOCKED, PHASH_BLOCKED, URL_BLOCKED, RowStatus, SplitSettings
from pipeline.download.shard_download import ReadPicture, Row, Rows, ShardDownload, blocked_urls, write_rows, write_tar
from pipeline.web.blocklist import Blocklist
from retrieval.storage.manifest import ShardRecord, delete_record, files_exist, read_record
from retrieval.storage.root import Root
from retrieval.storage.schema import DOWNLOADED, FROM_METADATA, IMAGE_ID, SELECTED, Reason, read_table

NEW = "new"
"""Stands for the outcome of a row that was not requested yet."""
_NEW_ROW = vars(RowStatus(NEW))
TRANSIENT = frozenset({Reason.UNAVAILABLE, Reason.NO_CONNECTION, Reason.TIMEOUT, Reason.TRUNCATED})


def is_transient(row: Row) -> bool:
    """True for a row of DOWNLOADED that another request may change: no complete body was received."""
    return row["reason"] in TRANSIENT and not row["sha256"]


def listed_rows(table: pa.Table, blocklist: Blocklist) -> dict[int, str]:
    """By number, the rows of DOWNLOADED that a blocklist lists, and why. `md5:` entries match checksums of metadata."""
    by_phash = blocklist.blocks_phashes(table["phash"].to_numpy())
    by_content = blocklist.blocks_contents(table["sha256"].combine_chunks(), table["checksum"].combine_chunks())
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
        if stored and files_exist(root, stored[1]):
            records = iter([stored[1]])
        else:
            delete_record(root, "download", shard)  # the download writes files that it names
            records = former_shards(root, shard)
        nearest = next(records, None)
        if not nearest:
            return self.shard_download(shard)
        selected = read_table(root, f"filter/{shard}.parquet", SELECTED)
        if nearest.shard != shard:
            return self._update(shard, chain([nearest], records), selected, None)
        before = read_table(root, nearest.file(".parquet"), DOWNLOADED)
        if not before.select(FROM_METADATA).equals(selected.select(FROM_METADATA)):
            return self._update(shard, chain([nearest], records), selected, None)
        blocklist = self._settings(shard).blocklist
        is_current = nearest.inputs.get("blocklist") == blocklist.identity and not _has_erased(before, blocklist)
        if is_current and not (self.retry and {*TRANSIENT, Reason.BLOCKED} & {*nearest.reasons}):
            return nearest
        return self._update(shard, [nearest], selected, nearest)

    def _settings(self, shard: str) -> SplitSettings:
        return self.shard_download.settings[shard.partition("/")[0]]

    def _update(
        self, shard: str, records: Iterable[ShardRecord], selected: pa.Table, unchanged: ShardRecord | None
    ) -> ShardRecord:
        """Fetch what the stored shards lack and write the shard.

        records: the stored shards. unchanged: is returned if all rows have its outcomes.
        """
        root, settings = self.shard_download.root, self._settings(shard)
        stored, used = rows_in(root, records, selected[IMAGE_ID].to_pylist())
        before = [_stored_row(stored, row) | row for row in selected.select(FROM_METADATA).to_pylist()]
        table = pa.Table.from_pylist(before, DOWNLOADED)
        listed = listed_rows(table, settings.blocklist)
        missing = [n for n, row in enumerate(before) if n not in listed and self._is_missing(row)]
        if not any(before[n]["reason"] == NEW for n in missing):
            # These hosts failed before: no answer from them does not mean that the network is down.
            settings = replace(settings, min_answered=0.0)
        with self.shard_download.download_rows(table.take(pa.array(missing, pa.int64())), settings) as (new, read_new):
            numbers = {n: i for i, n in enumerate(missing)}
            rows = [new[numbers[n]] if n in numbers else _blocked(row, listed.get(n)) for n, row in enumerate(before)]
            if unchanged and [*map(_outcome, rows)] == [*map(_outcome, before)]:
                return unchanged
            with stored_pictures(root, used) as read_old:

                def read_picture(n: int) -> bytes:
                    return read_new(numbers[n]) if n in numbers else read_old(rows[n][IMAGE_ID])

                return _write(root, shard, rows, read_picture)

    def _is_missing(self, row: Row) -> bool:
        """Whether to request the URL of a row, which is not listed now."""
        return row["reason"] == NEW or (self.retry and (is_transient(row) or row["reason"] == Reason.BLOCKED))


def _stored_row(stored: dict[int, Row], row: Row) -> Row:
    """The stored row of a selected one. A picture with other boxes of faces must be blurred again, from its file."""
    former = stored.get(row[IMAGE_ID], _NEW_ROW)
    return former if former.get("face_boxes") == row["face_boxes"] else _NEW_ROW


def _has_erased(table: pa.Table, blocklist: Blocklist) -> bool:
    """Whether rows of DOWNLOADED have a picture that was erased, or that is a copy of an erased one."""
    stored = pc.equal(table["reason"], "").to_numpy()
    return bool(np.isin(table[IMAGE_ID].to_numpy()[stored], blocklist.erased).any())


def without_listed(root: Root, record: ShardRecord, blocklist: Blocklist) -> ShardRecord:
    """The record of a finished shard without the pictures that a blocklist lists. Nothing is fetched."""
    table = read_table(root, record.file(".parquet"), DOWNLOADED)
    listed = listed_rows(table, blocklist)
    before = table.to_pylist()
    rows = [_blocked(row, listed.get(n)) for n, row in enumerate(before)]
    if rows == before:
        return record
    with stored_pictures(root, [record]) as read:
        return replace(_write(root, record.shard, rows, lambda n: read(rows[n][IMAGE_ID])), inputs=record.inputs)


def _write(root: Root, shard: str, rows: Rows, read_picture: ReadPicture) -> ShardRecord:
    """Write a shard under names that its earlier files do not have."""
    digest = hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()[:8]
    with root.writing(f"download/{shard}.{digest}.tar") as tar:
        write_tar(tar.path, rows, read_picture)
    return write_rows(root, shard, rows, tar.record)


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
