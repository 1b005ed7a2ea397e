"""The shards that the search for near copies has compared: what the next one makes again.

Reads and writes `near_copies/shards.parquet`, the state of the last finished search. Does not use Ray.
"""

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pipeline.runtime.stage import Stage, group_shards
from retrieval.config import Config
from retrieval.storage import schema
from retrieval.storage.manifest import Manifest
from retrieval.storage.root import Root
from retrieval.storage.stage_folder import STARTED_FILE

FOLDER = "near_copies"
SHARDS_FILE = f"{FOLDER}/shards.parquet"
SCHEMA_VERSION = 1
ROWS_PER_GROUP = 4_000_000
"""Images of each side that are compared at a time."""
CHANGED_SHARDS = 400
"""Changed training shards of a file of changes: 4 million images of 10,000 a shard."""
SHARDS = pa.schema(
    [
        pa.field(name, pa.int64() if name == "batch" else pa.string(), nullable=False)
        for name in ("shard", "digest", "hashes", "batch", "copies")
    ]
)


@dataclass(frozen=True, slots=True)
class HashedShard:
    """Where the hashes of a shard are, as names below `near_copies/` without suffix."""

    digest: str
    """Of the files of `download` that they were read from."""
    hashes: str
    """File of hashes."""
    batch: int
    """Number of the record batch in it."""
    copies: str = ""
    """File of the copies among the images of a database shard."""


HashedShards = dict[str, HashedShard]
"""By shard, in the order of `download`."""


def near_copy_stage(root: Root, max_distance: int) -> Stage:
    """The search as a stage. What it finds does not depend on the encoder, so it has a folder of its own."""
    # Its files are derived from `download` in a short time, so they are made again without --remake.
    temporary = root.remaking()
    return Stage(temporary, FOLDER, SCHEMA_VERSION, Config(), {"near_copy_bits": str(max_distance)})


def digest(values: Any) -> str:
    """A digest of a JSON value."""
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]


def hashed_shards(download: Manifest) -> HashedShards:
    """The shards of `download`, in groups that share a file of hashes."""
    digests = download.digests()
    shards: HashedShards = {}
    for split in ("train/", "database/"):
        for group in group_shards((r for r in download.shards if r.shard.startswith(split)), ROWS_PER_GROUP):
            file = f"hashes/{digest([[shard, digests[shard]] for shard in group])}"
            shards |= {shard: HashedShard(digests[shard], file, number) for number, shard in enumerate(group)}
    return shards


def compared_shards(root: Root) -> HashedShards:
    """The shards that the last finished search compared. Empty without one, or if some of its files are missing."""
    names = set(root.list(FOLDER))
    if SHARDS_FILE not in names:
        return {}
    columns = schema.read_table(root, SHARDS_FILE, SHARDS).to_pydict().values()
    shards = {shard: HashedShard(*place) for shard, *place in zip(*columns, strict=True)}
    files = {f"{FOLDER}/{place.hashes}.arrow" for place in shards.values()}
    files |= {f"{FOLDER}/{place.copies}.parquet" for place in shards.values() if place.copies}
    return shards if files <= names else {}


def write_shards(root: Root, shards: HashedShards) -> None:
    """Store the shards of a finished search, then delete the files that it does not need."""
    columns = {name: [getattr(place, name) for place in shards.values()] for name in SHARDS.names[1:]}
    table = pa.table({"shard": [*shards], **columns}, schema=SHARDS)
    schema.write_table(root, SHARDS_FILE, table, SHARDS)
    named = {name for place in shards.values() for name in (place.hashes, place.copies)} | {"shards", "started"}
    files = {name: name.removeprefix(f"{FOLDER}/").removeprefix("records/") for name in root.list(FOLDER)}
    root.delete_files(name for name, file in files.items() if file.partition(".")[0] not in named)


def shards_by_file(shards: HashedShards) -> dict[str, list[str]]:
    """The shards of each file of hashes, in order."""
    files: dict[str, list[str]] = {}
    for shard, place in shards.items():
        files.setdefault(place.hashes, []).append(shard)
    return files


def changed_shards(before: HashedShards, now: HashedShards, split: str) -> list[str]:
    """The shards of a split that are new, changed or gone."""
    names = sorted(shard for shard in {**before, **now} if shard.startswith(split))
    return [shard for shard in names if _digest_in(before, shard) != _digest_in(now, shard)]


def _digest_in(shards: HashedShards, shard: str) -> str:
    return shards[shard].digest if shard in shards else ""


def changed_groups(before: HashedShards, now: HashedShards) -> dict[str, list[str]]:
    """Changed training shards by file of changes. Empty if nothing was compared before."""
    shards = changed_shards(before, now, "train/") if before else []
    groups = (shards[first : first + CHANGED_SHARDS] for first in range(0, len(shards), CHANGED_SHARDS))
    names = ([[shard, _digest_in(before, shard), _digest_in(now, shard)] for shard in group] for group in groups)
    return {f"changes/{digest(name)}": [shard for shard, _, _ in name] for name in names}


def pending_comparisons(root: Root, download: Manifest, max_distance: int) -> str:
    """What the next search compares, in words for `make status`."""
    started = root.find_json(f"{FOLDER}/{STARTED_FILE}") or {}
    is_same = started.get("fingerprint") == near_copy_stage(root, max_distance).fingerprint
    before, now = compared_shards(root) if is_same else {}, hashed_shards(download)
    if not before:
        return "near copies: all database images are compared with all training images"
    train, database = (len(changed_shards(before, now, split)) for split in ("train/", "database/"))
    work = []
    if train:
        work.append(f"all database images with what {_shards(train, 'training')} gained")
    if database:
        work.append(f"the new images of {_shards(database, 'database')} with all training images")
    return f"near copies: compares {' and '.join(work)}" if work else ""


def _shards(count: int, split: str) -> str:
    return f"{count:,} changed {split} shard{'' if count == 1 else 's'}"
