"""Styles without a name, as many as wanted: each number is a palette, a texture and an outline.

The training set and its database have pictures in them. A network that sees only ten styles learns these by heart;
one that sees many has to read the style from the neighbors.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np

from jobs.demo.world.sketch import Field, Sketch, coverage, flat, noise, outline, over

PREFIX = "varied "
NUM_VARIED_STYLES = 96
TEXTURES = ("none", "stripes", "hatching", "grid", "dots", "checks", "waves")
_VARIED_STREAM = 8
_GRAY = np.array([0.3, 0.59, 0.11], np.float32)


def varied_style(number: int) -> str:
    """The style's label in `truth.parquet`. No caption has it."""
    return f"{PREFIX}{number}"


def varied_number(style: str) -> int:
    """The number of a label."""
    return int(style.removeprefix(PREFIX))


def is_varied(style: str) -> bool:
    """True for the label of a style without a name."""
    return style.startswith(PREFIX)


@dataclass(frozen=True)
class _Look:
    """What the pictures of a style share. Lengths are shares of the shorter side."""

    paper: Field
    ink: Field
    color_share: float
    """How much of the flat picture covers the paper; the rest is paper."""
    figure_share: float
    """The same for the figure, so that its color can be read."""
    saturation: float
    texture: str
    period: float
    angle: float
    texture_share: float
    line_width: float
    """Half the width of the outlines; 0: none."""
    grain: float


@cache
def _look(number: int) -> _Look:
    rng = np.random.default_rng([_VARIED_STREAM, number])
    is_dark = bool(rng.random() < 0.4)
    low, high = (0.04, 0.35) if is_dark else (0.75, 1.0)
    paper, tint = rng.uniform(low, high, 3), rng.uniform(0, 1, 3)
    return _Look(
        paper=paper.astype(np.float32),
        ink=(0.75 + 0.25 * tint if is_dark else 0.25 * tint).astype(np.float32),
        color_share=float(rng.uniform(0.05, 1.0)),
        figure_share=float(rng.uniform(0.55, 1.0)),
        saturation=float(rng.uniform(0.5, 1.6)),
        texture=TEXTURES[int(rng.integers(len(TEXTURES)))],
        period=1 / float(rng.uniform(6, 15)),
        angle=float(rng.uniform(0, np.pi)),
        texture_share=float(rng.uniform(0.25, 0.9)),
        line_width=float(rng.choice((0, rng.uniform(0.006, 0.02)))),
        grain=float(rng.uniform(0, 0.08)),
    )


def paint_varied(style: str, sketch: Sketch) -> Field:
    """Paint a sketch in the style of a label, (h, w, 3)."""
    look = _look(varied_number(style))
    plain = flat(sketch)
    gray = (plain @ _GRAY)[..., None]
    plain = np.clip(gray + (plain - gray) * np.float32(look.saturation), 0, 1)
    picture = look.paper + (plain - look.paper) * np.float32(look.color_share)
    over(picture, plain, coverage(sketch.figure.distance, 0.006) * np.float32(look.figure_share))
    if look.texture != "none":
        over(picture, look.ink, coverage(_pattern(look, sketch), 0.1) * np.float32(look.texture_share))
    if look.line_width:
        over(picture, look.ink, coverage(outline(sketch) - np.float32(look.line_width), 0.008))
    picture *= (1 + np.float32(look.grain) * noise(sketch, 70, 0))[:, :, None]
    return picture


def _pattern(look: _Look, sketch: Sketch) -> Field:
    """(h, w), below 0 where the texture has ink. Values are shares of its period."""
    cosine, sine = np.float32(np.cos(look.angle) / look.period), np.float32(np.sin(look.angle) / look.period)
    along, across = sketch.x * cosine + sketch.y * sine, sketch.y * cosine - sketch.x * sine
    if look.texture == "waves":
        across = across + np.float32(0.3) * np.sin(along * np.float32(np.pi))
    u, v = (np.abs(values - np.floor(values) - np.float32(0.5)) for values in (along, across))
    patterns = {
        "stripes": v - np.float32(0.18),
        "waves": v - np.float32(0.18),
        "hatching": np.minimum(np.abs(u - v), np.abs(u + v - np.float32(0.5))) - np.float32(0.1),
        "grid": np.float32(0.42) - np.maximum(u, v),
        "dots": np.hypot(u, v) - np.float32(0.3),
        "checks": (np.float32(0.25) - u) * (v - np.float32(0.25)) * 4,
    }
    return np.asarray(patterns[look.texture] + 0 * (u + v))
