"""faiss's inverted lists with a flat coarse quantizer, as one would make them by hand, and brute force.

All share one spherical k-means (kept beside the indexes; its time is counted in each one's build), and
quantized ones are refined on float16 vectors held in memory.
"""

import time
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from faiss.contrib.big_batch_search import big_batch_search

from benchmarks.retrieval.adapters.adapter import Method, Search

POINTS_PER_LIST = 64
ITERATIONS = 10
BLOCK_ROWS = 1 << 16
IP = faiss.METRIC_INNER_PRODUCT


class Inverted(Method):
    """IVF<lists>,<key>. Effort: lists probed, then candidates per result where there is a refinement."""

    def build(self, rows: np.ndarray, folder: Path, threads: int) -> dict[str, Any]:
        """Train on a seeded sample, add all, write."""
        faiss.omp_set_num_threads(threads)
        lists = min(self.settings["lists"], 2 ** int(np.log2(len(rows) / 32)))
        chosen = np.sort(np.random.default_rng(0).permutation(len(rows))[: lists * POINTS_PER_LIST])
        sample = rows[chosen].astype(np.float32)
        centroids, kmeans_cpu_s = _centroids(sample, lists, folder.parent / f"centroids-{lists}.npy")
        index = faiss.index_factory(rows.shape[1], f"IVF{lists},{self.settings['key']}", IP)
        faiss.downcast_index(index.quantizer).add(centroids)
        index.train(sample)
        refined = self._refined(rows)
        for start in range(0, len(rows), BLOCK_ROWS):
            block = rows[start : start + BLOCK_ROWS].astype(np.float32)
            index.add(block)
            if refined:
                refined.add(block)
        faiss.write_index(faiss.IndexRefine(index, refined) if refined else index, str(folder / "index"))
        return {"lists": lists, "kmeans_cpu_s": kmeans_cpu_s}

    def open(self, folder: Path, rows: np.ndarray) -> None:
        """Read into memory."""
        self._index = faiss.read_index(str(folder / "index"))

    def threads(self, number: int) -> None:
        """OpenMP threads."""
        faiss.omp_set_num_threads(number)

    def searcher(self, k: int, effort: tuple[int, ...]) -> Search:
        """index.search with parameters of this call."""
        options = faiss.SearchParametersIVF(nprobe=effort[0])
        if len(effort) > 1:
            options = faiss.IndexRefineSearchParameters(k_factor=effort[1], base_index_params=options)
        return lambda queries: self._index.search(queries, k, params=options)[1]

    def _refined(self, rows: np.ndarray) -> Any:
        if self.settings["key"] in ("Flat", "SQfp16"):
            return None
        index = faiss.IndexScalarQuantizer(rows.shape[1], faiss.ScalarQuantizer.QT_fp16, IP)
        index.train(rows[:1000].astype(np.float32))
        return index


class BigBatch(Inverted):
    """faiss.contrib's join over an IVF,Flat index: queries grouped by list, float32 products."""

    def join(self, k: int, effort: tuple[int, ...]) -> Search:
        """Effort: lists probed."""
        self._index.nprobe = effort[0]
        return lambda queries: big_batch_search(self._index, queries, k, method="knn_function", threaded=0)[1]


class BruteForce(Method):
    """Every row, float32."""

    def build(self, rows: np.ndarray, folder: Path, threads: int) -> dict[str, Any]:
        """Nothing: the rows are the index."""
        return {}

    def open(self, folder: Path, rows: np.ndarray) -> None:
        """Read the rows into memory."""
        self._index = faiss.IndexFlatIP(rows.shape[1])
        for start in range(0, len(rows), BLOCK_ROWS):
            self._index.add(rows[start : start + BLOCK_ROWS].astype(np.float32))

    def threads(self, number: int) -> None:
        """OpenMP threads."""
        faiss.omp_set_num_threads(number)

    def searcher(self, k: int, effort: tuple[int, ...]) -> Search:
        """No effort: exact."""
        return lambda queries: self._index.search(queries, k)[1]


def _centroids(sample: np.ndarray, lists: int, kept: Path) -> tuple[np.ndarray, float]:
    """The shared k-means and the CPU seconds it took when it ran."""
    if not kept.exists():
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
        np.save(kept, kmeans.centroids)
        kept.with_suffix(".txt").write_text(str(time.process_time() - started))
        return kmeans.centroids, 0.0
    return np.load(kept), float(kept.with_suffix(".txt").read_text())
