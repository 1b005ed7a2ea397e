"""optout: removes the images of a blocklist from finished stages, without running them again.

Reads the blocklist, the tables of `download`, the databases, `neighbors` and the manifests of training runs; writes
`hidden/<digest>.npy` into databases that contain a listed image, the neighbor tables that change, and
`optout/<list>.json`. Pictures, vectors and latents stay on disk but are not used. A repeated run gives the same result.
"""

import shutil
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.filter.selection import hash_urls
from pipeline.neighbors.neighbors import neighbors_stage
from pipeline.neighbors.refill import refill_work
from pipeline.recipe import NeighborsConfig
from pipeline.runtime.id_files import read_ids, write_ids
from pipeline.runtime.runner import run_shards
from pipeline.runtime.stage import Stage, map_in_threads
from pipeline.runtime.workers import Work, Workers, shared_workers
from pipeline.web.blocklist import Blocklist
from pipeline.web.urls import canonical_column
from retrieval.config import Config
from retrieval.database.database import Database
from retrieval.errors import UserError
from retrieval.index.hidden import hide
from retrieval.index.partition import Partition
from retrieval.storage import schema
from retrieval.storage.manifest import Manifest, ShardRecord, read_manifest, shard_file, write_manifest, write_record
from retrieval.storage.root import Root
from retrieval.storage.stage_folder import STARTED_FILE

SCHEMA_VERSION = 1
TRAINING_FILES = ("/train/manifest.json", "/train/checkpoints/checkpoints.json")
"""Files of a training run that name its neighbor tables."""
REMAINS = (
    "Left on disk, unused: the pictures in download/, the small pictures of style databases"
    " (databases/*/pictures/*.tar), rows in filter/, download/ and embed/, vectors in the databases, and"
    " latents. To erase all but the rows in filter/, add the list to filter.blocklist and download.blocklist, run these"
    " stages, then the later ones with --remake. md5: entries apply only while downloading. sha256: and phash: entries"
    " apply to downloaded pictures, not to style databases: list their pictures by domain or id. Samples are not"
    " searched."
)


@dataclass(frozen=True)
class Removed:
    """What was removed from the neighbor tables."""

    held: tuple[str, ...] = ()
    """Fingerprints of tables with a removed image, and of the tables they were derived from, newest first."""
    free: tuple[str, ...] = ()
    """Fingerprints of tables without a removed image."""
    dropped: int = 0
    """Number of rows (training images) that were dropped."""
    refilled: int = 0
    """Number of rows with replaced neighbors."""


def run(blocklist: Blocklist, root: Root) -> dict[str, Any]:
    """Remove the images of a blocklist from the stages of a root; returns the report.

    Raises UserError for unfinished stages, and for neighbor tables of another index.
    """
    name = f"optout/{blocklist.identity}"
    earlier = root.read_json(f"{name}.json") if root.exists(f"{name}.json") else {}
    databases = _databases(root)
    inputs = {folder: read_manifest(root, folder).identity for folder in databases}
    if root.exists("download/manifest.json"):
        inputs["download"] = read_manifest(root, "download").identity
    # Its files are temporary: those of a killed run with other inputs are deleted.
    temporary = Root(root.url, remake=True)
    stage = Stage(temporary, name, SCHEMA_VERSION, Config(), {**inputs, "list": blocklist.identity})
    with stage.building(), shared_workers():
        ids = _downloaded_ids(stage, blocklist)
        listed = np.union1d(ids, blocklist.ids)
        ids_by_database = {folder: _database_ids(stage, folder, blocklist, listed) for folder in databases}
        for folder, database_ids in ids_by_database.items():
            # The training database also hides training images: this removes their rows from the neighbor tables.
            hidden = np.union1d(ids, database_ids) if folder == "index" else database_ids
            if len(hidden):
                hide(root.child(folder), hidden)
        removed = _refill_tables(stage) if "index" in databases and root.exists("neighbors") else Removed()
        if earlier:
            removed = _with_earlier(removed, Removed(**earlier["neighbors"]))
        report = {
            "list": blocklist.identity,
            "ids": ids.tolist(),
            "databases": {folder: len(database_ids) for folder, database_ids in ids_by_database.items()},
            "neighbors": asdict(removed),
            "trained": _affected_runs(root, removed),
            "remains": REMAINS,
        }
        root.write_json(f"{name}.json", report)
        root.delete(name)
        return dict(root.read_json(f"{name}.json"))


