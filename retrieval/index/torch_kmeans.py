"""The matrix products of k-means in torch: on a GPU where there is one, else on the CPU.

Training compares in bfloat16, which moves no centroid noticeably; sums are float32.
"""

import numpy as np
import torch

from retrieval.index.precision import allow_bfloat16, multiply
from retrieval.index.routing import AnyVectors, Numbers, Vectors

BLOCK_ROWS = 512
"""Rows compared at once: with more, the products do not fit in the caches."""


class TorchSample:
    """A `retrieval.index.kmeans.Sample` in bfloat16 on the device."""

    def __init__(self, rows: AnyVectors) -> None:
        self._tensor = torch.from_numpy(np.array(rows)).to(_device(), torch.bfloat16)

    def take(self, numbers: Numbers) -> Vectors:
        return _array(self._tensor[torch.from_numpy(numbers).to(self._tensor.device)].float())

    def cluster_sums(self, centroids: Vectors) -> tuple[Vectors, Numbers]:
        device = self._tensor.device
        sums = torch.zeros(centroids.shape, device=device)
        sizes = torch.zeros(len(centroids), dtype=torch.int64, device=device)
        targets = torch.from_numpy(centroids).to(device, torch.bfloat16).T
        for block in self._tensor.split(BLOCK_ROWS):
            nearest = multiply(block, targets).max(dim=1).indices  # several times faster than argmax on CPUs
            sums.index_add_(0, nearest, block.float())
            sizes += torch.bincount(nearest, minlength=len(centroids))
        return _array(sums), sizes.cpu().numpy()

    def normalized(self, rows: Vectors) -> Vectors:
        return _array(torch.nn.functional.normalize(torch.from_numpy(rows), dim=1))


def nearest_with_torch(vectors: AnyVectors, centroids: Vectors, nearest: int) -> Numbers:
    """`retrieval.index.kmeans.nearest_centroids` by torch."""
    numbers = np.empty((len(vectors), nearest), np.int64)
    targets = torch.from_numpy(np.array(centroids)).to(_device()).T
    for start in range(0, len(vectors), BLOCK_ROWS):
        block = torch.from_numpy(np.array(vectors[start : start + BLOCK_ROWS], np.float32))
        with allow_bfloat16():
            similarities = block.to(targets.device) @ targets
        numbers[start : start + BLOCK_ROWS] = similarities.topk(nearest, dim=1).indices.cpu().numpy()
    return numbers


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _array(values: torch.Tensor) -> Vectors:
    return np.asarray(values.cpu().numpy())
