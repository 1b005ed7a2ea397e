"""faiss's HNSW, and autofaiss with its default settings."""

import json
import logging
from pathlib import Path
from typing import Any

import autofaiss
import faiss
import numpy as np

from benchmarks.retrieval.adapters.adapter import Search, SearchAdapter

BLOCK_ROWS = 1 << 16


class FaissHnsw(SearchAdapter):
    """HNSW over float32 vectors. Effort: efSearch."""

    def build(self, rows: np.ndarray, folder: Path, threads: int) -> dict[str, Any]:
        faiss.omp_set_num_threads(threads)
        index = faiss.IndexHNSWFlat(rows.shape[1], self.settings["links"], faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction = self.settings["construction"]
        for start in range(0, len(rows), BLOCK_ROWS):
            index.add(rows[start : start + BLOCK_ROWS].astype(np.float32))
        faiss.write_index(index, str(folder / "index"))
        return {}

    def open(self, folder: Path, rows: np.ndarray) -> None:
        self._index = faiss.read_index(str(folder / "index"))

    def threads(self, number: int) -> None:
        faiss.omp_set_num_threads(number)

    def searcher(self, k: int, effort: tuple[int, ...]) -> Search:
        """`index.search` with the parameters of this effort."""
        options = faiss.SearchParametersHNSW(efSearch=effort[0])
        return lambda queries: self._index.search(queries, k, params=options)[1]


class Autofaiss(FaissHnsw):
    """`autofaiss.build_index(rows, metric_type="ip")`, which chooses index and settings (10 ms per query)."""

    def build(self, rows: np.ndarray, folder: Path, threads: int) -> dict[str, Any]:
        index, infos = autofaiss.build_index(
            rows.astype(np.float32),
            index_path=str(folder / "index"),
            index_infos_path=str(folder / "infos.json"),
            metric_type="ip",
            nb_cores=threads,
        )
        if index is None:
            raise RuntimeError("autofaiss.build_index returned no index; its log says why")
        return {"index_key": infos["index_key"], "index_param": infos["index_param"]}

    def open(self, folder: Path, rows: np.ndarray) -> None:
        """Read and tune again: the tuning depends on measured times, and the machine may have been busy."""
        super().open(folder, rows)
        key = json.loads((folder / "infos.json").read_text())["index_key"]
        autofaiss.tune_index(self._index, key, save_on_disk=False, verbose=logging.ERROR)

    def searcher(self, k: int, effort: tuple[int, ...]) -> Search:
        """Search with the settings that autofaiss chose."""
        return lambda queries: self._index.search(queries, k)[1]
