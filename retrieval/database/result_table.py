"""Results of a search as an Arrow table with a row for each neighbor, and the merge of such tables."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from retrieval.index.hidden import Ids
from retrieval.index.routing import Vectors
from retrieval.index.top_k import Positions, top_k_columns
from retrieval.storage import schema

RESULT_SCHEMA = pa.schema(
    [
        *schema.columns({"query": pa.int64(), "rank": pa.int32(), schema.IMAGE_ID: pa.int64()}),
        *schema.columns({"similarity": pa.float32(), "position": pa.int64()}),
    ]
)
"""A row for each neighbor, sorted by query and rank: number of the query, rank from 0 (the best), image id,
inner product in [-1, 1], row number in the database."""


def result_table(similarities: Vectors, positions: Positions, ids: Ids, metadata: pa.Table | None = None) -> pa.Table:
    """A table of RESULT_SCHEMA. similarities, positions: (n, k), best first, position -1 for no neighbor.

    ids, metadata: of all neighbors, in the order of `positions[positions >= 0]`. Metadata columns come last.
    """
    query, rank = np.nonzero(positions >= 0)
    columns = [query, rank.astype(np.int32), ids, similarities[query, rank], positions[query, rank]]
    table = pa.table([pa.array(column) for column in columns], schema=RESULT_SCHEMA)
    if metadata is not None:
        metadata = metadata.drop_columns([schema.IMAGE_ID])
        for field in metadata.schema:
            table = table.append_column(field, metadata[field.name])
    return table


def merge_results(tables: Sequence[pa.Table], num_queries: int, k: int) -> pa.Table:
    """The k best neighbors of each query from tables of different partitions, ranked again.

    tables: RESULT_SCHEMA and further columns, which all tables share; ranks below k. Equal similarities are
    ordered by ascending position.
    """
    if len(tables) == 1:
        return tables[0]
    rows = pa.concat_tables(tables)
    query, rank, similarity, position = (rows[name].to_numpy() for name in ("query", "rank", "similarity", "position"))
    column = np.repeat(np.arange(len(tables)) * k, [len(table) for table in tables]) + rank
    shape = (num_queries, len(tables) * k)
    similarities = np.full(shape, -np.inf, np.float32)
    similarities[query, column] = similarity
    positions = np.zeros(shape, np.int64)
    positions[query, column] = position
    numbers = np.full(shape, -1)
    numbers[query, column] = np.arange(len(rows))
    best = np.take_along_axis(numbers, top_k_columns(similarities, positions, k), 1)
    ranks = np.nonzero(best >= 0)[1].astype(np.int32)
    return rows.take(pa.array(best[best >= 0])).set_column(1, RESULT_SCHEMA.field("rank"), pa.array(ranks))
