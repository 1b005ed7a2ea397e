"""Spherical k-means and nearest centroids by torch: on a GPU where there is one, in blocks everywhere.

Makes the centroids of partitions (balanced, since the largest partition decides memory and time) and of
the inverted lists within one. Training compares in bfloat16, which moves no centroid that matters;
assignment sums in float32, because a row in the wrong list is a row that is not found.
"""

import numpy as np
import numpy.typing as npt
import torch

from retrieval.index.precision import half_products, multiply
from retrieval.index.routing import AnyVectors, Vectors, unit

ITERATIONS = 10
BLOCK_ROWS = 512
"""Rows compared at once: with more, the products leave the caches."""
MAX_SHARE = 2.0
"""A balanced cluster holds at most this many times the mean (of the sample)."""
BALANCE_ROUNDS = 20


def device() -> torch.device:
    """Where matrix products run: the GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def train_centroids(sample: AnyVectors, count: int, seed: int, balanced: bool = False) -> Vectors:
    """Spherical k-means, (count, dim) float32 unit rows. sample: (n >= count, dim) unit rows.

    balanced: clusters over MAX_SHARE are split at the expense of the smallest, until none is left.
    """
    rows = torch.from_numpy(np.array(sample)).to(device(), torch.bfloat16)
    if count == 1:
        return unit(np.asarray(sample, np.float32).mean(axis=0, keepdims=True))
    random = np.random.default_rng(seed)
    centroids = rows[torch.from_numpy(np.sort(random.permutation(len(rows))[:count])).to(rows.device)].float()
    for _ in range(ITERATIONS):
        centroids, _ = _step(rows, centroids, random)
    if balanced:
        centroids = _balanced(rows, centroids, random)
    return unit(centroids.cpu().numpy())


def _balanced(rows: torch.Tensor, centroids: torch.Tensor, random: np.random.Generator) -> torch.Tensor:
    """Centroids whose largest cluster is at most MAX_SHARE times the mean, or the best met on the way."""
    best, least = centroids, float(len(rows))
    for _ in range(BALANCE_ROUNDS):
        moved, sizes = _step(rows, centroids, random)
        if sizes.max() < least:
            best, least = centroids, float(sizes.max())
        heavy = np.flatnonzero(sizes > MAX_SHARE * len(rows) / len(centroids))[: len(centroids) // 2]
        if not len(heavy):
            break
        centroids, _ = _step(rows, _split(moved, sizes, heavy, random), random)
    return best


def assign(vectors: AnyVectors, centroids: Vectors, nearest: int = 1) -> npt.NDArray[np.int64]:
    """Numbers of the `nearest` centroids of each row, nearest first: (n, nearest) int64."""
    out = np.empty((len(vectors), nearest), np.int64)
    targets = torch.from_numpy(np.array(centroids)).to(device()).T
    for start in range(0, len(vectors), BLOCK_ROWS):
        block = torch.from_numpy(np.array(vectors[start : start + BLOCK_ROWS], np.float32))
        with half_products():
            similarities = block.to(targets.device) @ targets
        out[start : start + BLOCK_ROWS] = similarities.topk(nearest, dim=1).indices.cpu().numpy()
    return out


def _step(
    rows: torch.Tensor, centroids: torch.Tensor, random: np.random.Generator
) -> tuple[torch.Tensor, npt.NDArray[np.int64]]:
    """One Lloyd iteration: new centroids (an empty cluster takes a random row), and the old ones' sizes."""
    sums = torch.zeros_like(centroids)
    counts = torch.zeros(len(centroids), dtype=torch.int64, device=rows.device)
    targets = centroids.to(rows.dtype).T
    for block in rows.split(BLOCK_ROWS):
        nearest = multiply(block, targets).max(dim=1).indices  # on CPUs several times quicker than argmax
        sums.index_add_(0, nearest, block.float())
        counts += torch.bincount(nearest, minlength=len(centroids))
    empty = torch.nonzero(counts == 0).flatten()
    if len(empty):
        chosen = torch.from_numpy(random.integers(len(rows), size=len(empty))).to(rows.device)
        sums[empty] = rows[chosen].float()
    return torch.nn.functional.normalize(sums, dim=1), counts.cpu().numpy()


def _split(
    centroids: torch.Tensor,
    sizes: npt.NDArray[np.int64],
    heavy: npt.NDArray[np.int64],
    random: np.random.Generator,
) -> torch.Tensor:
    """Put a slightly moved copy of each heavy centroid in the place of one of the lightest."""
    light = np.argsort(sizes, kind="stable")[: len(heavy)]
    noise = torch.from_numpy(random.standard_normal((len(heavy), centroids.shape[1]), dtype=np.float32))
    noise = torch.nn.functional.normalize(noise, dim=1).to(centroids.device)
    moved = centroids.clone()
    moved[light] = torch.nn.functional.normalize(centroids[heavy] + 0.1 * noise, dim=1)
    return moved
