"""Tables of `neighbors` and `latents` whose stage did not finish: erases listed images from them too.

A table with an erased id is deleted after its record, so the next run of its stage makes it again. Other tables stay
and are used by that run.
"""

from dataclasses import asdict
from functools import partial

from pipeline.optout.erased_files import erased_rows
from pipeline.runtime.stage import map_in_threads
from retrieval.index.hidden import Ids
from retrieval.storage.manifest import (
    ShardRecord,
    delete_record,
    read_manifest,
    read_record,
    record_file,
    settings_fingerprint,
)
from retrieval.storage.root import Root
from retrieval.storage.stage_folder import STARTED_FILE, stored_identity

NEIGHBORS = "neighbors"


def unfinished_stages(root: Root) -> list[str]:
    """`neighbors` and the folders of latents, as far as they exist and have no manifest."""
    latents = sorted({"/".join(name.split("/")[:2]) for name in root.list("latents")})
    names = [NEIGHBORS, *latents]
    return [name for name in names if root.exists(name) and not root.exists(f"{name}/manifest.json")]


def unfinished_tables(root: Root) -> dict[str, str]:
    """The files of all tables of unfinished stages, each with its stage."""
    return {
        name: stage
        for stage in unfinished_stages(root)
        for name in root.list(stage, ".parquet")
        if name.rpartition("/")[0] == stage
    }


def erase_table(root: Root, tables: dict[str, str], ids: dict[str, Ids | None], name: str) -> ShardRecord:
    """Delete a table of an unfinished stage if it has an erased id. name: `tables/<file>`.

    ids: by stage; None deletes every table: those of a former database have rows whose ids are not known.
    """
    file = name.removeprefix("tables/")
    stage = tables[file]
    listed = ids[stage]
    if root.exists(file) and (listed is None or erased_rows(root, file, stage, listed)):
        delete_record(root, stage, file.removeprefix(f"{stage}/").removesuffix(".parquet"))
        root.delete(file)
    return ShardRecord(name, 0, ())


def has_current_tables(root: Root) -> bool:
    """Whether `neighbors` began with the present database and did not finish."""
    if NEIGHBORS not in unfinished_stages(root):
        return False
    index = stored_identity(root, NEIGHBORS).get("upstream", {}).get("index")
    return bool(index) and index == read_manifest(root, "index").identity


def keep_tables(root: Root) -> None:
    """Let the remaining tables of unfinished `neighbors` belong to the database without the erased rows.

    They have none of these rows, so they would be made again with the same content.
    """
    if NEIGHBORS not in unfinished_stages(root):
        return
    started = stored_identity(root, NEIGHBORS)
    upstream = started["upstream"] | {"index": read_manifest(root, "index").identity}
    identity = settings_fingerprint(NEIGHBORS, started["schema_version"], started["settings"], upstream)
    folder = f"{NEIGHBORS}/records/"
    shards = [name.removeprefix(folder).removesuffix(".json") for name in root.list(folder, ".json")]
    map_in_threads(partial(_keep_record, root, started["shard_fingerprint"], identity), shards)
    # Last: a repeated call of a killed one finds the remaining records by the former fingerprint.
    now = {"fingerprint": identity, "shard_fingerprint": identity, "upstream": upstream}
    root.write_json(f"{NEIGHBORS}/{STARTED_FILE}", started | now)


def _keep_record(root: Root, former: str, fingerprint: str, shard: str) -> None:
    stored = read_record(root, NEIGHBORS, shard)
    if stored and stored[0] == former:
        root.write_json(record_file(NEIGHBORS, shard), {"fingerprint": fingerprint, **asdict(stored[1])})
