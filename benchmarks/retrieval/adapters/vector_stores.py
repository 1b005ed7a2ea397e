"""zvec: a store of vectors and columns on disk. It runs in .venv-bench."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import zvec

from benchmarks.retrieval.adapters.adapter import Search, SearchAdapter, blocks

BLOCK_ROWS = 1_000
"""Rows of one insertion; zvec takes at most 1,024."""


class Zvec(SearchAdapter):
    """HNSW over RaBitQ codes, refined with float32 vectors. Effort: ef. A call has one query."""

    def build(self, rows: np.ndarray, folder: Path, threads: int) -> dict[str, Any]:
        zvec.init(log_level=zvec.LogLevel.ERROR, optimize_threads=threads)
        index = zvec.HnswRabitqIndexParam(
            zvec.MetricType.IP,
            total_bits=self.settings["bits"],
            m=self.settings["links"],
            ef_construction=self.settings["construction"],
        )
        vectors = zvec.VectorSchema("vector", zvec.DataType.VECTOR_FP32, rows.shape[1], index)
        schema = zvec.CollectionSchema("rows", vectors=vectors)
        collection = zvec.create_and_open(str(folder / "index"), schema)
        for start, block in blocks(rows, BLOCK_ROWS):
            collection.insert([zvec.Doc(str(start + i), vectors={"vector": row}) for i, row in enumerate(block)])
        collection.optimize(zvec.OptimizeOption(threads))
        collection.flush()
        collection.close()
        return {}

    def open(self, folder: Path, rows: np.ndarray) -> None:
        zvec.init(log_level=zvec.LogLevel.ERROR, query_threads=1)
        self._index = zvec.open(str(folder / "index"), zvec.CollectionOption(read_only=True))

    def searcher(self, k: int, effort: tuple[int, ...]) -> Search:
        """One call a query, in several threads."""
        one = self.single(k, effort)

        def search(queries: np.ndarray) -> np.ndarray:
            with ThreadPoolExecutor(self._threads) as pool:
                return np.concatenate(list(pool.map(one, queries[:, None])))

        return search

    def single(self, k: int, effort: tuple[int, ...]) -> Search:
        """The call that returns internal ids, which are the row numbers."""
        options = zvec.HnswRabitqQueryParam(ef=max(effort[0], k), is_using_refiner=True)

        def search(query: np.ndarray) -> np.ndarray:
            wanted = zvec.Query("vector", vector=query[0], param=options)
            return self._index.query_internal_ids(wanted, topk=k)[None]

        return search
