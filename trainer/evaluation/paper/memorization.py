"""Does the model copy? Distances of samples to what they could be copies of, beside those of real images.

Pure: takes CLIP features or perceptual hashes as unit rows, gives distances and a summary. A sample that is
a copy is nearer to its source than real images are to each other.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from retrieval.perceptual_hash import BLANK_HASH, perceptual_hash
from trainer.evaluation.metrics import Features
from trainer.evaluation.paper.intervals import Bootstrap
from trainer.evaluation.paper.paper_tables import share

NEAR = 0.01
"""Share of real images that count as near to another: what samples are held to."""
SAME = 1e-4
"""Two pictures at most so far apart (1 - inner product) are one picture."""
BLOCK_PRODUCTS = 1 << 24

Distances = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Nearest:
    """The nearest candidate of each query: its distance, 1 - inner product, and its row. (n,) both."""

    distances: Distances
    rows: npt.NDArray[np.int64]


@dataclass(frozen=True)
class Comparison:
    """Samples beside real images."""

    name: str
    """Ends in `_clip`, or in `_hash` where distances are of hashes."""
    samples: Distances
    real: Distances

    @property
    def unit(self) -> str:
        """What `scaled` counts."""
        return "bits of 64" if self.name.endswith("_hash") else "1 - cosine"

    def scaled(self, distances: Distances) -> Distances:
        """Hamming distances of hashes; others as they are."""
        return np.rint(32 * distances) if self.name.endswith("_hash") else distances

    def said(self, distance: float) -> str:
        """A distance in words."""
        return f"{32 * distance:.0f} bits" if self.name.endswith("_hash") else f"{distance:.3f}"


def nearest(queries: Features, candidates: Features, among_themselves: bool = False) -> Nearest:
    """The nearest of the candidates (m, dim) to each query (n, dim), all unit rows.

    among_themselves: query i is candidate i, which is not its own neighbor.
    """
    step = max(1, BLOCK_PRODUCTS // len(candidates))
    distances, found = [], []
    for start in range(0, len(queries), step):
        products = queries[start : start + step] @ candidates.T
        if among_themselves:
            np.fill_diagonal(products[:, start:], -np.inf)
        rows = products.argmax(axis=1)
        found.append(rows)
        distances.append(1 - products[np.arange(len(rows)), rows].astype(np.float64))
    return Nearest(np.maximum(np.concatenate(distances), 0), np.concatenate(found).astype(np.int64))


def nearest_own(queries: Features, candidates: Sequence[Features]) -> Nearest:
    """The nearest to each query (n, dim) of its own candidates, n times (k, dim)."""
    found = [nearest(query[None], own) for query, own in zip(queries, candidates, strict=True)]
    return Nearest(
        np.array([one.distances[0] for one in found]), np.array([one.rows[0] for one in found], np.int64)
    )


def hash_row(picture: Image.Image) -> Features:
    """The perceptual hash as a unit row (64,) float32: 32 * (1 - inner product) is the Hamming distance.

    A blank picture gives zeros: distance 32 from every other.
    """
    hash_ = perceptual_hash(picture)
    bits = np.unpackbits(np.array([hash_], ">i8").view(np.uint8))
    return np.where(bits, 0.125, -0.125).astype(np.float32) * np.float32(hash_ != BLANK_HASH)


def summary(comparison: Comparison, bootstrap: Bootstrap) -> dict[str, Any]:
    """Medians with intervals, and the share of samples as near as the nearest 1 % of real images are.

    Real images that stand twice among the real ones say nothing of what is near, and are left out of it.
    """
    samples, real = comparison.scaled(comparison.samples), comparison.scaled(comparison.real)
    distinct = real[comparison.real > SAME]
    near = float(np.quantile(distinct, NEAR)) if len(distinct) else 0.0
    return {
        "name": comparison.name,
        "unit": comparison.unit,
        "samples": len(samples),
        "real": len(real),
        "median_samples": bootstrap.median(samples),
        "median_real": bootstrap.median(real),
        "near": near,
        "share_nearer": share(samples <= near),
        "smallest": float(samples.min()),
    }
