"""Recall of the finished neighbor tables, against brute force on a seeded sample of their rows.

Reads the tables, their queries from `embed/train`, and every partition of the database once. Each pass
writes small files below `neighbors/recall/`; workers compare the sample with one partition each.
"""

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.neighbors.matching import read_queries, shard_number
from pipeline.runtime.workers import Work
from retrieval.arrow_files import read_batches, write_batches
from retrieval.database.database import Database
from retrieval.database.recall import confidence_interval, recall_per_query
from retrieval.join.join import join_partition
from retrieval.recipe import JoinConfig
from retrieval.storage import schema
from retrieval.storage.manifest import ShardRecord
from retrieval.storage.root import FileRecord, Root


def sample_work(root: Root, records: list[ShardRecord], num_rows: int, seed: int) -> Work:
    """Work that writes the query vectors and the similarities of a sample of num_rows rows of the tables."""
    database = Database.open(root.child("index"))

    def work(name: str) -> ShardRecord:
        sizes = [record.rows for record in records]
        random = np.random.default_rng([seed, 2])
        sample = np.sort(random.permutation(sum(sizes))[:num_rows])
        parts, start = [], 0
        for record in records:
            rows = sample[(sample >= start) & (sample < start + record.rows)] - start
            start += record.rows
            if len(rows):
                parts.append(_sampled_rows(root, record, rows, database.dim))
        return ShardRecord(name, len(sample), (_write(root, name, pa.concat_tables(parts)),))

    return work


def _sampled_rows(root: Root, record: ShardRecord, rows: npt.NDArray[np.int64], dim: int) -> pa.Table:
    with root.local(record.files[0].name) as path:
        table = pq.read_table(path, columns=[schema.IMAGE_ID, schema.SIMILARITIES]).take(pa.array(rows))
    ids, queries = read_queries(root, record.shard, dim)
    numbers = {image_id: number for number, image_id in enumerate(ids.tolist())}
    vectors = queries[[numbers[image_id] for image_id in table[schema.IMAGE_ID].to_pylist()]]
    return table.append_column(schema.EMBEDDING, schema.fixed_lists(vectors)).combine_chunks()


def truth_work(root: Root, exact: JoinConfig, device: str) -> Work:
    """Work that compares the sample with all rows of one partition."""
    database = Database.open(root.child("index"))
    queries = schema.vectors(_read(root, "recall/sample"), schema.EMBEDDING).astype(np.float32)

    def work(name: str) -> ShardRecord:
        partition = database.open_partition(shard_number(name))
        result = join_partition(partition, queries, exact, device)
        table = pa.table({schema.SIMILARITIES: schema.fixed_lists(result.similarities)})
        return ShardRecord(name, len(queries), (_write(root, name, table),))

    return work


def recall_work(root: Root, k: int, truths: list[str]) -> Work:
    """Work that compares the tables with the k nearest rows over all partitions; writes no file."""

    def work(name: str) -> ShardRecord:
        exact = [schema.vectors(_read(root, truth), schema.SIMILARITIES) for truth in truths]
        truth = -np.sort(-np.concatenate(exact, axis=1), axis=1)[:, :k].astype(np.float32)
        stored = schema.vectors(_read(root, "recall/sample"), schema.SIMILARITIES).astype(np.float32)
        mean, low, high = confidence_interval(recall_per_query(stored, truth))
        values = {"recall": mean, "recall_low": low, "recall_high": high, "recall_sample": float(len(stored))}
        return ShardRecord(name, len(stored), (), {}, values)

    return work


def _write(root: Root, name: str, table: pa.Table) -> FileRecord:
    return write_batches(root, f"neighbors/{name}.arrow", table.to_batches(), table.schema)


def _read(root: Root, name: str) -> pa.Table:
    return read_batches(root, f"neighbors/{name}.arrow")
