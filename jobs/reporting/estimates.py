"""Estimates with their 95 % intervals as text, for reports, pages and README."""

from collections.abc import Sequence

StoredEstimate = Sequence[float | None]
"""A value and the ends of its interval, as JSON stores `Estimate`; the ends are None if they are unknown."""


def estimate_text(estimate: StoredEstimate) -> str:
    """A value with its interval.

    >>> estimate_text((0.5, 0.25, 0.75))
    '0.500 (0.250 to 0.750)'
    """
    return f"{estimate[0]:.3f} ({interval_text(estimate)})"


def interval_text(estimate: StoredEstimate) -> str:
    """The interval of an estimate alone.

    >>> interval_text((0.5, None, None))
    'interval unknown'
    """
    _, low, high = estimate
    return "interval unknown" if low is None or high is None else f"{low:.3f} to {high:.3f}"


def against_zero(estimate: StoredEstimate) -> str:
    """What the interval of a difference says about its sign.

    >>> against_zero((0.01, -0.005, 0.03))
    'not distinguishable from 0'
    """
    _, low, high = estimate
    if low is not None and low > 0:
        return "above 0"
    return "below 0" if high is not None and high < 0 else "not distinguishable from 0"
