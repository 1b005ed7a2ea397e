"""How many of the true neighbors a finished neighbor table holds: brute force on a seeded sample of rows.

Reads the tables, their queries from `embed/train`, and every partition of the database once. Each pass
leaves a small file below `neighbors/recall/`, so that a sample of a thousand is compared with two
billion rows by many workers.
"""

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.neighbors.matching import number_of, queries_of
from pipeline.runtime.runner import Work
from retrieval.database.calibration import recall_per_query
from retrieval.database.database import Database
from retrieval.index.effort import confidence_interval
from retrieval.index.partition import Partition
from retrieval.join.join import match
from retrieval.recipe import JoinConfig
from retrieval.storage import schema
from retrieval.storage.manifest import ShardRecord
from retrieval.storage.root import FileRecord, Root


def make_sample(root: Root, records: list[ShardRecord], drawn: tuple[int, int]) -> Work:
    """Work that writes the vectors and found neighbors of `drawn` = (rows, seed) rows of the tables."""
    count, seed = drawn
    database = Database.open(root.child("index"))

    def work(name: str) -> ShardRecord:
        sizes = [record.rows for record in records]
        random = np.random.default_rng([seed, 2])
        chosen = np.sort(random.permutation(sum(sizes))[:count])
        parts, start = [], 0
        for record in records:
            here = chosen[(chosen >= start) & (chosen < start + record.rows)] - start
            start += record.rows
            if len(here):
                parts.append(_sampled(root, record, here, database.dim))
        return ShardRecord(name, len(chosen), (_write(root, name, pa.concat_tables(parts)),))

    return work


def _sampled(root: Root, record: ShardRecord, rows: npt.NDArray[np.int64], dim: int) -> pa.Table:
    with root.local(record.files[0].name) as path:
        table = pq.read_table(path, columns=[schema.IMAGE_ID, schema.SIMILARITIES]).take(pa.array(rows))
    ids, queries = queries_of(root, record.shard, dim)
    places = {image_id: place for place, image_id in enumerate(ids.tolist())}
    vectors = queries[[places[image_id] for image_id in table[schema.IMAGE_ID].to_pylist()]]
    return table.append_column(schema.EMBEDDING, schema.fixed_lists(vectors)).combine_chunks()


def make_truth(root: Root, exact: JoinConfig, device: str) -> Work:
    """Work that compares the sample with all rows of one partition."""
    database = Database.open(root.child("index"))
    queries = schema.vectors(_read(root, "recall/sample"), schema.EMBEDDING).astype(np.float32)

    def work(name: str) -> ShardRecord:
        number = number_of(name)
        partition = Partition(database.root, number, database.hidden)
        found = match(partition, queries, exact, device)
        table = pa.table({schema.SIMILARITIES: schema.fixed_lists(found.similarities)})
        return ShardRecord(name, len(queries), (_write(root, name, table),))

    return work


def make_recall(root: Root, k: int, truths: list[str]) -> Work:
    """Work that compares what the tables hold with the best over all partitions."""

    def work(name: str) -> ShardRecord:
        tables = [_read(root, truth) for truth in truths]
        similarities = np.concatenate(
            [schema.vectors(table, schema.SIMILARITIES) for table in tables], axis=1
        )
        truth = -np.sort(-similarities, axis=1)[:, :k].astype(np.float32)
        found = schema.vectors(_read(root, "recall/sample"), schema.SIMILARITIES).astype(np.float32)
        mean, low, high = confidence_interval(recall_per_query(found, truth))
        values = {"recall": mean, "recall_low": low, "recall_high": high, "recall_sample": float(len(found))}
        return ShardRecord(name, len(found), (), {}, values)

    return work


def _write(root: Root, name: str, table: pa.Table) -> FileRecord:
    with (
        root.writing(f"neighbors/{name}.arrow") as pending,
        pa.ipc.new_file(str(pending.path), table.schema) as file,
    ):
        file.write_table(table)
    return pending.record


def _read(root: Root, name: str) -> pa.Table:
    with root.open(f"neighbors/{name}.arrow") as file:
        return pa.ipc.open_file(file).read_all()
