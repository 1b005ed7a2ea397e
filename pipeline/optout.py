"""optout: takes images out of a run afterwards, without building it again.

Reads a blocklist, the tables of `download`, databases, `neighbors` and what runs say they were trained on;
writes `blocked.npy` into the databases that hold a listed image, the neighbor tables that change, and the
report `optout/<list>.json`. Pictures, vectors and latents stay on disk, unused. Safe to repeat: what was
killed ends as if it had not been.
"""

import shutil
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.filter.selection import hash_urls
from pipeline.neighbors.neighbors import neighbors_stage
from pipeline.neighbors.refill import refill_work
from pipeline.recipe import NeighborsConfig
from pipeline.runtime.runner import Work, Workers, run_shards
from pipeline.runtime.stage import Stage
from pipeline.web.blocklist import Blocklist
from pipeline.web.urls import canonical_column
from retrieval.config import Config
from retrieval.database.database import Database
from retrieval.errors import UserError
from retrieval.index.hidden import hide
from retrieval.index.partition import Partition
from retrieval.storage import schema
from retrieval.storage.manifest import Manifest, ShardRecord, read_manifest, write_manifest
from retrieval.storage.root import FileRecord, Root

SCHEMA_VERSION = 1
MARKS = ("/train/manifest.json", "/train/checkpoints/checkpoints.json")
"""Files in which a run says what it is trained on."""
REMAINS = (
    "Left on disk, unused: the pictures in download/, the small pictures of style databases"
    " (databases/*/pictures/*.tar), rows in filter/, download/ and embed/, vectors in the databases, and"
    " latents. To erase them, name the list as filter.blocklist and download.blocklist and make the run"
    " again. md5: entries are known only while downloading. sha256: and phash: entries are searched among the"
    " downloaded pictures, not in style databases: name those by domain or id. Samples are not searched."
)


@dataclass(frozen=True)
class Removed:
    """What left the neighbor tables."""

    held: tuple[str, ...] = ()
    """Fingerprints of the tables that held it and of those that these were made of, the newest first."""
    free: tuple[str, ...] = ()
    """Fingerprints of tables that hold nothing of it."""
    dropped: int = 0
    """Training images whose rows were dropped."""
    refilled: int = 0
    """Training images that have other neighbors now."""


def run(blocklist: Blocklist, root: Root) -> dict[str, Any]:
    """Remove what a list names from the run at a root; the report.

    Raises UserError for unfinished stages, and for neighbor tables that were made from another index.
    """
    name = f"optout/{blocklist.identity}"
    earlier = root.read_json(f"{name}.json") if root.exists(f"{name}.json") else {}
    databases = _databases(root)
    made_from = {folder: read_manifest(root, folder).identity for folder in databases}
    if root.exists("download/manifest.json"):
        made_from["download"] = read_manifest(root, "download").identity
    stage = Stage(root, name, SCHEMA_VERSION, Config(), {**made_from, "list": blocklist.identity})
    stage.begin()
    ids = _found(stage, blocklist)
    every = np.union1d(ids, blocklist.ids)
    held = {folder: _held(stage, folder, blocklist, every) for folder in databases}
    for folder, here in held.items():
        # The training database also hides training images: their rows leave the neighbor tables by that.
        hidden = np.union1d(ids, here) if folder == "index" else here
        if len(hidden):
            hide(root.child(folder), hidden)
    removed = _mend(stage) if "index" in held and root.exists("neighbors") else Removed()
    if earlier:
        removed = _with_earlier(removed, Removed(**earlier["neighbors"]))
    report = {
        "list": blocklist.identity,
        "ids": ids.tolist(),
        "databases": {folder: len(here) for folder, here in held.items()},
        "neighbors": asdict(removed),
        "trained": _trained(root, removed),
        "remains": REMAINS,
    }
    root.write_json(f"{name}.json", report)
    root.delete(name)
    return dict(root.read_json(f"{name}.json"))


def _found(stage: Stage, blocklist: Blocklist) -> npt.NDArray[np.int64]:
    """Ids of the URLs of `download` that the list means, ascending; where there are none, those it names."""
    if "download" not in stage.upstream:
        return blocklist.ids
    shards = [f"find/{shard}" for shard in read_manifest(stage.root, "download").shard_names()]
    return _collected(stage, run_shards(stage, shards, partial(_make_find, stage, blocklist), Workers()))


