"""faiss's inverted file indexes with a flat coarse quantizer, and brute force.

All indexes share one spherical k-means, which is stored next to them; its time is added to the build time of
each. Quantized indexes are refined with float16 vectors in memory.
"""

import time
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from faiss.contrib.big_batch_search import big_batch_search

from benchmarks.retrieval.adapters.adapter import Search, SearchAdapter, blocks

POINTS_PER_LIST = 64
ITERATIONS = 10
INNER_PRODUCT = faiss.METRIC_INNER_PRODUCT


class FaissAdapter(SearchAdapter):
    """An index of faiss in a file. The defaults search it without parameters."""

    def open(self, folder: Path, rows: np.ndarray) -> None:
        self._index = faiss.read_index(str(folder / "index"))

    def threads(self, number: int) -> None:
        faiss.omp_set_num_threads(number)

    def searcher(self, k: int, effort: tuple[int, ...]) -> Search:
        """`index.search`; the effort is ignored."""
        return lambda queries: self._index.search(queries, k)[1]


class FaissIvf(FaissAdapter):
    """IVF<lists>,<key>. Effort: lists to search (nprobe), and for refined indexes candidates per result."""

    def build(self, rows: np.ndarray, folder: Path, threads: int) -> dict[str, Any]:
        """Train on a seeded sample, add all rows, write."""
        faiss.omp_set_num_threads(threads)
        lists = min(self.settings["lists"], 2 ** int(np.log2(len(rows) / 32)))
        sample_rows = np.sort(np.random.default_rng(0).permutation(len(rows))[: lists * POINTS_PER_LIST])
        sample = rows[sample_rows].astype(np.float32)
        centroids, kmeans_cpu_s = _centroids(sample, lists, folder.parent / f"centroids-{lists}.npy")
        index = faiss.index_factory(rows.shape[1], f"IVF{lists},{self.settings['key']}", INNER_PRODUCT)
        faiss.downcast_index(index.quantizer).add(centroids)
        index.train(sample)
        refinement = self._refinement(rows)
        for _, block in blocks(rows):
            index.add(block)
            if refinement:
                refinement.add(block)
        faiss.write_index(faiss.IndexRefine(index, refinement) if refinement else index, str(folder / "index"))
        return {"lists": lists, "kmeans_cpu_s": kmeans_cpu_s}

    def searcher(self, k: int, effort: tuple[int, ...]) -> Search:
        """`index.search` with the parameters of this effort."""
        options = faiss.SearchParametersIVF(nprobe=effort[0])
        if len(effort) > 1:
            options = faiss.IndexRefineSearchParameters(k_factor=effort[1], base_index_params=options)
        return lambda queries: self._index.search(queries, k, params=options)[1]

    def _refinement(self, rows: np.ndarray) -> Any:
        if self.settings["key"] in ("Flat", "SQfp16"):
            return None
        index = faiss.IndexScalarQuantizer(rows.shape[1], faiss.ScalarQuantizer.QT_fp16, INNER_PRODUCT)
        index.train(rows[:1000].astype(np.float32))
        return index


class BigBatch(FaissIvf):
    """The join of faiss.contrib over an IVF,Flat index: queries grouped by list, float32 products."""

    def join(self, k: int, effort: tuple[int, ...]) -> Search:
        """Effort: lists to search."""
        self._index.nprobe = effort[0]
        return lambda queries: big_batch_search(self._index, queries, k, method="knn_function", threaded=0)[1]


class BruteForce(FaissAdapter):
    """Exact search over all rows in float32."""

    def build(self, rows: np.ndarray, folder: Path, threads: int) -> dict[str, Any]:
        return {}  # the rows are the index

    def open(self, folder: Path, rows: np.ndarray) -> None:
        self._index = faiss.IndexFlatIP(rows.shape[1])
        for _, block in blocks(rows):
            self._index.add(block)


def _centroids(sample: np.ndarray, lists: int, path: Path) -> tuple[np.ndarray, float]:
    """The centroids of the shared k-means, and its CPU seconds if it ran in an earlier process."""
    if not path.exists():
        started = time.process_time()
        kmeans = faiss.Kmeans(
            sample.shape[1],
            lists,
            niter=ITERATIONS,
            spherical=True,
            seed=1,
            max_points_per_centroid=POINTS_PER_LIST,
            min_points_per_centroid=1,
        )
        kmeans.train(sample)
        np.save(path, kmeans.centroids)
        path.with_suffix(".txt").write_text(str(time.process_time() - started))
        return kmeans.centroids, 0.0
    return np.load(path), float(path.with_suffix(".txt").read_text())
