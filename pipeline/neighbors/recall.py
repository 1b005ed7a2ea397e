"""Recall of the finished neighbor tables, against brute force on a seeded sample of the training images.

The sample is drawn from `embed/train` before the match, which compares it with all rows of each partition that it
opens. When the tables are finished, the sample is looked up in them. Images without a row there are left out.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.neighbors.matching import read_queries, truth_file
from pipeline.runtime.workers import Work
from retrieval.arrow_files import read_batches, write_batches
from retrieval.database.database import Database
from retrieval.database.recall import confidence_interval, recall_per_query
from retrieval.index.routing import Vectors
from retrieval.storage import schema
from retrieval.storage.manifest import ShardRecord
from retrieval.storage.root import Root

SAMPLE = "sample/all"


def sample_work(root: Root, shards: Sequence[tuple[str, int]], num_rows: int, seed: int) -> Work:
    """Work that writes the ids and vectors of num_rows training images. shards: names and rows of all shards."""
    dim = Database.open(root.child("index")).dim

    def work(name: str) -> ShardRecord:
        random = np.random.default_rng([seed, 2])
        sample = np.sort(random.permutation(sum(rows for _, rows in shards))[:num_rows])
        parts, start = [], 0
        for shard, count in shards:
            rows = sample[(sample >= start) & (sample < start + count)] - start
            start += count
            if len(rows):
                parts.append(_sampled_rows(root, shard, rows, dim))
        table = pa.concat_tables(parts).combine_chunks()
        file = write_batches(root, f"neighbors/{name}.arrow", table.to_batches(), table.schema)
        return ShardRecord(name, len(table), (file,))

    return work


def _sampled_rows(root: Root, shard: str, rows: npt.NDArray[np.int64], dim: int) -> pa.Table:
    ids, queries = read_queries(root, shard, dim)
    vectors = schema.fixed_lists(queries[rows])
    return pa.table({"shard": [shard] * len(rows), schema.IMAGE_ID: ids[rows], schema.EMBEDDING: vectors})


def recall_work(root: Root, k: int, num_partitions: int) -> Work:
    """Work that compares the tables with the k nearest rows over all partitions; writes no file."""
    columns = schema.neighbors(k, Database.open(root.child("index")).dim)

    def work(name: str) -> ShardRecord:
        sample = read_batches(root, f"neighbors/{SAMPLE}.arrow").select(["shard", schema.IMAGE_ID])
        exact = [
            schema.vectors(read_batches(root, truth_file(number)), schema.SIMILARITIES)
            for number in range(num_partitions)
        ]
        truth = -np.sort(-np.concatenate(exact, axis=1), axis=1)[:, :k].astype(np.float32)
        numbers, stored = _stored_rows(root, sample, columns)
        if not len(numbers):
            return ShardRecord(name, 0, ())
        mean, low, high = confidence_interval(recall_per_query(stored, truth[numbers]))
        values = {"recall": mean, "recall_low": low, "recall_high": high, "recall_sample": float(len(stored))}
        return ShardRecord(name, len(stored), (), {}, values)

    return work


def _stored_rows(root: Root, sample: pa.Table, columns: pa.Schema) -> tuple[npt.NDArray[np.int64], Vectors]:
    """Numbers (n,) of the images of the sample that have a row in a table, and their similarities (n, k)."""
    shards, ids = np.array(sample["shard"].to_pylist()), sample[schema.IMAGE_ID].to_numpy()
    numbers, similarities = [], []
    for shard in np.unique(shards):
        in_shard = np.flatnonzero(shards == shard)
        file = f"neighbors/{shard}.parquet"
        table = schema.read_table(root, file, columns, [schema.IMAGE_ID, schema.SIMILARITIES])
        rows = pc.index_in(pa.array(ids[in_shard]), value_set=table[schema.IMAGE_ID])
        numbers.append(in_shard[rows.is_valid().to_numpy(zero_copy_only=False)])
        similarities.append(schema.vectors(table, schema.SIMILARITIES)[rows.drop_null().to_numpy()])
    return np.concatenate(numbers), np.concatenate(similarities).astype(np.float32)
