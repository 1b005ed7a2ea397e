"""What a search answers, as an Arrow table: of one search, or merged of searches over parts of a database.

A table holds any number of neighbors for each query, so nothing stands for "none" in it.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from retrieval.database.database import Database
from retrieval.index.routing import Vectors
from retrieval.storage import schema

ANSWER = pa.schema(
    [
        pa.field("query", pa.int64(), nullable=False),
        pa.field("rank", pa.int32(), nullable=False),
        pa.field(schema.IMAGE_ID, pa.int64(), nullable=False),
        pa.field("similarity", pa.float32(), nullable=False),
        pa.field("position", pa.int64(), nullable=False),
    ]
)
"""A row for each neighbor, sorted by query, then rank: number of the query, rank from 0 (the best), image
id, inner product in [-1, 1], row number in the database."""


def answer(
    database: Database, similarities: Vectors, positions: npt.NDArray[np.int64], rows: bool
) -> pa.Table:
    """What `Database.search_partitions` found, (n, k) best first with -1 for nothing, as ANSWER.

    rows: the other columns of schema.METADATA follow.
    """
    query, rank = np.nonzero(positions >= 0)
    found = positions[query, rank]
    columns = [query, rank.astype(np.int32), database.ids_at(found), similarities[query, rank], found]
    table = pa.table([pa.array(column) for column in columns], schema=ANSWER)
    if rows:
        metadata = database.metadata_at(found).drop_columns([schema.IMAGE_ID])
        for field in metadata.schema:
            table = table.append_column(field, metadata[field.name])
    return table


def merge(parts: Sequence[pa.Table], num_queries: int, k: int) -> pa.Table:
    """The k best neighbors of each query among those that several actors found, ranked anew.

    parts: ANSWER's columns and equal others, ranks below k. Of equal similarities the lower position leads.
    """
    if len(parts) == 1:
        return parts[0]
    found = pa.concat_tables(parts)
    query, rank, similarity, position = (
        found[name].to_numpy() for name in ("query", "rank", "similarity", "position")
    )
    column = np.repeat(np.arange(len(parts)) * k, [len(part) for part in parts]) + rank
    shape = (num_queries, len(parts) * k)
    similarities = np.full(shape, -np.inf, np.float32)
    similarities[query, column] = similarity
    positions = np.zeros(shape, np.int64)
    positions[query, column] = position
    lines = np.full(shape, -1)
    lines[query, column] = np.arange(len(found))
    best = np.lexsort((positions, -similarities), axis=1)[:, :k]
    chosen = np.take_along_axis(lines, best, 1)
    ranks = np.nonzero(chosen >= 0)[1].astype(np.int32)
    return found.take(pa.array(chosen[chosen >= 0])).set_column(1, ANSWER.field("rank"), pa.array(ranks))
