"""faiss's HNSW over vectors, over RaBitQ codes and with Panorama, and autofaiss with its default settings.

RaBitQ codes and Panorama need the metric L2, which ranks unit vectors as the inner product does.
"""

import json
import logging
from pathlib import Path
from typing import Any

import autofaiss
import faiss
import numpy as np

from benchmarks.retrieval.adapters.adapter import Search, blocks
from benchmarks.retrieval.adapters.faiss_ivf import FaissAdapter

TRAINING_ROWS = 1 << 16


class FaissHnsw(FaissAdapter):
    """HNSW over float32 vectors. Effort: efSearch."""

    def build(self, rows: np.ndarray, folder: Path, threads: int) -> dict[str, Any]:
        faiss.omp_set_num_threads(threads)
        index = self._empty(rows.shape[1])
        index.train(rows[:TRAINING_ROWS].astype(np.float32))
        for _, block in blocks(rows):
            index.add(block)
        faiss.write_index(index, str(folder / "index"))
        return {}

    def _empty(self, dim: int) -> Any:
        return self._with_construction(faiss.IndexHNSWFlat(dim, self.settings["links"], faiss.METRIC_INNER_PRODUCT))

    def _with_construction(self, index: Any) -> Any:
        index.hnsw.efConstruction = self.settings["construction"]
        return index

    def searcher(self, k: int, effort: tuple[int, ...]) -> Search:
        """`index.search` with the parameters of this effort."""
        options = faiss.SearchParametersHNSW(efSearch=effort[0])
        return lambda queries: self._index.search(queries, k, params=options)[1]


class FaissHnswRaBitQ(FaissHnsw):
    """HNSW over RaBitQ codes, refined with float16 vectors in memory. Effort: efSearch, candidates per result."""

    def _empty(self, dim: int) -> Any:
        coded = self._with_construction(faiss.IndexHNSWRaBitQ(dim, self.settings["links"], self.settings["bits"]))
        parts = coded, faiss.IndexScalarQuantizer(dim, faiss.ScalarQuantizer.QT_fp16)
        index = faiss.IndexRefine(*parts)
        index.referenced_objects = parts  # faiss does not own them
        return index

    def searcher(self, k: int, effort: tuple[int, ...]) -> Search:
        """`index.search` with the parameters of this effort."""
        graph = faiss.SearchParametersHNSW(efSearch=max(effort[0], k * effort[1]))
        options = faiss.IndexRefineSearchParameters(k_factor=effort[1], base_index_params=graph)
        return lambda queries: self._index.search(queries, k, params=options)[1]


class FaissPanorama(FaissHnsw):
    """HNSW over float32 vectors. Distances are refined level by level. Effort: efSearch."""

    def _empty(self, dim: int) -> Any:
        return self._with_construction(
            faiss.IndexHNSWFlatPanorama(dim, self.settings["links"], self.settings["levels"])
        )


class Autofaiss(FaissAdapter):
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