def _downloaded_ids(stage: Stage, blocklist: Blocklist) -> npt.NDArray[np.int64]:
    """Ids of the downloaded images that the blocklist matches, ascending; without a download, its own ids."""
    if "download" not in stage.upstream:
        return blocklist.ids
    shards = [f"find/{shard}" for shard in read_manifest(stage.root, "download").shard_names()]
    records = run_shards(stage, shards, partial(_find_work, stage, blocklist), Workers())
    return read_ids(stage.root, [file for record in records for file in record.files])


def _find_work(stage: Stage, blocklist: Blocklist) -> Work:
    def find(name: str) -> ShardRecord:
        path = shard_file(stage.root, "download", name.removeprefix("find/"), ".parquet")
        table = schema.read_table(stage.root, path, schema.DOWNLOADED)
        matches = blocklist.blocks_hosts(table["url"].combine_chunks())
        matches |= blocklist.blocks_ids(table[schema.IMAGE_ID].to_numpy())
        matches |= blocklist.blocks_phashes(table["phash"].to_numpy())
        matches |= blocklist.blocks_contents(table["sha256"].combine_chunks())
        return write_ids(stage.root, stage.name, name, table[schema.IMAGE_ID].to_numpy()[matches])

    return find


def _database_ids(stage: Stage, folder: str, blocklist: Blocklist, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Ids of the rows of a database that the blocklist matches, ascending."""
    count = len(Database.open(stage.root.child(folder)).partitions)
    names = [f"hold/{folder}/{number:05d}" for number in range(count)]
    records = run_shards(stage, names, partial(_search_work, stage, blocklist, ids), Workers())
    return read_ids(stage.root, [file for record in records for file in record.files])


def _search_work(stage: Stage, blocklist: Blocklist, ids: npt.NDArray[np.int64]) -> Work:
    def search(name: str) -> ShardRecord:
        folder, _, number = name.removeprefix("hold/").rpartition("/")
        partition = Partition.open(stage.root.child(folder), int(number), np.empty(0, np.int64))
        matches = np.isin(partition.ids, ids)
        # One chunk, or several if the URLs have more than 2 GiB.
        listed = [_are_listed(urls, blocklist, ids) for urls in partition.metadata["url"].chunks]
        matches |= np.concatenate([np.zeros(0, bool), *listed])
        return write_ids(stage.root, stage.name, name, partition.ids[matches])

    return search


def _are_listed(column: pa.StringArray, blocklist: Blocklist, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Which URLs have a listed host or a listed id: the id of a patch is not that of its picture, but its URL is."""
    urls = canonical_column(column)
    known = np.flatnonzero(urls.is_valid().to_numpy(zero_copy_only=False))
    urls = urls.take(pa.array(known))
    matches = np.zeros(len(column), bool)
    matches[known] = np.isin(hash_urls(urls)[0], ids) | blocklist.blocks_hosts(urls)
    return matches


def _databases(root: Root) -> list[str]:
    """Folders of the databases of a root. Raises UserError for unfinished ones: they cannot hide ids."""
    files = [name.split("/") for name in root.list("databases")]
    folders = sorted({f"databases/{parts[1]}" for parts in files if len(parts) > 2})
    if root.exists("index") or root.exists("download/manifest.json"):
        folders.insert(0, "index")
    for folder in folders:
        if not root.exists(f"{folder}/manifest.json"):
            word = folder.partition("/")[0].removesuffix("s")
            raise UserError(
                f"{root.at(folder)} is not finished, so nothing can be hidden in it. Run 'make {word}', then "
                "this command again. Before the first index you can instead set filter.blocklist and "
                "download.blocklist to the list."
            )
    return folders


def _refill_tables(stage: Stage) -> Removed:
    """Remove the hidden ids of the training database from the neighbor tables."""
    root, saved = stage.root, f"{stage.name}/before"
    if root.exists(saved):
        target = _current_stage(root, saved).fingerprint
        if read_manifest(root, saved).upstream["now"] != target:
            root.delete(saved)  # more ids were hidden since, so its new tables are outdated
    if not root.exists(saved):
        before = read_manifest(root, "neighbors")
        now = _current_stage(root, "neighbors")
        if before.fingerprint == now.fingerprint:
            return Removed(free=(now.fingerprint,))
        if _inputs_without_hidden(before) != _inputs_without_hidden(now):
            raise UserError(
                f"{root.at('neighbors')} was made from another index. The images are hidden in the databases."
                " Run 'make neighbors', then this command again."
            )
        copy = replace(before, upstream={"now": now.fingerprint})
        root.write_json(f"{saved}/manifest.json", asdict(copy))
    before = read_manifest(root, saved)
    config = NeighborsConfig.model_validate(before.config)
    names = [f"refill/{shard}" for shard in before.shard_names()]
    work = partial(refill_work, root, config, f"{stage.name}/neighbors")
    records = run_shards(stage, names, work, Workers.from_config(config, num_gpus=config.gpus_per_worker))
    return _replace_tables(root, before, records)


def _current_stage(root: Root, folder: str) -> Stage:
    """The neighbors stage with the settings of a stored manifest and the ids that are hidden now."""
    return neighbors_stage(NeighborsConfig.model_validate(read_manifest(root, folder).config), root)


def _inputs_without_hidden(tables: Manifest | Stage) -> tuple[int, dict[str, str]]:
    """Format version and inputs of neighbor tables, without the hidden ids."""
    upstream = {stage: identity for stage, identity in tables.upstream.items() if stage != "hidden"}
    return tables.schema_version, upstream


def _replace_tables(root: Root, before: Manifest, refilled: list[ShardRecord]) -> Removed:
    """Replace the old tables by the new ones, the manifest last."""
    now = neighbors_stage(NeighborsConfig.model_validate(before.config), root)
    root.delete("neighbors/manifest.json")
    shards = tuple(_replace_table(root, old, new) for old, new in zip(before.shards, refilled, strict=True))
    root.write_json(f"neighbors/{STARTED_FILE}", asdict(now.identity))
    map_in_threads(partial(write_record, root, "neighbors", now.identity.shard_fingerprint), shards)
    made_of = (before.fingerprint, *before.values.get("made_of", ()))
    values = {**before.values, "made_of": list(made_of)}
    write_manifest(
        root, replace(before, fingerprint=now.fingerprint, upstream=now.upstream, shards=shards, values=values)
    )
    if not any(new.files for new in refilled):
        return Removed(free=(now.fingerprint, before.fingerprint))
    counts = [int(sum(new.values.get(word, 0) for new in refilled)) for word in ("dropped", "refilled")]
    return Removed(made_of, (now.fingerprint,), *counts)


def _with_earlier(removed: Removed, earlier: Removed) -> Removed:
    """The removal of this run, or of the earlier one if this run removed nothing; fingerprints of both.

    A training run that read the earlier tables may have written its first checkpoint since.
    """
    return replace(
        removed if removed.held else earlier,
        held=tuple(dict.fromkeys((*removed.held, *earlier.held))),
        free=tuple(dict.fromkeys((*removed.free, *earlier.free))),
    )


def _replace_table(root: Root, old: ShardRecord, new: ShardRecord) -> ShardRecord:
    """Replace a table by its new version, if there is one; returns its record."""
    if not new.files:
        return old
    [new_file] = new.files
    [old_file] = old.files
    with root.local(new_file.name) as source, root.writing(old_file.name) as pending:
        shutil.copyfile(source, pending.path)
    reasons = {word: old.reasons.get(word, 0) + new.reasons.get(word, 0) for word in {**old.reasons, **new.reasons}}
    return replace(old, rows=new.rows, files=(replace(new_file, name=old_file.name),), reasons=reasons)


def _affected_runs(root: Root, removed: Removed) -> dict[str, list[str]]:
    """Training runs on tables with removed images (`with`), and on unknown tables (`unknown`)."""
    affected: dict[str, list[str]] = {"with": [], "unknown": []}
    names = [name for file in TRAINING_FILES for name in root.list("runs", file)]
    for folder in sorted({name.partition("/train/")[0] for name in names}):
        tables = _run_tables(root, folder)
        if tables & set(removed.held):
            affected["with"].append(folder)
        elif not tables <= set(removed.free):
            affected["unknown"].append(folder)
    return affected


def _run_tables(root: Root, folder: str) -> set[str]:
    """Fingerprints of the neighbor tables that a run's model and checkpoints were trained on."""
    model, checkpoints = (f"{folder}{file}" for file in TRAINING_FILES)
    tables = set()
    if root.exists(model):
        tables.add(root.read_json(model)["upstream"].get("neighbors", ""))
    if root.exists(checkpoints):
        tables.add(root.read_json(checkpoints)["settings"].get("neighbors stage", ""))
    return tables
