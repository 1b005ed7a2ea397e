"""Estimates with their 95 % intervals as text, for reports, pages and README."""

from collections.abc import Sequence


def estimate_text(estimate: Sequence[float]) -> str:
    """A value with its interval.

    >>> estimate_text((0.5, 0.25, 0.75))
    '0.500 (0.250 to 0.750)'
    """
    value, low, high = estimate
    return f"{value:.3f} ({low:.3f} to {high:.3f})"


def against_zero(estimate: Sequence[float]) -> str:
    """What the interval of a difference says about its sign.

    >>> against_zero((0.01, -0.005, 0.03))
    'not distinguishable from 0'
    """
    _, low, high = estimate
    return "above 0" if low > 0 else "below 0" if high < 0 else "not distinguishable from 0"
