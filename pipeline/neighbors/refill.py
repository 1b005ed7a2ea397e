"""Removes hidden images from neighbor tables: drops their rows and replaces them as neighbors.

Reads `neighbors/<shard>.parquet` and the database `index/` with its hidden ids; writes only the tables that change.
`find/<shard>` counts the rows that lack neighbors; `search/<group>` finds them new ones for a group of shards, for
which it opens each partition once; `write/<shard>` writes a new table beside the old one, `replace/<shard>` over it.
"""

import hashlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.neighbors.matching import neighbor_table, read_queries, shard_number
from pipeline.neighbors.stored_effort import stored_effort
from pipeline.recipe import NeighborsConfig
from pipeline.runtime.runner import run_shards
from pipeline.runtime.stage import Stage, group_shards, map_in_threads
from pipeline.runtime.workers import Work, Workers
from retrieval.arrow_files import read_batch, write_batches
from retrieval.database.database import Database
from retrieval.index.hidden import Ids
from retrieval.index.routing import Vectors
from retrieval.join.join import join_database
from retrieval.storage import schema
from retrieval.storage.manifest import ShardRecord, delete_record, write_record
from retrieval.storage.schema import Reason

FIND, SEARCH, WRITE, REPLACE = (f"refill/{task}/" for task in ("find", "search", "write", "replace"))
"""Beginnings of the names of the tasks."""
ROWS_PER_SEARCH = 100_000
"""Rows of a group that lack neighbors: 12 KB each at k = 8."""
Masks = tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_], npt.NDArray[np.bool_]]
"""Image ids of the rows of a table, which of them are hidden, and which others have a hidden neighbor."""


@dataclass(frozen=True)
class Refill:
    """The removal of hidden ids from finished tables.

    stage: has the records of the tasks. config: settings of the tables. folder: of new tables and neighbors.
    hidden: the ids. All tasks remove these, also if more are hidden in the database meanwhile.
    """

    stage: Stage
    config: NeighborsConfig
    folder: str
    hidden: Ids
    include_finished: bool = False
    """Whether finished tasks run again."""

    def write(self, shards: Sequence[str]) -> dict[str, ShardRecord]:
        """Write the new table of each shard that has a hidden id; the records of these tables by shard.

        Their values count the rows `dropped` and `refilled`.
        """
        found = self._run(FIND, shards, partial(find_work, self))
        changed = [replace(record, shard=record.shard.removeprefix(FIND)) for record in found if record.values]
        groups = group_shards((record for record in changed if record.rows), ROWS_PER_SEARCH)
        numbers = [f"{number:05d}" for number in range(len(groups))]
        self._run(SEARCH, numbers, partial(search_work, self, groups), self.config.gpus_per_worker)
        batches = {
            shard: (name, n) for name, group in zip(numbers, groups, strict=True) for n, shard in enumerate(group)
        }
        written = self._run(WRITE, [record.shard for record in changed], partial(write_work, self, batches))
        return {record.shard.removeprefix(WRITE): record for record in written}

    def apply(self, fingerprint: str, records: Sequence[ShardRecord], new: Mapping[str, ShardRecord]) -> None:
        """Replace the old tables by the new ones of `write`, and write the records of all. records: see `replaced`."""
        root, tables = self.stage.root, {record.shard: record for record in records if record.shard in new}
        self._run(REPLACE, [*tables], partial(replace_work, self, fingerprint, tables))
        others = [record for record in records if record.shard not in new]
        map_in_threads(partial(write_record, root, "neighbors", fingerprint), others)

    def _run(
        self, task: str, names: Sequence[str], make_work: Callable[[], Work], num_gpus: float = 0
    ) -> Sequence[ShardRecord]:
        workers = Workers.from_config(self.config, num_gpus=num_gpus)
        # Another fingerprint: records of a killed removal of other ids are not used.
        digest = hashlib.sha256(self.hidden.tobytes()).hexdigest()[:16]
        stage = replace(self.stage, upstream=self.stage.upstream | {"removed": digest})
        return run_shards(stage, [f"{task}{name}" for name in names], make_work, workers, self.include_finished)


def replaced(old: ShardRecord, new: ShardRecord | None) -> ShardRecord:
    """The record of a table after its replacement. new: as from `Refill.write`, None for a table that stays."""
    if new is None:
        return old
    [new_file], [old_file] = new.files, old.files
    reasons = {word: old.reasons.get(word, 0) + new.reasons.get(word, 0) for word in {**old.reasons, **new.reasons}}
    return replace(old, rows=new.rows, files=(replace(new_file, name=old_file.name),), reasons=reasons)


def find_work(refill: Refill) -> Work:
    """Work whose record has the number of rows with a hidden neighbor, and a value if the table has a hidden id."""
    database = _index(refill)

    def find(name: str) -> ShardRecord:
        _, hidden, affected = _masks(refill, database, name.removeprefix(FIND))
        values = {"hidden": float(hidden.sum())} if (hidden | affected).any() else {}
        return ShardRecord(name, int(affected.sum()), (), values=values)

    return find


def search_work(refill: Refill, groups: list[list[str]]) -> Work:
    """Work that writes `<folder>/search/<group>.arrow`: batch n has new rows for the n-th shard of the group."""
    effort = stored_effort(refill.config, refill.stage.root)
    return partial(_search, refill, effort, groups, _index(refill))


