"""Metrics of samples in CLIP feature space: intervals, Fréchet distance, precision and recall, CLIP score."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Features = npt.NDArray[np.float32]
Z95 = 1.959963984540054
BLOCK_DISTANCES = 1 << 24


class Interval(NamedTuple):
    """A 95 % confidence interval."""

    low: float
    high: float


class PrecisionRecall(NamedTuple):
    """precision: share of samples in the real manifold; recall: share of real pictures in the samples'."""

    precision: float
    recall: float


def wilson_interval(successes: int, trials: int) -> Interval:
    """95 % Wilson score interval of a proportion; (0, 1) without trials."""
    if not trials:
        return Interval(0.0, 1.0)
    share, z2 = successes / trials, Z95**2
    center = share + z2 / (2 * trials)
    half = Z95 * np.sqrt(share * (1 - share) / trials + z2 / (4 * trials**2))
    scale = 1 + z2 / trials
    return Interval(max(0.0, float((center - half) / scale)), min(1.0, float((center + half) / scale)))


def relative_improvement(ours: float, baseline: float) -> float | None:
    """(ours - baseline) / baseline (paper Fig. 4a); None if the baseline is 0."""
    return ours / baseline - 1 if baseline > 0 else None


def bootstrap_improvement(
    ours: npt.NDArray[np.bool_], baseline: npt.NDArray[np.bool_], seed: int, draws: int = 2000
) -> Interval | None:
    """95 % bootstrap interval of the relative improvement of paired results.

    ours, baseline: (n,) in the same order, since both share prompts and seeds. None if the baseline has no
    success in more than 2.5 % of the resamples: then the interval has no upper bound.
    """
    rows = np.random.default_rng([seed, 0]).integers(0, len(ours), (draws, len(ours)))
    accuracies, baselines = ours[rows].mean(axis=1), baseline[rows].mean(axis=1)
    if np.mean(baselines == 0) > 0.025:
        return None
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = np.where(baselines > 0, accuracies / baselines - 1, np.inf)
    low, high = np.quantile(ratios, [0.025, 0.975], method="nearest")
    return Interval(float(low), float(high))


def clip_score(pictures: Features, texts: Features) -> float:
    """Mean cosine of each picture with its text, -1..1. Both (n, dim) unit rows in the same order."""
    return float(np.mean(np.sum(pictures.astype(np.float64) * texts, axis=1)))


@dataclass(frozen=True)
class Gaussian:
    """A Gaussian fitted to rows: mean (dim,), covariance (dim, dim) and its symmetric square root."""

    mean: npt.NDArray[np.float64]
    covariance: npt.NDArray[np.float64]
    root: npt.NDArray[np.float64]

    @classmethod
    def fit(cls, rows: Features) -> "Gaussian":
        """Fit to rows (n, dim), n at least 2."""
        mean, covariance = _moments(rows)
        return cls(mean, covariance, _root(covariance))

    def distance(self, rows: Features) -> float:
        """Squared Fréchet distance to a Gaussian fitted to rows (n, dim), n at least 2."""
        mean, covariance = _moments(rows)
        # tr (C1 C2)^1/2 = tr (C1^1/2 C2 C1^1/2)^1/2; the latter is symmetric, so its root is real and stable
        cross = np.trace(_root(self.root @ covariance @ self.root))
        gap = self.mean - mean
        return max(0.0, float(gap @ gap + np.trace(self.covariance) + np.trace(covariance) - 2 * cross))


def frechet_distance(first: Features, second: Features) -> float:
    """Squared Fréchet distance of two Gaussians fitted to rows: |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^1/2).

    (n, dim), (m, dim), n and m at least 2. Biased upwards for few rows: compare only distances of equal row counts.
    """
    return Gaussian.fit(first).distance(second)


@dataclass(frozen=True)
class Manifold:
    """Union of balls: one around each feature row, with the distance to its n-th neighbor as radius."""

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


def precision_recall(real: Manifold, samples: Manifold) -> PrecisionRecall:
    """Improved precision and recall (Kynkäänniemi et al. 2019, eq. 2)."""
    return PrecisionRecall(
        precision=float(real.contains(samples.centers).mean()), recall=float(samples.contains(real.centers).mean())
    )


def _blocks(rows: Features, columns: int) -> list[Features]:
    step = max(1, BLOCK_DISTANCES // columns)
    return [rows[start : start + step] for start in range(0, len(rows), step)]


def _squared(left: Features, right: Features) -> npt.NDArray[np.float64]:
    a, b = left.astype(np.float64), right.astype(np.float64)
    return np.maximum((a * a).sum(1)[:, None] + (b * b).sum(1) - 2 * a @ b.T, 0.0)


def _moments(rows: Features) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    covariance = np.atleast_2d(np.cov(rows, rowvar=False, dtype=np.float64))
    return np.mean(rows, axis=0, dtype=np.float64), covariance


def _root(matrix: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    values, vectors = np.linalg.eigh(matrix)
    return np.asarray((vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T)
