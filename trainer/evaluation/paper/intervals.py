"""95 % bootstrap intervals of anything that is computed from rows; all randomness is the seed's."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[np.int64]


class Estimate(NamedTuple):
    """A figure with the ends of its 95 % confidence interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Bootstrap:
    """How often rows are drawn again, and from which seed."""

    draws: int
    seed: int

    def mean(self, values: npt.ArrayLike) -> Estimate:
        """The mean of values (n,), n at least 1, by percentiles."""
        array = np.asarray(values, np.float64)
        return self.percentiles(lambda rows: float(array[rows].mean()), len(array))

    def median(self, values: npt.ArrayLike) -> Estimate:
        """The median of values (n,), n at least 1, by percentiles."""
        array = np.asarray(values, np.float64)
        return self.percentiles(lambda rows: float(np.median(array[rows])), len(array))

    def percentiles(self, statistic: Callable[[Rows], float], count: int) -> Estimate:
        """A statistic of row numbers, each of which stands for an independent row."""
        low, high = np.quantile(self._drawn(statistic, count), [0.025, 0.975])
        return Estimate(statistic(np.arange(count)), float(low), float(high))

    def mirrored(self, statistic: Callable[[Rows], float], count: int) -> Estimate:
        """The same for a statistic that drawing rows twice moves to one side, such as a Fréchet distance.

        The basic bootstrap: what drawing again adds is taken off, from the figure too. None is below 0.
        """
        value, drawn = statistic(np.arange(count)), self._drawn(statistic, count)
        low, high = np.quantile(drawn, [0.025, 0.975])
        mirrored = [max(0.0, 2 * value - float(one)) for one in (np.mean(drawn), high, low)]
        return Estimate(*mirrored)

    def _drawn(self, statistic: Callable[[Rows], float], count: int) -> list[float]:
        rng = np.random.default_rng([self.seed, count])
        return [statistic(rng.integers(0, count, count)) for _ in range(self.draws)]
