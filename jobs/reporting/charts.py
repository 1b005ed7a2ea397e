"""Geometry of a report's charts, for HTML and SVG: positions in percent, because charts scale with the page."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)


@dataclass(frozen=True)
class Tick:
    """A label on an axis and its distance from the start in percent."""

    percent: float
    label: str


@dataclass(frozen=True)
class Curve:
    """A line chart. raw and smooth: points of an SVG polyline in a box of 100 x 100, y downwards."""

    raw: str
    smooth: str
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]


@dataclass(frozen=True)
class Bar:
    """A bar: its label, its length in percent of the axis, and its value as text."""

    label: str
    percent: float
    text: str


def curve(x: Sequence[float], y: Sequence[float]) -> Curve:
    """A line through (x, y) and its moving average; both axes start at 0. At least one x must be above 0."""
    values = np.asarray(y, np.float64)
    x_end = float(max(x))
    # The first losses are far above all others: the axis leaves out the highest 2 %.
    y_end = ticks(float(np.quantile(values, 0.98)))[-1]
    positions = np.asarray(x, np.float64) / x_end * 100
    return Curve(
        raw=_polyline(positions, values / y_end * 100),
        smooth=_polyline(positions, _smooth(values) / y_end * 100),
        x_ticks=_ticks_until(x_end),
        y_ticks=_ticks_until(y_end),
    )


def time_bars(seconds: Mapping[str, float]) -> list[Bar]:
    """One bar for each stage, in order, on a common axis. seconds: by stage."""
    longest = max(seconds.values(), default=0) or 1
    return [Bar(stage, 100 * value / longest, duration(value)) for stage, value in seconds.items()]


def duration(seconds: float) -> str:
    """A duration as text, such as `0.4 s`, `51 s` or `8 min 20 s`.

    >>> duration(500.2)
    '8 min 20 s'
    """
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def ticks(end: float) -> list[float]:
    """Three to six evenly spaced round numbers from 0 to `end` or more.

    >>> ticks(0.9)
    [0.0, 0.25, 0.5, 0.75, 1.0]
    """
    step = end / 4
    power = 10.0 ** np.floor(np.log10(step))
    step = float(power * next(nice for nice in STEPS if nice * power >= step * 0.999))
    return [round(step * i, 10) for i in range(int(np.ceil(round(end / step, 6))) + 1)]


def _ticks_until(end: float) -> tuple[Tick, ...]:
    return tuple(Tick(100 * value / end, f"{value:,g}") for value in ticks(end) if value <= end)


def _smooth(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Centered moving average over a twentieth of the values; the window is shorter at the ends."""
    half = max(1, len(values) // 40)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    low = np.maximum(np.arange(len(values)) - half, 0)
    high = np.minimum(np.arange(len(values)) + half + 1, len(values))
    return np.asarray((sums[high] - sums[low]) / (high - low))


def _polyline(x: npt.NDArray[np.float64], y: npt.NDArray[np.float64]) -> str:
    return " ".join(f"{a:.2f},{100 - b:.2f}" for a, b in zip(x, np.clip(y, -5, 105), strict=True))
