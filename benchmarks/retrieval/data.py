"""The rows, the queries and their true neighbors, made once from seeds and kept below a scratch folder.

Writes `<scratch>/<number of rows>/{rows,images,texts,images_truth,texts_truth}.npy`, which the workers read
through memory maps. The truth is brute force over the stored float16 rows. What is there is kept: delete
the folder when the generator changes.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

K = 20
TRUTH = 100
"""True neighbors kept for each query."""
ASKED = 2_000
"""Queries with a known truth: the first half tunes, the second half is reported."""
PIECE_ROWS = 1_000_000
"""Rows drawn under one seed; larger sets are pieces of this size one after another."""
QUERY_SEED = 1
BLOCK_ROWS = 1 << 16

Ids = npt.NDArray[np.int64]
Vectors = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Data:
    """One data set on disk."""

    folder: Path

    def read(self, name: str) -> np.ndarray:
        """`rows` float16; `images`, `texts` float32; `images_truth`, `texts_truth` (ASKED, TRUTH) int64."""
        return np.load(self.folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)


def recall(found: np.ndarray, truth: np.ndarray, k: int) -> float:
    """Share of the true k nearest among the first k found, averaged over queries."""
    pairs = zip(found[:, :k], truth[:, :k], strict=True)
    return float(np.mean([np.isin(true, got).mean() for got, true in pairs]))


def prepare(scratch: Path, rows: int) -> Data:
    """Make what is not there yet. The join asks a tenth of the rows, 4,000 to 100,000 queries."""
    data = Data(scratch / str(rows))
    data.folder.mkdir(parents=True, exist_ok=True)
    for name in ("rows", "images", "texts"):
        _keep(data, name, lambda name=name: _draw(name, rows))
    for stream in ("images", "texts"):
        _keep(data, f"{stream}_truth", lambda stream=stream: _nearest(data, stream))
    return data


def _draw(name: str, rows: int) -> np.ndarray:
    from benchmarks.retrieval import vectors

    kind = vectors.mixture(0)
    if name == "texts":
        return vectors.texts(kind, ASKED, QUERY_SEED)
    if name == "images":
        return vectors.images(kind, min(100_000, max(2 * ASKED, rows // 10)), QUERY_SEED)
    out = np.empty((rows, vectors.DIM), np.float16)
    for start in range(0, rows, PIECE_ROWS):
        piece = start // PIECE_ROWS
        seed = piece if piece < QUERY_SEED else piece + 1
        out[start : start + PIECE_ROWS] = vectors.images(kind, min(PIECE_ROWS, rows - start), seed)
    return out


def _nearest(data: Data, stream: str) -> Ids:
    """(ASKED, TRUTH) row numbers, best first."""
    import torch

    queries = torch.from_numpy(np.array(data.read(stream)[:ASKED]))
    rows = data.read("rows")
    best, where = torch.empty(ASKED, 0), torch.empty(ASKED, 0, dtype=torch.int64)
    for start in range(0, len(rows), BLOCK_ROWS):
        block = torch.from_numpy(rows[start : start + BLOCK_ROWS].astype(np.float32))
        found, at = (queries @ block.T).topk(min(TRUTH, len(block)), dim=1)
        best, chosen = torch.cat([best, found], 1).topk(TRUTH, dim=1)
        where = torch.cat([where, at + start], 1).gather(1, chosen)
    return where.numpy()


def _keep(data: Data, name: str, make) -> None:
    path = data.folder / f"{name}.npy"
    if not path.exists():
        pending = path.with_suffix(".partial")
        with pending.open("wb") as file:
            np.save(file, make())
        os.replace(pending, path)
