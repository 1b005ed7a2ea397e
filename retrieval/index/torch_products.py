"""Matrix products in torch, and those of k-means: on a GPU where there is one, else on the CPU.

Training compares in bfloat16, which moves no centroid noticeably; sums are float32. Two trainings on the same device
give the same centroids; those of a GPU differ from those of a CPU by rounding. Processors without instructions for
bfloat16 multiply in float32: a product of 1,024 x 1,024 matrices took 2.3 s on an AMD EPYC (AVX2 only), and 0.017 s in
float32.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import faiss
import numpy as np
import numpy.typing as npt
import torch

from retrieval.index.routing import AnyVectors, Numbers, Vectors

BLOCK_ROWS = 512
"""Rows compared at once: with more, the products do not fit in the caches of a CPU."""
GPU_BLOCK_ROWS = 8192
"""Rows that a GPU compares at once."""


def has_bfloat16(device: torch.device) -> bool:
    """True if the device multiplies bfloat16 matrices faster than float32 ones.

    A CPU needs instructions for bfloat16. oneDNN also accepts CPUs with AVX-512 alone, but multiplies three times
    slower there than in float32.
    """
    return device.type != "cpu" or any("bf16" in name and has for name, has in torch.cpu.get_capabilities().items())


def multiply(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """left @ right of bfloat16 matrices, summed in float32 and rounded to bfloat16 at the end."""
    if has_bfloat16(left.device):
        return left @ right
    return (left.float() @ right.float()).bfloat16()


@contextmanager
def allow_bfloat16() -> Iterator[None]:
    """Lets float32 products multiply in bfloat16 where that is faster; they still sum in float32.

    Similarities of unit rows are then accurate to about 1e-4.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def threads_of_faiss() -> Iterator[None]:
    """Lets torch compute on as many threads of the CPU as faiss. More than a build may use would wait in loops."""
    before = torch.get_num_threads()
    torch.set_num_threads(faiss.omp_get_max_threads())
    try:
        yield
    finally:
        torch.set_num_threads(before)


class TorchSample:
    """A `retrieval.index.kmeans.Sample` in bfloat16 on the device."""

    def __init__(self, rows: AnyVectors) -> None:
        self._tensor = torch.from_numpy(np.array(rows)).to(_device(), torch.bfloat16)

    def take(self, numbers: Numbers) -> Vectors:
        return _array(self._tensor[torch.from_numpy(numbers).to(self._tensor.device)].float())

    @threads_of_faiss()
    def cluster_sums(self, centroids: Vectors) -> tuple[Vectors, Numbers]:
        device = self._tensor.device
        sums = torch.zeros(centroids.shape, device=device)
        sizes = torch.zeros(len(centroids), dtype=torch.int64, device=device)
        targets = torch.from_numpy(centroids).to(device, torch.bfloat16).T
        for block in self._tensor.split(_block_rows(device)):
            nearest = multiply(block, targets).max(dim=1).indices  # several times faster than argmax on CPUs
            add_rows(sums, nearest, block.float())
            sizes.index_add_(0, nearest, torch.ones_like(nearest))  # a GPU is not waited for, as bincount would
        return _array(sums), sizes.cpu().numpy()

    def normalized(self, rows: Vectors) -> Vectors:
        return _array(torch.nn.functional.normalize(torch.from_numpy(rows), dim=1))


def multiplier(centroids: Vectors, directions: Vectors) -> Callable[[Vectors], npt.NDArray[np.uint16]]:
    """A function of rows (n, dim): their products with the centroids (count, dim), bfloat16 as uint16, on the CPU.

    directions: (dim, d) orthonormal; only these parts are multiplied. The next call overwrites the products.
    """
    projection = torch.from_numpy(directions)
    targets = (torch.from_numpy(centroids) @ projection).bfloat16().T
    buffer = torch.empty(0, len(centroids), dtype=torch.bfloat16)  # pages of new memory take half of the time

    @threads_of_faiss()
    def multiply_rows(rows: Vectors) -> npt.NDArray[np.uint16]:
        nonlocal buffer
        if len(buffer) < len(rows):
            buffer = torch.empty(len(rows), len(centroids), dtype=torch.bfloat16)
        products = buffer[: len(rows)]
        for start in range(0, len(rows), BLOCK_ROWS):
            block = torch.from_numpy(rows[start : start + BLOCK_ROWS]) @ projection
            products[start : start + BLOCK_ROWS] = multiply(block.bfloat16(), targets)
        return np.asarray(products.view(torch.int16).numpy()).view(np.uint16)

    return multiply_rows


def add_rows(sums: torch.Tensor, numbers: torch.Tensor, rows: torch.Tensor) -> None:
    """Add each row (n, dim) to sums[number]; the same bits in every run."""
    if sums.device.type == "cpu":
        sums.index_add_(0, numbers, rows)
    else:  # index_add_ of a GPU adds in an order that differs from run to run
        add_rows_as_product(sums, numbers, rows)


def add_rows_as_product(sums: torch.Tensor, numbers: torch.Tensor, rows: torch.Tensor) -> None:
    """As `add_rows`, by one matrix product."""
    sums.addmm_(torch.nn.functional.one_hot(numbers, len(sums)).T.to(rows.dtype), rows)


@threads_of_faiss()
def nearest_with_torch(vectors: AnyVectors, centroids: Vectors, nearest: int) -> tuple[Vectors, Numbers]:
    """`retrieval.index.kmeans.most_similar_centroids` by torch."""
    values, numbers = np.empty((len(vectors), nearest), np.float32), np.empty((len(vectors), nearest), np.int64)
    targets = torch.from_numpy(np.array(centroids)).to(_device()).T
    step = _block_rows(targets.device)
    for start in range(0, len(vectors), step):
        block = torch.from_numpy(np.array(vectors[start : start + step], np.float32))
        with allow_bfloat16():
            best = (block.to(targets.device) @ targets).topk(nearest, dim=1)
        values[start : start + step] = best.values.cpu().numpy()
        numbers[start : start + step] = best.indices.cpu().numpy()
    return values, numbers


def _block_rows(device: torch.device) -> int:
    return BLOCK_ROWS if device.type == "cpu" else GPU_BLOCK_ROWS


def has_gpu() -> bool:
    """Whether products run on a GPU."""
    return torch.cuda.is_available()


def _device() -> torch.device:
    return torch.device("cuda" if has_gpu() else "cpu")


def _array(values: torch.Tensor) -> Vectors:
    return np.asarray(values.cpu().numpy())
