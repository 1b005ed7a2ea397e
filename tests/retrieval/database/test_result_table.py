"""Merged result tables equal a sort of all rows, also for ties and for few neighbors."""

from collections.abc import Callable

import numpy as np
import pyarrow as pa

from retrieval.database.result_table import RESULT_SCHEMA, merge_results


def test_merged_tables_equal_a_sort_of_all_rows_with_ties_and_few_neighbors() -> None:
    rng = np.random.default_rng(7)
    k, num_queries = 5, 40
    rows = {
        query: [(float(rng.integers(4)), int(position)) for position in rng.permutation(1000)[:12]]
        for query in range(num_queries)
    }
    tables = [best_rows(rows, k, lambda position, part=part: position % 4 == part) for part in range(3)]
    merged = merge_results(tables, num_queries, k)
    expected = best_rows(rows, k, lambda position: position % 4 < 3)
    assert merged.schema.equals(expected.schema)
    assert merged.to_pylist() == expected.to_pylist()
    assert len(merged) < num_queries * k or len(tables[0]) < num_queries * k


def best_rows(rows: dict[int, list[tuple[float, int]]], k: int, chosen: Callable[[int], bool]) -> pa.Table:
    """The k best chosen rows of each query: RESULT_SCHEMA, and the position again as a column `url`."""
    lines = []
    for query, pairs in rows.items():
        best = sorted((-similarity, position) for similarity, position in pairs if chosen(position))[:k]
        for rank, (negative, position) in enumerate(best):
            lines.append((query, rank, -position, -negative, position, str(position)))
    names = [*RESULT_SCHEMA.names, "url"]
    schema = RESULT_SCHEMA.append(pa.field("url", pa.string()))
    return pa.Table.from_pylist([dict(zip(names, line)) for line in lines], schema=schema)
