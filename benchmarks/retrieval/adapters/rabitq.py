"""The graphs of rabitqlib over RaBitQ codes: HNSW, optionally with exact ranking, and SymphonyQG.

They run in .venv-bench. rabitqlib stores ids as uint32 in the order of the rows.
"""

from pathlib import Path
from typing import Any

import numpy as np
import rabitqlib

from benchmarks.retrieval.adapters.adapter import Search, SearchAdapter
from benchmarks.retrieval.data import Ids, Vectors

CLUSTERS = 16
"""Centroids that codes are relative to, the number in the examples of the library."""
RANKED_AT_ONCE = 64
"""Queries whose candidates are in memory as float32: 12 MB of 60 candidates."""


class Hnsw(SearchAdapter):
    """HNSW over codes. Effort: ef, and for exact ranking with the mapped float16 rows candidates per result."""

    def build(self, rows: np.ndarray, folder: Path, threads: int) -> dict[str, Any]:
        vectors = rows.astype(np.float32)
        clusters = rabitqlib.RaBitQKMeans(rows.shape[1], CLUSTERS, num_threads=threads)
        clusters.train(vectors)
        construction, bits = self.settings["construction"], self.settings["bits"]
        index = rabitqlib.HnswIndex(*rows.shape[::-1], self.settings["links"], construction, bits, "ip", 0)
        index.build(vectors, clusters.centroids, clusters.assignments, num_threads=threads)
        index.save(str(folder / "index"))
        return {}

    def open(self, folder: Path, rows: np.ndarray) -> None:
        self._rows, self._index = rows, rabitqlib.HnswIndex.load(str(folder / "index"))

    def searcher(self, k: int, effort: tuple[int, ...]) -> Search:
        """Search of the graph, then exact ranking."""
        count = k * (effort[1] if len(effort) > 1 else 1)

        def search(queries: Vectors) -> Ids:
            ids = self._index.search(queries, count, ef=max(effort[0], count), num_threads=self._threads)[0]
            return ids.astype(np.int64) if count == k else self._ranked(queries, ids.astype(np.int64), k)

        return search

    def _ranked(self, queries: Vectors, ids: Ids, k: int) -> Ids:
        blocks = []
        for start in range(0, len(queries), RANKED_AT_ONCE):
            candidates = ids[start : start + RANKED_AT_ONCE]
            rows = self._rows[candidates].astype(np.float32)
            products = (rows @ queries[start : start + RANKED_AT_ONCE, :, None])[:, :, 0]
            blocks.append(np.take_along_axis(candidates, np.argsort(-products, axis=1)[:, :k], axis=1))
        return np.concatenate(blocks)


class Symphony(SearchAdapter):
    """SymphonyQG: codes of the neighbors lie next to each node. Effort: ef."""

    def build(self, rows: np.ndarray, folder: Path, threads: int) -> dict[str, Any]:
        index = rabitqlib.SymqgIndex(rows.shape[1], self.settings["links"], "ip", self.settings["bits"])
        index.build(rows.astype(np.float32), self.settings["construction"], num_threads=threads)
        index.save(str(folder / "index"))
        return {}

    def open(self, folder: Path, rows: np.ndarray) -> None:
        self._index = rabitqlib.SymqgIndex.load(str(folder / "index"))

    def searcher(self, k: int, effort: tuple[int, ...]) -> Search:
        """The call for batches."""
        ef = max(effort[0], k)
        return lambda queries: self._index.search_batch(queries, k, ef, self._threads)[0].astype(np.int64)

    def single(self, k: int, effort: tuple[int, ...]) -> Search:
        """The call for few queries."""
        ef = max(effort[0], k)
        return lambda query: self._index.search(query, k, ef)[0].astype(np.int64)