def _search(
    refill: Refill, effort: NeighborsConfig, groups: list[list[str]], database: Database, name: str
) -> ShardRecord:
    shards = groups[shard_number(name)]
    ids, queries = zip(*(_queries(refill, database, shard) for shard in shards), strict=True)
    result = join_database(database, np.concatenate(queries), effort.join_config(), effort.device)
    full = np.isfinite(result.similarities).all(axis=1)
    neighbor_ids, vectors, norms = _stored_rows(database, result.positions[full])
    rows = np.concatenate(ids)[full], neighbor_ids, result.similarities[full]
    table = neighbor_table(rows, vectors, norms)
    counts = [int(part.sum()) for part in np.split(full, np.cumsum([*map(len, ids)])[:-1])]
    parts = (table.slice(end - count, count) for end, count in zip(np.cumsum(counts), counts, strict=True))
    batches = (pa.record_batch([column.combine_chunks() for column in part.columns], table.schema) for part in parts)
    file = write_batches(refill.stage.root, _new_rows(refill, name.removeprefix(SEARCH)), batches, table.schema)
    return ShardRecord(name, len(table), (file,))


def _queries(refill: Refill, database: Database, shard: str) -> tuple[npt.NDArray[np.int64], Vectors]:
    """Image ids (n,) and unit vectors (n, dim) of the rows of a table that have a hidden neighbor, in its order."""
    ids, _, affected = _masks(refill, database, shard)
    shard_ids, vectors = read_queries(refill.stage.root, shard, database.dim)
    numbers = {image_id: number for number, image_id in enumerate(shard_ids.tolist())}
    return ids[affected], vectors[[numbers[image_id] for image_id in ids[affected].tolist()]]


def write_work(refill: Refill, batches: dict[str, tuple[str, int]]) -> Work:
    """Work that writes `<folder>/<shard>.parquet`. batches: group and number of the batch of shards with new rows."""
    return partial(_write, refill, batches, _index(refill))


def _write(refill: Refill, batches: dict[str, tuple[str, int]], database: Database, name: str) -> ShardRecord:
    root, shard = refill.stage.root, name.removeprefix(WRITE)
    columns = schema.neighbors(refill.config.k, database.dim)
    new_rows = columns.empty_table()
    if shard in batches:
        group, number = batches[shard]
        new_rows = pa.Table.from_batches([read_batch(root, _new_rows(refill, group), number)])
    ids, hidden, affected = _masks(refill, database, shard)
    table = schema.read_table(root, f"neighbors/{shard}.parquet", columns)
    unchanged, refilled = np.flatnonzero(~hidden & ~affected), np.flatnonzero(affected)
    refilled = refilled[np.isin(ids[refilled], new_rows[schema.IMAGE_ID].to_numpy())]
    if len(new_rows) != len(refilled):
        raise RuntimeError(
            f"{shard}: {len(new_rows)} rows were searched for {len(refilled)} that have a hidden neighbor"
        )
    order = np.argsort(np.concatenate([unchanged, refilled]))
    new_table = pa.concat_tables([table.take(pa.array(unchanged)), new_rows]).take(pa.array(order))
    written = schema.write_table(root, f"{refill.folder}/{shard}.parquet", new_table, columns)
    short = int(affected.sum()) - len(refilled)
    reasons = {str(Reason.BLOCKED): int(hidden.sum()), str(Reason.TOO_FEW_NEIGHBORS): short}
    values = {"dropped": float(hidden.sum() + short), "refilled": float(len(refilled))}
    return ShardRecord(name, len(new_table), (written,), {word: n for word, n in reasons.items() if n}, values)


def replace_work(refill: Refill, fingerprint: str, records: dict[str, ShardRecord]) -> Work:
    """Work that copies the new table of a shard over the old one, and writes its record. records: see `replaced`."""
    root = refill.stage.root

    def copy(name: str) -> ShardRecord:
        shard = name.removeprefix(REPLACE)
        delete_record(root, "neighbors", shard)  # a killed worker may have replaced the table already
        with (
            root.local(f"{refill.folder}/{shard}.parquet") as source,
            root.writing(records[shard].files[0].name) as pending,
        ):
            shutil.copyfile(source, pending.path)
        write_record(root, "neighbors", fingerprint, records[shard])
        return ShardRecord(name, 0, ())

    return copy


def _index(refill: Refill) -> Database:
    """The database with exactly the ids of the removal hidden."""
    return Database.open(refill.stage.root.child("index")).with_all_rows().without(refill.hidden)


def _new_rows(refill: Refill, group: str) -> str:
    return f"{refill.folder}/search/{group}.arrow"


def _masks(refill: Refill, database: Database, shard: str) -> Masks:
    columns = schema.neighbors(refill.config.k, database.dim)
    names = [schema.IMAGE_ID, schema.NEIGHBOR_IDS]
    table = schema.read_table(refill.stage.root, f"neighbors/{shard}.parquet", columns, names)
    ids = table[schema.IMAGE_ID].to_numpy()
    hidden = np.isin(ids, database.hidden)
    return ids, hidden, ~hidden & np.isin(schema.vectors(table, schema.NEIGHBOR_IDS), database.hidden).any(axis=1)


def _stored_rows(
    database: Database, positions: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float16], npt.NDArray[np.float32]]:
    """Ids (n, k), unit vectors (n, k, dim) and lengths (n, k) at positions (n, k). Opens one partition at a time."""
    ids = np.empty(positions.shape, np.int64)
    vectors = np.empty((*positions.shape, database.dim), np.float16)
    norms = np.empty(positions.shape, np.float32)
    for number, count in enumerate(database.partition_rows):
        first = database.first_position(number)
        inside = (positions >= first) & (positions < first + count)
        if inside.any():
            partition = database.open_partition(number)
            ids[inside] = partition.ids[positions[inside] - first]
            vectors[inside] = partition.embeddings[positions[inside] - first]
            norms[inside] = partition.norms[positions[inside] - first]
    return ids, vectors, norms
