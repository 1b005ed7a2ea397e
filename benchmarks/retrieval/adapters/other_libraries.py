"""ScaNN, hnswlib and usearch; they run in .venv-bench."""

from pathlib import Path
from typing import Any

import hnswlib
import numpy as np
import scann
from usearch.index import Index

from benchmarks.retrieval.adapters.adapter import Search, SearchAdapter, blocks


class Scann(SearchAdapter):
    """Tree with SOAR, asymmetric hashing, float32 reordering. Effort: leaves, rows to reorder per ten results."""

    def build(self, rows: np.ndarray, folder: Path, threads: int) -> dict[str, Any]:
        """Build and serialize; the files include the float32 vectors."""
        leaves = min(self.settings["leaves"], 2 * int(len(rows) ** 0.5))
        builder = scann.scann_ops_pybind.builder(rows.astype(np.float32), 20, "dot_product")
        builder = builder.set_n_training_threads(threads).tree(
            leaves, 20, training_sample_size=250_000, spherical=True, soar_lambda=1.5, overretrieve_factor=2.0
        )
        builder.score_ah(2, anisotropic_quantization_threshold=0.2).reorder(100).build().serialize(str(folder))
        return {"leaves": leaves}

    def open(self, folder: Path, rows: np.ndarray) -> None:
        self._searcher = scann.scann_ops_pybind.load_searcher(str(folder))

    def threads(self, number: int) -> None:
        """Select the sequential call for one thread, the parallel call for more."""
        self._parallel = number > 1
        self._searcher.set_num_threads(number)

    def searcher(self, k: int, effort: tuple[int, ...]) -> Search:
        options = {"leaves_to_search": effort[0], "pre_reorder_num_neighbors": effort[1] * k // 10}
        call = self._searcher.search_batched_parallel if self._parallel else self._searcher.search_batched
        return lambda queries: call(queries, final_num_neighbors=k, **options)[0]

    def single(self, k: int, effort: tuple[int, ...]) -> Search:
        """The call for one query."""
        call, (leaves, reorder) = self._searcher.search, effort
        return lambda query: call(query[0], k, reorder * k // 10, leaves)[0][None]


class Hnswlib(SearchAdapter):
    """A graph over float32 vectors. Effort: ef."""

    def build(self, rows: np.ndarray, folder: Path, threads: int) -> dict[str, Any]:
        index = hnswlib.Index("ip", rows.shape[1])
        construction, links = self.settings["construction"], self.settings["links"]
        index.init_index(len(rows), ef_construction=construction, M=links, random_seed=0)
        for start, block in blocks(rows):
            index.add_items(block, np.arange(start, start + len(block)), num_threads=threads)
        index.save_index(str(folder / "index"))
        return {}

    def open(self, folder: Path, rows: np.ndarray) -> None:
        self._index = hnswlib.Index("ip", rows.shape[1])
        self._index.load_index(str(folder / "index"))

    def threads(self, number: int) -> None:
        self._index.set_num_threads(number)

    def searcher(self, k: int, effort: tuple[int, ...]) -> Search:
        """Batched search; ef is a property of the index."""
        self._index.set_ef(max(effort[0], k))
        return lambda queries: self._index.knn_query(queries, k=k)[0].astype(np.int64)


class Usearch(SearchAdapter):
    """A graph over bfloat16 vectors. Effort: expansion."""

    def build(self, rows: np.ndarray, folder: Path, threads: int) -> dict[str, Any]:
        index = self._empty(rows.shape[1])
        for start, block in blocks(rows):
            index.add(np.arange(start, start + len(block)), block, threads=threads)
        index.save(str(folder / "index"))
        return {}

    def open(self, folder: Path, rows: np.ndarray) -> None:
        self._index = self._empty(rows.shape[1])
        self._index.load(str(folder / "index"))

    def searcher(self, k: int, effort: tuple[int, ...]) -> Search:
        """Batched search; the expansion is a property of the index."""
        self._index.expansion_search = effort[0]
        return lambda queries: self._index.search(queries, k, threads=self._threads).keys.astype(np.int64)

    def single(self, k: int, effort: tuple[int, ...]) -> Search:
        """The call for one vector."""
        self._index.expansion_search = effort[0]
        return lambda query: self._index.search(query[0], k, threads=1).keys.astype(np.int64)[None]

    def _empty(self, dim: int) -> Index:
        return Index(
            ndim=dim,
            metric="ip",
            dtype="bf16",
            connectivity=self.settings["links"],
            expansion_add=self.settings["construction"],
        )
