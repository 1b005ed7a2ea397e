"""95 % bootstrap confidence intervals of statistics of rows; the seed determines all resamples."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[np.int64]


class Estimate(NamedTuple):
    """A value and the ends of its 95 % confidence interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Bootstrap:
    """Number of resamples and their seed."""

    draws: int
    seed: int

    def mean(self, values: npt.ArrayLike) -> Estimate:
        """The mean of values (n,), n at least 1, with a percentile interval."""
        array = np.asarray(values, np.float64)
        return self.percentile_interval(lambda rows: float(array[rows].mean()), len(array))

    def median(self, values: npt.ArrayLike) -> Estimate:
        """The median of values (n,), n at least 1, with a percentile interval."""
        array = np.asarray(values, np.float64)
        return self.percentile_interval(lambda rows: float(np.median(array[rows])), len(array))

    def percentile_interval(self, statistic: Callable[[Rows], float], count: int) -> Estimate:
        """A statistic of row numbers 0 .. count - 1, which are resampled as independent rows."""
        low, high = np.quantile(self._resampled(statistic, count), [0.025, 0.975])
        return Estimate(statistic(np.arange(count)), float(low), float(high))

    def basic_interval(self, statistic: Callable[[Rows], float], count: int) -> Estimate:
        """The basic bootstrap, at least 0: removes a bias of resamples, such as that of the Fréchet distance."""
        value, resampled = statistic(np.arange(count)), self._resampled(statistic, count)
        low, high = np.quantile(resampled, [0.025, 0.975])
        corrected = [max(0.0, 2 * value - float(end)) for end in (np.mean(resampled), high, low)]
        return Estimate(*corrected)

    def _resampled(self, statistic: Callable[[Rows], float], count: int) -> list[float]:
        rng = np.random.default_rng([self.seed, count])
        return [statistic(rng.integers(0, count, count)) for _ in range(self.draws)]
