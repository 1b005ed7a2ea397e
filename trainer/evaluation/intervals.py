"""95 % confidence intervals of statistics of rows: bootstrap, and Wilson's interval of shares.

Rows with the same cluster, such as samples of one prompt, are not independent: they are resampled together.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Clusters = Sequence[Hashable]
"""The cluster of each row (n,)."""
Z95 = 1.959963984540054
ENDS = (0.025, 0.975)


class Estimate(NamedTuple):
    """A value and the ends of its 95 % confidence interval; the ends are None if they are unknown."""

    value: float
    low: float | None
    high: float | None


class Interval(NamedTuple):
    """A 95 % confidence interval."""

    low: float
    high: float


@dataclass(frozen=True)
class Bootstrap:
    """Number of resamples and their seed."""

    draws: int
    seed: int

    def weights(self, clusters: Clusters) -> Rows:
        """How often each resample contains each row: (draws, n). Clusters are drawn with replacement."""
        numbers = _cluster_numbers(clusters)
        count = int(numbers.max()) + 1
        rng = np.random.default_rng([self.seed, count])
        return np.asarray(rng.multinomial(count, np.full(count, 1 / count), self.draws)[:, numbers])

    def mean(self, values: npt.ArrayLike, clusters: Clusters | None = None) -> Estimate:
        """The mean of values (n,), n at least 1. clusters: by default each row is its own."""
        array = np.asarray(values, np.float64)
        clusters = range(len(array)) if clusters is None else clusters
        weights = self.weights(clusters)
        return interval(float(array.mean()), weights @ array / weights.sum(axis=1), clusters)

    def difference(self, ours: npt.ArrayLike, baseline: npt.ArrayLike, clusters: Clusters) -> Estimate:
        """Difference of two shares of paired flags (n,). The interval has a width even if all clusters are equal."""
        values = np.asarray(ours, np.float64) - np.asarray(baseline, np.float64)
        estimate = self.mean(values, clusters)
        if estimate.low != estimate.high:
            return estimate
        bound = 1 - wilson_interval(1.0, len(set(clusters))).low
        return Estimate(estimate.value, max(-1.0, estimate.value - bound), min(1.0, estimate.value + bound))

    def median(self, values: npt.ArrayLike, clusters: Clusters | None = None) -> Estimate:
        """The median of values (n,), n at least 1. clusters: by default each row is its own."""
        array = np.asarray(values, np.float64)
        clusters = range(len(array)) if clusters is None else clusters
        numbers = _cluster_numbers(clusters)
        count = int(numbers.max()) + 1
        rng = np.random.default_rng([self.seed, count])
        # One resample at a time: the weights of all would need too much memory for many rows.
        draws = (np.bincount(rng.integers(0, count, count), minlength=count) for _ in range(self.draws))
        resampled = [np.median(np.repeat(array, draw[numbers])) for draw in draws]
        return interval(float(np.median(array)), np.array(resampled), clusters)


def interval(value: float, resampled: Floats, clusters: Clusters) -> Estimate:
    """A value with the percentile interval of its resamples (draws,); unknown if all rows are of one cluster.

    All resamples of one cluster are equal: they do not tell how much other clusters differ.
    """
    if len(set(clusters)) < 2:
        return Estimate(value, None, None)
    low, high = np.quantile(resampled, ENDS)
    return Estimate(value, float(low), float(high))


def wilson_interval(share: float, trials: float) -> Interval:
    """95 % Wilson score interval of a proportion; (0, 1) without trials. trials: may be fractional."""
    if not trials:
        return Interval(0.0, 1.0)
    z2 = Z95**2
    center = share + z2 / (2 * trials)
    half = Z95 * np.sqrt(share * (1 - share) / trials + z2 / (4 * trials**2))
    scale = 1 + z2 / trials
    low, high = float((center - half) / scale), float((center + half) / scale)
    # The ends are exact here, where the formula would round.
    return Interval(0.0 if share == 0 else max(0.0, low), 1.0 if share == 1 else min(1.0, high))


def share(flags: npt.ArrayLike, clusters: Clusters | None = None) -> Estimate:
    """The share of true flags (n,), n at least 1, with Wilson's interval for the effective number of rows.

    That number is n divided by the design effect: the variance of the mean of clusters over that of independent rows,
    at least 1. If the flags are all equal or of one cluster, the effect is unknown and the number is that of clusters.
    """
    values = np.asarray(flags, np.float64)
    numbers = _cluster_numbers(range(len(values)) if clusters is None else clusters)
    n, count, mean = len(values), int(numbers.max()) + 1, float(values.mean())
    independent = np.sum((values - mean) ** 2) * n / max(n - 1, 1)
    clustered = np.sum(np.bincount(numbers, values - mean) ** 2) * count / max(count - 1, 1)
    is_known = independent > 0 and count > 1
    return Estimate(mean, *wilson_interval(mean, n / max(1.0, clustered / independent) if is_known else count))


def _cluster_numbers(clusters: Clusters) -> Rows:
    """Clusters as numbers 0, 1, ... in the order of their first row: (n,)."""
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(cluster, len(numbers)) for cluster in clusters], np.int64)
