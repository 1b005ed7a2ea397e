"""Metrics of samples in a feature space: kernel distance, precision and recall, CLIP score."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Features = npt.NDArray[np.float32]
Matrix = npt.NDArray[np.float64]
BLOCK_DISTANCES = 1 << 24


def relative_improvement(ours: float, baseline: float) -> float | None:
    """(ours - baseline) / baseline (paper Fig. 4a); None if the baseline is 0."""
    return ours / baseline - 1 if baseline > 0 else None


@dataclass(frozen=True)
class KernelDistance:
    """Squared maximum mean discrepancy of samples and reference rows, without bias for any number of rows.

    This is the KID of Bińkowski et al. (2018) with its kernel (x y / dim + 1)^3, in any feature space.
    """

    within: Matrix
    """(n, n) kernel of the samples, zero on the diagonal."""
    across: npt.NDArray[np.float64]
    """(n,) mean kernel of each sample with the reference rows."""
    reference: float
    """Mean kernel of two different reference rows."""

    @classmethod
    def of(cls, samples: Features, reference: Features) -> "KernelDistance":
        """samples: (n, dim), reference: (m, dim); n and m at least 2."""
        within, real = (_without_diagonal(polynomial_kernel(rows, rows)) for rows in (samples, reference))
        across = polynomial_kernel(samples, reference).mean(axis=1)
        return cls(within, across, float(real.sum() / (len(real) * (len(real) - 1))))

    def value(self) -> float:
        """The distance. May be slightly below 0 for equal distributions."""
        return float(self.resampled(np.ones((1, len(self.across)), np.int64))[0])

    def resampled(self, weights: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """The distance of resamples (draws,), each with weights (n,) of the samples. The reference is fixed.

        Pairs of a sample with its own copy are left out, so resampling adds no bias. A resample with fewer than 2
        distinct samples has the distance nan.
        """
        counts = weights.astype(np.float64)
        totals = counts.sum(axis=1)
        pairs = totals**2 - (counts**2).sum(axis=1)
        with np.errstate(divide="ignore", invalid="ignore"):
            same = ((counts @ self.within) * counts).sum(axis=1) / pairs
            return np.asarray(same + self.reference - 2 * (counts @ self.across) / totals)


def polynomial_kernel(left: Features, right: Features) -> Matrix:
    """(x y / dim + 1)^3 of all pairs: (n, m). left: (n, dim), right: (m, dim)."""
    return np.asarray((left.astype(np.float64) @ right.astype(np.float64).T / left.shape[1] + 1) ** 3)


def clip_scores(pictures: Features, texts: Features) -> npt.NDArray[np.float64]:
    """Cosine of each picture with its text, -1..1: (n,). Both (n, dim) unit rows in the same order."""
    return np.asarray(np.sum(pictures.astype(np.float64) * texts, axis=1))


@dataclass(frozen=True)
class Manifold:
    """Union of balls: one around each feature row, with the distance to its n-th neighbor as radius.

    Precision is the share of samples in the manifold of real pictures, recall the share of real pictures in that of the
    samples (Kynkäänniemi et al. 2019, eq. 2).
    """

    centers: Features
    squared_radii: npt.NDArray[np.float64]

    def contains(self, points: Features) -> npt.NDArray[np.bool_]:
        """(m,) whether each point (m, dim) lies in at least one ball."""
        blocks = _blocks(points, len(self.centers))
        return np.concatenate([np.any(_squared(rows, self.centers) <= self.squared_radii, 1) for rows in blocks])


def fit_manifold(rows: Features, neighbors: int) -> Manifold:
    """rows: (n, dim); neighbors: which neighbor sets the radius. Raises ValueError unless n > neighbors."""
    if len(rows) <= neighbors:
        raise ValueError(f"{len(rows)} rows have no neighbor number {neighbors}")
    radii = [
        # Position 0 is the row itself.
        np.partition(_squared(block, rows), neighbors, axis=1)[:, neighbors]
        for block in _blocks(rows, len(rows))
    ]
    return Manifold(rows, np.concatenate(radii))


def _blocks(rows: Features, columns: int) -> list[Features]:
    step = max(1, BLOCK_DISTANCES // columns)
    return [rows[start : start + step] for start in range(0, len(rows), step)]


def _squared(left: Features, right: Features) -> Matrix:
    a, b = left.astype(np.float64), right.astype(np.float64)
    return np.maximum((a * a).sum(1)[:, None] + (b * b).sum(1) - 2 * a @ b.T, 0.0)


def _without_diagonal(matrix: Matrix) -> Matrix:
    np.fill_diagonal(matrix, 0.0)
    return matrix
