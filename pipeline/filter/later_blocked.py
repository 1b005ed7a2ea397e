"""A changed blocklist, applied to a finished filter: lists the selected rows that must not be used any more.

Reads the URLs of `filter/{train,database}/<shard>.parquet`; writes their listed ids to `filter/blocked-<list>.ids` and
the counts to the manifest. The shards keep the rows, so that finished downloads still match them; `download` blocks
the ids. Every list is compared with all selected rows, so an entry that leaves the list frees its rows.
"""

import time
from dataclasses import asdict, replace
from functools import partial

import numpy as np
import numpy.typing as npt

from pipeline.runtime.runner import Work, Workers, run_shards
from pipeline.runtime.stage import Stage
from pipeline.web.blocklist import Blocklist
from retrieval.storage.manifest import Manifest, ShardRecord
from retrieval.storage.root import FileRecord, Root
from retrieval.storage.schema import IMAGE_ID, SELECTED, SPLITS, Reason, read_table

FOLDER = "blocked"
"""Folder of the records and temporary files of this pass, below that of the stage."""
Ids = npt.NDArray[np.int64]


def block_later(stage: Stage, stored: Manifest, blocklist: Blocklist, workers: Workers) -> Manifest:
    """Apply a blocklist to a finished filter; returns its new manifest. stored: its manifest with another blocklist.

    The stored manifest and its files stay valid until the new one is written.
    """
    started = time.time()
    with stage.updating():
        names = [f"{FOLDER}/{record.shard}" for record in stored.shards if record.files]
        found = run_shards(stage, names, partial(_find_work, stage.root, blocklist), workers)
        counts = {record.shard.removeprefix(f"{FOLDER}/"): record.rows for record in found}
        records = [_with_count(record, counts[record.shard]) if record.files else record for record in stored.shards]
        manifest = stage.complete(records, _values(stage.root, stored, records, found, blocklist.identity), started)
    before, now = (_file_name(each) for each in (stored, manifest))
    for name in (f"filter/{FOLDER}", f"filter/records/{FOLDER}", before if before != now else ""):
        if name:
            stage.root.delete(name)
    return manifest


def later_blocked_ids(root: Root, selected: Manifest) -> Ids:
    """Ids in the shards of a finished filter that its blocklist listed later, ascending."""
    name = _file_name(selected)
    return _read_ids(root, [name] if name else [])


def _file_name(manifest: Manifest) -> str:
    return str(manifest.values.get("later_blocked", {}).get("name", ""))


def _find_work(root: Root, blocklist: Blocklist) -> Work:
    return partial(_find, root, blocklist)


def _find(root: Root, blocklist: Blocklist, name: str) -> ShardRecord:
    """Write the listed ids of a shard, if any; the record has their number as rows."""
    table = read_table(root, f"filter/{name.removeprefix(f'{FOLDER}/')}.parquet", SELECTED)
    ids = table[IMAGE_ID].to_numpy()
    listed = ids[blocklist.blocks_ids(ids) | blocklist.blocks_hosts(table["url"].combine_chunks())]
    if not len(listed):
        return ShardRecord(name, 0, ())
    return ShardRecord(name, len(listed), (_write_ids(root, f"filter/{name}.ids", listed),))


def _write_ids(root: Root, name: str, ids: Ids) -> FileRecord:
    return root.write_bytes(name, ids.astype("<i8").tobytes())


def _read_ids(root: Root, names: list[str]) -> Ids:
    """The ids of some files, ascending."""
    parts = [np.empty(0, np.int64)]
    for name in names:
        with root.open(name) as file:
            parts.append(np.frombuffer(file.read(), "<i8"))
    return np.unique(np.concatenate(parts))


def _with_count(record: ShardRecord, count: int) -> ShardRecord:
    """A shard's record with this number of blocked rows."""
    rows = record.rows + record.reasons.get(Reason.BLOCKED, 0)
    return replace(record, rows=rows - count, reasons={str(Reason.BLOCKED): count} if count else {})


def _values(
    root: Root, stored: Manifest, records: list[ShardRecord], found: list[ShardRecord], identity: str
) -> dict[str, object]:
    """The values of the manifest. Writes the ids of all shards into one file, if there are any."""
    values = {name: value for name, value in stored.values.items() if name != "later_blocked"}
    for split in SPLITS:
        values[f"rows_{split}"] = sum(record.rows for record in records if record.shard.startswith(f"{split}/"))
    ids = _read_ids(root, [file.name for record in found for file in record.files])
    if len(ids):
        values["later_blocked"] = asdict(_write_ids(root, f"filter/blocked-{identity}.ids", ids))
    return values