def _make_find(stage: Stage, blocklist: Blocklist) -> Work:
    def find(name: str) -> ShardRecord:
        where = f"download/{name.removeprefix('find/')}.parquet"
        table = schema.read_table(stage.root, where, schema.DOWNLOADED)
        meant = blocklist.blocks_hosts(table["url"].combine_chunks())
        meant |= blocklist.blocks_ids(table[schema.IMAGE_ID].to_numpy())
        meant |= blocklist.blocks_phashes(table["phash"].to_numpy())
        digests = pa.array([word.removeprefix("sha256:") for word in sorted(blocklist.digests)], pa.string())
        meant |= pc.is_in(table["sha256"].combine_chunks(), digests).to_numpy(zero_copy_only=False)
        return _noted(stage, name, table[schema.IMAGE_ID].to_numpy()[meant])

    return find


def _held(
    stage: Stage, folder: str, blocklist: Blocklist, ids: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """Ids of a database's rows that are meant, ascending."""
    count = len(Database.open(stage.root.child(folder)).partitions)
    names = [f"hold/{folder}/{number:05d}" for number in range(count)]
    return _collected(stage, run_shards(stage, names, partial(_make_hold, stage, blocklist, ids), Workers()))


def _make_hold(stage: Stage, blocklist: Blocklist, ids: npt.NDArray[np.int64]) -> Work:
    def hold(name: str) -> ShardRecord:
        folder, _, number = name.removeprefix("hold/").rpartition("/")
        partition = Partition(stage.root.child(folder), int(number), np.empty(0, np.int64))
        meant = np.isin(partition.ids, ids)
        urls = canonical_column(partition.metadata["url"].combine_chunks())
        known = np.flatnonzero(urls.is_valid().to_numpy(zero_copy_only=False))
        urls = urls.take(pa.array(known))
        # Patches have ids of their own, and the URL of their picture.
        meant[known] |= np.isin(hash_urls(urls)[0], ids) | blocklist.blocks_hosts(urls)
        return _noted(stage, name, partition.ids[meant])

    return hold


def _noted(stage: Stage, name: str, ids: npt.NDArray[np.int64]) -> ShardRecord:
    """The record of a shard in which these ids were found, and a file of them if there are any."""
    if not len(ids):
        return ShardRecord(name, 0, ())
    file = stage.root.write_bytes(f"{stage.name}/{name}.ids", ids.astype("<i8").tobytes())
    return ShardRecord(name, len(ids), (file,))


def _collected(stage: Stage, records: list[ShardRecord]) -> npt.NDArray[np.int64]:
    """The ids that were found in all shards, ascending."""
    parts = [np.empty(0, np.int64)]
    for record in records:
        for file in record.files:
            with stage.root.open(file.name) as found:
                parts.append(np.frombuffer(found.read(), "<i8"))
    return np.unique(np.concatenate(parts))


def _databases(root: Root) -> list[str]:
    """Folders of the databases of a root. Raises UserError if one is not finished: it could hide nothing."""
    files = [name.split("/") for name in root.list("databases")]
    folders = sorted({f"databases/{parts[1]}" for parts in files if len(parts) > 2})
    if root.exists("index") or root.exists("download/manifest.json"):
        folders.insert(0, "index")
    for folder in folders:
        if not root.exists(f"{folder}/manifest.json"):
            word = folder.partition("/")[0].removesuffix("s")
            raise UserError(
                f"{root.at(folder)} is not finished, so nothing can be hidden in it. Run 'make {word}', then "
                "this again; before the first index you may instead name the list as filter.blocklist and "
                "download.blocklist."
            )
    return folders


def _mend(stage: Stage) -> Removed:
    """Take all that the training database hides out of the neighbor tables."""
    root, saved = stage.root, f"{stage.name}/before"
    if root.exists(saved) and read_manifest(root, saved).upstream["now"] != _now(root, saved).fingerprint:
        root.delete(saved)  # more is hidden since, so these new tables will not do
    if not root.exists(saved):
        before = read_manifest(root, "neighbors")
        now = _now(root, "neighbors")
        if before.fingerprint == now.fingerprint:
            return Removed(free=(now.fingerprint,))
        if _made_from(before) != _made_from(now):
            raise UserError(
                f"{root.at('neighbors')} was made from another index; the databases hide the images already. "
                "Run 'make neighbors', then this again."
            )
        marked = replace(before, upstream={"now": now.fingerprint})
        root.write_json(f"{saved}/manifest.json", asdict(marked))
    before = read_manifest(root, saved)
    config = NeighborsConfig.model_validate(before.config)
    names = [f"refill/{shard}" for shard in before.shard_names()]
    work = partial(refill_work, root, config, f"{stage.name}/neighbors")
    records = run_shards(stage, names, work, Workers.from_config(config, num_gpus=config.gpus_per_worker))
    return _replace_tables(root, before, records)


def _now(root: Root, folder: str) -> Stage:
    """The stage that would make the tables with the settings of a manifest, and with what is hidden now."""
    return neighbors_stage(NeighborsConfig.model_validate(read_manifest(root, folder).config), root)


def _made_from(tables: Manifest | Stage) -> tuple[int, dict[str, str]]:
    """The format of neighbor tables and what they are made from, but for what is hidden."""
    upstream = {stage: identity for stage, identity in tables.upstream.items() if stage != "hidden"}
    return tables.schema_version, upstream


def _replace_tables(root: Root, before: Manifest, refilled: list[ShardRecord]) -> Removed:
    """Put the new tables in the place of the old, the manifest last."""
    now = neighbors_stage(NeighborsConfig.model_validate(before.config), root)
    root.delete("neighbors/manifest.json")
    shards = tuple(_replaced(root, old, new) for old, new in zip(before.shards, refilled, strict=True))
    made_of = (before.fingerprint, *before.values.get("made_of", ()))
    manifest = replace(
        before,
        fingerprint=now.fingerprint,
        upstream=now.upstream,
        shards=shards,
        values={**before.values, "made_of": list(made_of)},
    )
    write_manifest(root, manifest)
    if not any(new.files for new in refilled):
        return Removed(free=(now.fingerprint, before.fingerprint))
    counts = [int(sum(new.values.get(word, 0) for new in refilled)) for word in ("dropped", "refilled")]
    return Removed(made_of, (now.fingerprint,), *counts)


def _with_earlier(removed: Removed, earlier: Removed) -> Removed:
    """What left the tables now, or earlier if they were freed of it then, with the tables of both times.

    A run that read the earlier tables may have written its first checkpoint since.
    """
    return replace(
        removed if removed.held else earlier,
        held=tuple(dict.fromkeys((*removed.held, *earlier.held))),
        free=tuple(dict.fromkeys((*removed.free, *earlier.free))),
    )


def _replaced(root: Root, old: ShardRecord, new: ShardRecord) -> ShardRecord:
    """The record of a table, after its new version, if there is one, took its place."""
    if not new.files:
        return old
    [made] = new.files
    [stands] = old.files
    with root.local(made.name) as source, root.writing(stands.name) as pending:
        shutil.copyfile(source, pending.path)
    reasons = {
        word: old.reasons.get(word, 0) + new.reasons.get(word, 0) for word in {**old.reasons, **new.reasons}
    }
    return replace(
        old, rows=new.rows, files=(FileRecord(stands.name, made.bytes, made.sha256),), reasons=reasons
    )


def _trained(root: Root, removed: Removed) -> dict[str, list[str]]:
    """Runs trained on tables that held what was removed, and runs trained on tables that are not known."""
    found: dict[str, list[str]] = {"with": [], "unknown": []}
    marks = [name for mark in MARKS for name in root.list("runs", mark)]
    for folder in sorted({name.partition("/train/")[0] for name in marks}):
        tables = _tables_of(root, folder)
        if tables & set(removed.held):
            found["with"].append(folder)
        elif not tables <= set(removed.free):
            found["unknown"].append(folder)
    return found


def _tables_of(root: Root, folder: str) -> set[str]:
    """Fingerprints of the neighbor tables that a run's model and its checkpoints were trained on."""
    model, checkpoints = (f"{folder}{mark}" for mark in MARKS)
    tables = set()
    if root.exists(model):
        tables.add(root.read_json(model)["upstream"].get("neighbors", ""))
    if root.exists(checkpoints):
        tables.add(root.read_json(checkpoints)["settings"].get("neighbors stage", ""))
    return tables
