"""Distances that show whether the model copies images: of samples and, for comparison, of real images.

Pure functions: take CLIP features or perceptual hashes as unit rows, return distances and a summary. A copy
is nearer to its source than real images are to each other.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from retrieval.perceptual_hash import BLANK_HASH, perceptual_hash
from trainer.evaluation.intervals import Bootstrap, share
from trainer.evaluation.metrics import Features

NEAR = 0.01
"""Quantile of the distances of real images below which a sample counts as near."""
SAME = 1e-4
"""Images with a distance (1 - inner product) up to this are the same image."""
BLOCK_PRODUCTS = 1 << 24

Distances = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Nearest:
    """The nearest candidate of each query: distance (1 - inner product) and row number, both (n,)."""

    distances: Distances
    rows: npt.NDArray[np.int64]


@dataclass(frozen=True)
class Comparison:
    """Distances of samples and of real images to their nearest real image."""

    name: str
    """Ends with `_clip` or, for distances of perceptual hashes, `_hash`."""
    samples: Distances
    real: Distances
    prompts: tuple[str, ...]
    """The prompt of each sample; intervals resample them."""

    @property
    def unit(self) -> str:
        """Unit of `scaled` distances."""
        return "bits of 64" if self.name.endswith("_hash") else "1 - cosine"

    def scaled(self, distances: Distances) -> Distances:
        """Hamming distances for hashes; CLIP distances are unchanged."""
        return np.rint(32 * distances) if self.name.endswith("_hash") else distances

    def label(self, distance: float) -> str:
        """A distance as text."""
        return f"{32 * distance:.0f} bits" if self.name.endswith("_hash") else f"{distance:.3f}"


def nearest(queries: Features, candidates: Features, same_rows: bool = False) -> Nearest:
    """The nearest candidate (m, dim) of each query (n, dim), unit rows. same_rows: the nearest other row instead."""
    step = max(1, BLOCK_PRODUCTS // len(candidates))
    distances, rows = [], []
    for start in range(0, len(queries), step):
        products = queries[start : start + step] @ candidates.T
        if same_rows:
            np.fill_diagonal(products[:, start:], -np.inf)
        best = products.argmax(axis=1)
        rows.append(best)
        distances.append(1 - products[np.arange(len(best)), best].astype(np.float64))
    return Nearest(np.maximum(np.concatenate(distances), 0), np.concatenate(rows).astype(np.int64))


def nearest_per_query(queries: Features, candidates: Iterable[Features]) -> Nearest:
    """The same where query i (dim,) has its own candidates i (k, dim)."""
    results = [nearest(query[None], rows) for query, rows in zip(queries, candidates, strict=True)]
    distances, rows = [result.distances[0] for result in results], [result.rows[0] for result in results]
    return Nearest(np.array(distances), np.array(rows, np.int64))


def hash_row(picture: Image.Image) -> Features:
    """The perceptual hash as a unit row (64,) float32: 32 * (1 - inner product) is the Hamming distance."""
    hash_ = perceptual_hash(picture)
    bits = np.unpackbits(np.array([hash_], ">i8").view(np.uint8))
    # A blank picture gives zeros: distance 32 from every other.
    return np.where(bits, 0.125, -0.125).astype(np.float32) * np.float32(hash_ != BLANK_HASH)


def summary(comparison: Comparison, bootstrap: Bootstrap) -> dict[str, Any]:
    """Medians with intervals, and the share of samples nearer than 99 % of the real images without a duplicate."""
    samples, real = comparison.scaled(comparison.samples), comparison.scaled(comparison.real)
    distinct = real[comparison.real > SAME]
    near = float(np.quantile(distinct, NEAR)) if len(distinct) else 0.0
    return {
        "name": comparison.name,
        "unit": comparison.unit,
        "samples": len(samples),
        "real": len(real),
        "median_samples": bootstrap.median(samples, comparison.prompts),
        "median_real": bootstrap.median(real),
        "near": near,
        "share_nearer": share(samples <= near, comparison.prompts),
        "smallest": float(samples.min()),
    }
