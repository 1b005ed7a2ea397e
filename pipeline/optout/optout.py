"""optout: removes the images of a blocklist from finished stages, without running them again.

Reads the blocklist, the tables of `download`, the databases, `neighbors` and the manifests of training runs; writes
`hidden/<digest>.npy` into databases that contain a listed image, the neighbor tables that change, and
`optout/<list>.json`. Pictures, vectors and latents stay on disk unused, or are erased (`erase.py`). A repeated run
gives the same result.
"""

from collections import Counter
from dataclasses import asdict
from typing import Any

import numpy as np

from pipeline.optout.erase import ErasePlan, current_stages, end_erasures, plan_file, read_plan, start_erasures
from pipeline.optout.erase import erase as erase_planned
from pipeline.optout.ids_left import ids_left, left_folder
from pipeline.optout.proof import check_erasure, search_after, search_before
from pipeline.optout.search import Listed, ListSearch
from pipeline.optout.tables import Removed, refill_tables, with_earlier
from pipeline.runtime.id_files import store_erased
from pipeline.runtime.stage import Stage
from pipeline.runtime.workers import Workers, shared_workers
from pipeline.web.blocklist import Blocklist
from retrieval.config import Config
from retrieval.errors import UserError
from retrieval.index.hidden import Ids, hide
from retrieval.storage.lease import lease
from retrieval.storage.manifest import read_manifest
from retrieval.storage.root import Root

SCHEMA_VERSION = 1
AS_MANY_AS_FIT = Workers()
TRAINING_FILES = ("/train/manifest.json", "/train/checkpoints/checkpoints.json")
"""Files of a training run that name its neighbor tables."""
REMAINS = (
    "Left on disk, unused: the pictures in download/, the small pictures of style databases"
    " (databases/*/pictures/*.tar), rows in filter/, download/ and embed/, vectors in the databases, and"
    " latents. To erase all but the rows in filter/, run this command again with --erase (make: ARGS=--erase)."
    " md5: entries apply while downloading, and to downloaded pictures of which metadata states the MD5 and no SHA-256"
    " (filter.columns.md5). sha256: and phash: entries apply to downloaded pictures. Hashes do not apply to style"
    " databases: list their pictures by domain or id. Samples are not searched. Restart shared clusters: they serve the"
    " images until they are stopped."
)
REMAINS_ERASED = (
    "Left on disk: URLs and captions in filter/ and download/, copies outside this root (backups, versions of an"
    " object store, caches of trainers), samples, and trained models. No stage stores the erased ids again"
    " (optout/erased/), that is, images under the same URL, path and database name. Other pictures on the list that a"
    " later 'filter' selects need the list in download.blocklist. Known copies of erased pictures stay in download/"
    " until 'download --retry', but enter no database. Restart shared clusters: they serve the images until they are"
    " stopped."
)


def run(blocklist: Blocklist, root: Root, erase: bool = False, workers: Workers = AS_MANY_AS_FIT) -> dict[str, Any]:
    """Remove the images of a blocklist from the stages of a root; returns the report.

    erase: delete them from all files too. workers: of all passes but those that build partitions or search neighbors
    again, which have those of the stored settings of `index` and `neighbors`. An erasure that was interrupted is
    finished in any case. Raises UserError for unfinished stages, for neighbor tables of another index, if images cannot
    be erased because an update or another erasure works on a database, and if rows with erased ids are left or found.
    """
    with lease(root, f"optout/{blocklist.identity}/run"):
        try:
            return _run(blocklist, root, erase, workers)
        finally:
            if not root.exists(plan_file(blocklist)):  # nothing was begun, or everything is erased
                end_erasures(root, blocklist)


def _run(blocklist: Blocklist, root: Root, erase: bool, workers: Workers) -> dict[str, Any]:
    name = f"optout/{blocklist.identity}"
    if not root.exists(plan_file(blocklist)):
        _hide(blocklist, root, erase, workers)
    report = dict(root.read_json(f"{name}.json"))
    if root.exists(plan_file(blocklist)):
        plan = read_plan(root, blocklist)
        store_erased(root, np.union1d(blocklist.ids, plan.all_ids))
        numbers = erase_planned(root, blocklist, workers)
        earlier = report["erased"]
        report["erased"] = {word: max(number, earlier.get(word, 0)) for word, number in numbers.items()}
        report["remains"] = REMAINS_ERASED
        report["left"] = ids_left(root, name, plan, workers)
        for database, found in search_after(root, name, plan.rows).items():
            report["search"][database]["found_after"] = found
        root.write_json(f"{name}.json", report)
        try:
            check_erasure(root, report["left"], report["search"])
        except UserError:
            for folder in (f"{name}/erase", left_folder(name)):  # the next run rewrites the files and checks them again
                root.delete(folder)
            raise
    # In this order: records of an erasure without its plan, or a plan without its vectors, would mislead a later run.
    root.delete(f"{name}/erase")
    root.delete(plan_file(blocklist))
    root.delete(name)
    return report


def _hide(blocklist: Blocklist, root: Root, erase: bool, workers: Workers) -> None:
    """Hide the listed images, remove them from the neighbor tables, write the report and, for an erasure, its plan."""
    name = f"optout/{blocklist.identity}"
    earlier = root.read_json(f"{name}.json") if root.exists(f"{name}.json") else {}
    databases = _databases(root)
    if erase:
        start_erasures(root, blocklist, databases)  # updates would make the plan wrong
    inputs = {folder: read_manifest(root, folder).identity for folder in databases}
    if root.exists("download/manifest.json"):
        inputs["download"] = read_manifest(root, "download").identity
    # Its files are temporary: those of a killed run with other inputs are deleted.
    temporary = root.remaking()
    stage = Stage(temporary, name, SCHEMA_VERSION, Config(), {**inputs, "list": blocklist.identity})
    with stage.building(), shared_workers():
        search = ListSearch.prepared(stage, blocklist, databases, workers)
        found = search.pictures()
        ids = found.ids if "download" in inputs else blocklist.ids
        listed = np.union1d(ids, blocklist.ids)
        rows = {folder: search.rows(folder, listed) for folder in databases}
        for folder, database in rows.items():
            # The training database also hides training images: this removes their rows from the neighbor tables.
            hidden = np.union1d(ids, database.ids) if folder == "index" else database.ids
            if len(hidden):
                hide(root.child(folder), hidden)
        removed = refill_tables(stage) if "index" in databases else Removed()
        if earlier:
            removed = with_earlier(removed, Removed(**earlier["neighbors"]))
        report = _report(root, blocklist, (ids, rows, removed), earlier)
        # The larger count of each kind: an erasure also erases hashes, so fewer entries match afterwards.
        report["matches"] = dict(Counter(found.matches) | Counter(earlier.get("matches", {})))
        if erase:
            report["search"] |= search_before(root, name, rows)
        root.write_json(f"{name}.json", report)
        if erase:
            root.write_json(plan_file(blocklist), asdict(_plan(root, found, rows)))


def _report(
    root: Root, blocklist: Blocklist, removal: tuple[Ids, dict[str, Listed], Removed], earlier: dict[str, Any]
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
        "left": earlier.get("left", {}),
        "search": earlier.get("search", {}),
        "remains": earlier.get("remains", REMAINS),
    }


def _plan(root: Root, downloaded: Listed, rows: dict[str, Listed]) -> ErasePlan:
    return ErasePlan(
        ids=downloaded.ids.tolist(),
        shards=downloaded.shards,
        rows={folder: found.ids.tolist() for folder, found in rows.items()},
        partitions=[name for found in rows.values() for name in found.shards],
        current=current_stages(root),
    )


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
