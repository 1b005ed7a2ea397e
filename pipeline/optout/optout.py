"""optout: removes the images of a blocklist from finished stages, without running them again.

Reads the blocklist, the tables of `download`, the databases, `neighbors` and the manifests of training runs; writes
`hidden/<digest>.npy` into databases that contain a listed image, the neighbor tables that change, and
`optout/<list>.json`. Pictures, vectors and latents stay on disk unused, or are erased (`erase.py`). A repeated run
gives the same result.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np

from pipeline.optout.erase import ErasePlan, current_stages, plan_file
from pipeline.optout.erase import erase as erase_planned
from pipeline.optout.erased_files import urls_are_listed
from pipeline.optout.tables import Removed, refill_tables, with_earlier
from pipeline.runtime.id_files import read_ids, write_ids
from pipeline.runtime.runner import run_shards
from pipeline.runtime.stage import Stage
from pipeline.runtime.workers import Work, Workers, shared_workers
from pipeline.web.blocklist import Blocklist
from retrieval.config import Config
from retrieval.database.database import Database
from retrieval.errors import UserError
from retrieval.index.hidden import Ids, hide
from retrieval.storage import schema
from retrieval.storage.manifest import ShardRecord, read_manifest, shard_file
from retrieval.storage.root import Root

SCHEMA_VERSION = 1
TRAINING_FILES = ("/train/manifest.json", "/train/checkpoints/checkpoints.json")
"""Files of a training run that name its neighbor tables."""
REMAINS = (
    "Left on disk, unused: the pictures in download/, the small pictures of style databases"
    " (databases/*/pictures/*.tar), rows in filter/, download/ and embed/, vectors in the databases, and"
    " latents. To erase all but the rows in filter/, run this command again with --erase (make: ARGS=--erase)."
    " md5: entries apply only while downloading. sha256: and phash: entries apply to downloaded pictures, not to style"
    " databases: list their pictures by domain or id. Samples are not searched."
)
REMAINS_ERASED = (
    "Left on disk: URLs and captions in filter/ and download/, copies outside this root (backups, versions of an object"
    " store, caches of trainers), samples, and trained models. Add the list to download.blocklist, else 'download"
    " --retry' fetches the pictures again."
)


def run(blocklist: Blocklist, root: Root, erase: bool = False) -> dict[str, Any]:
    """Remove the images of a blocklist from the stages of a root; returns the report.

    erase: delete them from all files too. An erasure that was interrupted is finished in any case. Raises UserError
    for unfinished stages, and for neighbor tables of another index.
    """
    name = f"optout/{blocklist.identity}"
    if not root.exists(plan_file(blocklist)):
        _hide(blocklist, root, erase)
    report = dict(root.read_json(f"{name}.json"))
    if root.exists(plan_file(blocklist)):
        numbers = erase_planned(root, blocklist)
        earlier = report["erased"]
        report["erased"] = {word: max(number, earlier.get(word, 0)) for word, number in numbers.items()}
        report["remains"] = REMAINS_ERASED
        if root.exists("neighbors"):  # its inputs have other identities now
            tables = read_manifest(root, "neighbors").fingerprint
            report["neighbors"]["free"] = [*dict.fromkeys((tables, *report["neighbors"]["free"]))]
        root.write_json(f"{name}.json", report)
    root.delete(name)
    return report


def _hide(blocklist: Blocklist, root: Root, erase: bool) -> None:
    """Hide the listed images, remove them from the neighbor tables, write the report, and if asked for the plan."""
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
        found = _find_downloaded(stage, blocklist)
        ids = found.ids if "download" in inputs else blocklist.ids
        listed = np.union1d(ids, blocklist.ids)
        rows = {folder: _find_rows(stage, folder, blocklist, listed) for folder in databases}
        for folder, database in rows.items():
            # The training database also hides training images: this removes their rows from the neighbor tables.
            hidden = np.union1d(ids, database.ids) if folder == "index" else database.ids
            if len(hidden):
                hide(root.child(folder), hidden)
        removed = refill_tables(stage) if "index" in databases and root.exists("neighbors") else Removed()
        if earlier:
            removed = with_earlier(removed, Removed(**earlier["neighbors"]))
        root.write_json(f"{name}.json", _report(root, blocklist, (ids, rows, removed), earlier))
        if erase:
            root.write_json(plan_file(blocklist), asdict(_plan(root, found, rows)))


def _report(
    root: Root, blocklist: Blocklist, removal: tuple[Ids, dict[str, "Listed"], Removed], earlier: dict[str, Any]
) -> dict[str, Any]:
    """The report of a list. removal: ids of the pictures, rows by database, and changes of the neighbor tables."""
    ids, rows, removed = removal
    before = earlier.get("databases", {})  # rows that were erased since are found no more
    return {
        "list": blocklist.identity,
        "ids": ids.tolist(),
        "databases": {folder: max(len(found.ids), before.get(folder, 0)) for folder, found in rows.items()},
        "neighbors": asdict(removed),
        "trained": _affected_runs(root, removed),
        "erased": earlier.get("erased", {}),
        "remains": earlier.get("remains", REMAINS),
    }


def _plan(root: Root, downloaded: "Listed", rows: dict[str, "Listed"]) -> ErasePlan:
    return ErasePlan(
        ids=downloaded.ids.tolist(),
        shards=[name.removeprefix("find/") for name in downloaded.shards],
        rows={folder: found.ids.tolist() for folder, found in rows.items()},
        partitions=[name.removeprefix("hold/") for found in rows.values() for name in found.shards],
        current=current_stages(root),
    )


@dataclass(frozen=True)
class Listed:
    """Ids of listed images, ascending, and the shards of the search with at least one."""

    ids: Ids
    shards: list[str]


def _listed(stage: Stage, names: list[str], work: Callable[[], Work]) -> Listed:
    records = run_shards(stage, names, work, Workers())
    ids = read_ids(stage.root, [file for record in records for file in record.files])
    return Listed(ids, [record.shard for record in records if record.rows])


def _find_downloaded(stage: Stage, blocklist: Blocklist) -> Listed:
    """The downloaded images that the blocklist matches."""
    shards = read_manifest(stage.root, "download").shard_names() if "download" in stage.upstream else []
    return _listed(stage, [f"find/{shard}" for shard in shards], partial(_find_work, stage, blocklist))


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


def _find_rows(stage: Stage, folder: str, blocklist: Blocklist, ids: Ids) -> Listed:
    """The rows of a database that the blocklist matches."""
    count = len(Database.open(stage.root.child(folder)).partitions)
    names = [f"hold/{folder}/{number:05d}" for number in range(count)]
    return _listed(stage, names, partial(_search_work, stage, blocklist, ids))


def _search_work(stage: Stage, blocklist: Blocklist, ids: Ids) -> Work:
    def search(name: str) -> ShardRecord:
        folder, _, number = name.removeprefix("hold/").rpartition("/")
        partition = Database.open(stage.root.child(folder)).with_all_rows().partitions[int(number)]
        matches = np.isin(partition.ids, ids)
        # One chunk, or several if the URLs have more than 2 GiB.
        listed = [urls_are_listed(urls, blocklist, ids) for urls in partition.metadata["url"].chunks]
        matches |= np.concatenate([np.zeros(0, bool), *listed])
        return write_ids(stage.root, stage.name, name, partition.ids[matches])

    return search


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
