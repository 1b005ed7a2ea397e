"""The rows, queries and true neighbors, generated once from seeds and stored below a scratch folder.

Writes `<scratch>/<number of rows>[-<seed>]/{rows,images,texts,calibration_texts,images_truth,texts_truth}.npy`, which
the adapters read as memory maps. The true neighbors come from brute force over the stored float16 rows. Existing
files are not written again: delete the folder after a change of the generator.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

K = 20
NUM_TRUE_NEIGHBORS = 100
"""True neighbors stored for each query."""
NUM_QUERIES = 2_000
"""Queries with known neighbors: the first half is for tuning, the second half for the report."""
ROWS_PER_SEED = 1_000_000
"""Rows generated from one seed; larger sets use several seeds."""
QUERY_SEED = 1
CALIBRATION_SEED = 2
NUM_CALIBRATION_TEXTS = 1_000
SEED_STEP = 1_000
"""Seeds of two data sets are so far apart."""
BLOCK_ROWS = 1 << 16

Ids = npt.NDArray[np.int64]
Vectors = npt.NDArray[np.float32]


@dataclass(frozen=True)
class BenchmarkData:
    """One data set on disk."""

    folder: Path

    def read(self, name: str) -> np.ndarray:
        """`rows` float16; `images`, `texts` float32; and their `_truth`, int64."""
        return np.load(self.folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)


def recall(results: np.ndarray, truth: np.ndarray, k: int) -> float:
    """Share of the true k nearest rows among the first k results, averaged over queries."""
    pairs = zip(results[:, :k], truth[:, :k], strict=True)
    return float(np.mean([np.isin(true, ids).mean() for ids, true in pairs]))


def prepare(scratch: Path, rows: int, seed: int = 0) -> BenchmarkData:
    """Write missing files. The join has a tenth as many queries as rows, 4,000 to 100,000."""
    data = BenchmarkData(scratch / (f"{rows}-{seed}" if seed else str(rows)))
    data.folder.mkdir(parents=True, exist_ok=True)
    for name in ("rows", "images", "texts", "calibration_texts"):
        _write_if_missing(data, name, lambda name=name: _generate(name, rows, seed))
    for stream in ("images", "texts"):
        _write_if_missing(data, f"{stream}_truth", lambda stream=stream: _true_neighbors(data, stream))
    return data


def _generate(name: str, rows: int, seed: int) -> np.ndarray:
    from benchmarks.retrieval import vectors

    mixture, first = vectors.mixture(seed), SEED_STEP * seed
    if name == "texts":
        return vectors.texts(mixture, NUM_QUERIES, first + QUERY_SEED)
    if name == "calibration_texts":
        return vectors.texts(mixture, NUM_CALIBRATION_TEXTS, first + CALIBRATION_SEED)
    if name == "images":
        return vectors.images(mixture, min(100_000, max(2 * NUM_QUERIES, rows // 10)), first + QUERY_SEED)
    out = np.empty((rows, vectors.DIM), np.float16)
    for start in range(0, rows, ROWS_PER_SEED):
        piece = start // ROWS_PER_SEED
        number = piece if piece < QUERY_SEED else piece + 1
        out[start : start + ROWS_PER_SEED] = vectors.images(mixture, min(ROWS_PER_SEED, rows - start), first + number)
    return out


def _true_neighbors(data: BenchmarkData, stream: str) -> Ids:
    """(NUM_QUERIES, NUM_TRUE_NEIGHBORS) row numbers, best first."""
    import torch

    queries = torch.from_numpy(np.array(data.read(stream)[:NUM_QUERIES]))
    rows = data.read("rows")
    similarities, ids = torch.empty(NUM_QUERIES, 0), torch.empty(NUM_QUERIES, 0, dtype=torch.int64)
    for start in range(0, len(rows), BLOCK_ROWS):
        block = torch.from_numpy(rows[start : start + BLOCK_ROWS].astype(np.float32))
        block_similarities, block_ids = (queries @ block.T).topk(min(NUM_TRUE_NEIGHBORS, len(block)), dim=1)
        similarities, best = torch.cat([similarities, block_similarities], 1).topk(NUM_TRUE_NEIGHBORS, dim=1)
        ids = torch.cat([ids, block_ids + start], 1).gather(1, best)
    return ids.numpy()


def _write_if_missing(data: BenchmarkData, name: str, generate: Callable[[], np.ndarray]) -> None:
    path = data.folder / f"{name}.npy"
    if not path.exists():
        partial = path.with_suffix(".partial")
        with partial.open("wb") as file:
            np.save(file, generate())
        os.replace(partial, path)
