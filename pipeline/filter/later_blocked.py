"""A changed blocklist, applied to a finished filter: lists the selected rows that must not be used any more.

Reads the URLs of `filter/{train,database}/<shard>.parquet`; writes their listed ids to `filter/blocked-<list>.ids` and
the counts to the manifest. The shards keep the rows, so that finished downloads still match them; `download` blocks
the ids. Every list is compared with all selected rows, so an entry that leaves the list frees its rows.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial

from pipeline.filter.blocked_ids import id_files
from pipeline.runtime.id_files import read_ids, write_ids
from pipeline.runtime.runner import run_shards
from pipeline.runtime.stage import Stage
from pipeline.runtime.workers import Work, Workers
from pipeline.web.blocklist import Blocklist
from retrieval.storage.manifest import Manifest, ShardRecord
from retrieval.storage.root import Root
from retrieval.storage.schema import IMAGE_ID, SELECTED, SPLITS, Reason, read_table

FOLDER = "blocked"
"""Folder of the records and temporary files of this pass, below that of the stage."""


def block_later(stage: Stage, stored: Manifest, blocklist: Blocklist, workers: Workers) -> Manifest:
    """Apply a blocklist to a finished filter; returns its new manifest. stored: its manifest with another blocklist.

    The stored manifest and its files stay valid until the new one is written.
    """
    started = time.time()
    with stage.updating():
        names = [f"{FOLDER}/{record.shard}" for record in stored.shards if record.files]
        listed = run_shards(stage, names, partial(_find_work, stage.root, blocklist), workers)
        counts = {record.shard.removeprefix(f"{FOLDER}/"): record.rows for record in listed}
        records = [_with_count(record, counts[record.shard]) if record.files else record for record in stored.shards]
        manifest = stage.complete(records, _values(stage.root, stored, records, listed, blocklist.identity), started)
    outdated = [file.name for file in id_files(stored) if file not in id_files(manifest)]
    for name in (f"filter/{FOLDER}", f"filter/records/{FOLDER}", *outdated):
        stage.root.delete(name)
    return manifest


def _find_work(root: Root, blocklist: Blocklist) -> Work:
    return partial(_find, root, blocklist)


def _find(root: Root, blocklist: Blocklist, name: str) -> ShardRecord:
    """Write the listed ids of a shard, if any; the record has their number as rows."""
    table = read_table(root, f"filter/{name.removeprefix(f'{FOLDER}/')}.parquet", SELECTED)
    ids = table[IMAGE_ID].to_numpy()
    listed = blocklist.blocks_ids(ids) | blocklist.blocks_hosts(table["url"].combine_chunks())
    return write_ids(root, "filter", name, ids[listed])


def _with_count(record: ShardRecord, count: int) -> ShardRecord:
    """A shard's record with this number of blocked rows."""
    rows = record.rows + record.reasons.get(Reason.BLOCKED, 0)
    return replace(record, rows=rows - count, reasons={str(Reason.BLOCKED): count} if count else {})


def _values(
    root: Root, stored: Manifest, records: Sequence[ShardRecord], listed: Sequence[ShardRecord], identity: str
) -> dict[str, object]:
    """The values of the manifest. Writes the ids of all shards into one file, if there are any."""
    values = {name: value for name, value in stored.values.items() if name != "later_blocked"}
    for split in SPLITS:
        values[f"rows_{split}"] = sum(record.rows for record in records if record.shard.startswith(f"{split}/"))
    ids = read_ids(root, [file.name for record in listed for file in record.files])
    for file in write_ids(root, "filter", f"blocked-{identity}", ids).files:
        values["later_blocked"] = asdict(file)
    return values
