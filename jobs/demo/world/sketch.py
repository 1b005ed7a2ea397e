"""The geometry of a scene as signed distances, with flat colors. Each style paints a picture from it.

Lengths are in units of the picture's shorter side, x to the right and y down from the center, so a scene looks the
same at every size.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from jobs.demo.world.content import Content

Field = npt.NDArray[np.float32]

MAX_ASPECT = 4
# Distances to a figure are exact up to here; glows and shadows reach no further.
REACH = 0.2

_RGB = {
    "red": (216, 42, 44),
    "orange": (244, 128, 28),
    "yellow": (250, 208, 38),
    "green": (54, 164, 72),
    "turquoise": (32, 192, 186),
    "blue": (44, 92, 212),
    "purple": (126, 60, 176),
    "pink": (246, 122, 180),
}
# Colors of the sky at the top and at the bottom, then of the grounds from far to near.
_SCENERY = {
    "hills": ((150, 204, 240), (232, 243, 245), (140, 184, 100), (84, 140, 72)),
    "sea": ((250, 222, 160), (254, 242, 214), (78, 160, 200), (46, 118, 174), (28, 84, 140)),
    "desert": ((238, 160, 140), (253, 218, 178), (228, 164, 86), (194, 118, 58)),
    "city": ((186, 168, 222), (246, 214, 228), (132, 122, 166), (76, 70, 112)),
    "forest": ((30, 42, 92), (84, 102, 152), (40, 92, 86), (20, 54, 52)),
}


@dataclass(frozen=True)
class Layer:
    """One flat area: distance (h, w), negative inside, and its color (3,) in [0, 1]."""

    distance: Field
    color: Field


@dataclass(frozen=True)
class Sketch:
    """A scene before its style is applied.

    x: (1, w), y: (h, 1) coordinates; sky: (h, 1, 3) colors; grounds: far to near, then the figure;
    pixel: the size of one pixel; rng and seed: for the jitter of the style.
    """

    x: Field
    y: Field
    sky: Field
    grounds: tuple[Layer, ...]
    figure: Layer
    pixel: float
    rng: np.random.Generator
    seed: int

    @property
    def layers(self) -> tuple[Layer, ...]:
        return (*self.grounds, self.figure)


def plain_sketch(content: Content, seed: int, width: int, height: int) -> Sketch:
    """The sketch of a content. The seed decides position, size and rotation."""
    rng = np.random.default_rng([seed, 0])
    short = min(width, height)
    x = ((np.arange(width, dtype=np.float32) + 0.5 - width / 2) / short)[None, :]
    y = ((np.arange(height, dtype=np.float32) + 0.5 - height / 2) / short)[:, None]
    top, bottom, *colors = (np.array(rgb, dtype=np.float32) / 255 for rgb in _SCENERY[content.background])
    fade = np.clip((y + 0.5) / 0.7, 0, 1)[:, :, None]
    distances = _GROUNDS[content.background](x, y, rng)
    return Sketch(
        x=x,
        y=y,
        sky=top + (bottom - top) * fade,
        grounds=tuple(Layer(distance, color) for distance, color in zip(distances, colors, strict=True)),
        figure=Layer(_figure(content, x, y, rng), np.array(_RGB[content.color], dtype=np.float32) / 255),
        pixel=1 / short,
        rng=np.random.default_rng([seed, 1]),
        seed=seed,
    )


def coverage(distance: Field, width: float) -> Field:
    """The share of each pixel inside the area, in [0, 1], with an edge of this width."""
    return np.clip(np.float32(0.5) - distance * np.float32(1 / width), 0, 1)


def over(picture: Field, color: Field, alpha: Field) -> None:
    """Blend color (3,) or (h, w, 3) over the picture in place. alpha: (h, w)."""
    covered = alpha > 0
    rows, columns = np.flatnonzero(covered.any(axis=1)), np.flatnonzero(covered.any(axis=0))
    if rows.size == 0:
        return
    box = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    target = picture[box]
    target += ((color[box] if color.ndim == 3 else color) - target) * alpha[box][:, :, None]


def flat(sketch: Sketch) -> Field:
    """The sketch in flat colors, (h, w, 3) in [0, 1]."""
    picture = np.broadcast_to(sketch.sky, (*sketch.figure.distance.shape, 3)).copy()
    for layer in sketch.layers:
        over(picture, layer.color, coverage(layer.distance, 1.5 * sketch.pixel))
    return picture


def outline(sketch: Sketch) -> Field:
    """Distance to the nearest visible boundary, (h, w), 0 on it."""
    edge = np.abs(sketch.grounds[0].distance)
    for layer in (*sketch.grounds[1:], sketch.figure):
        # a nearer layer hides the boundaries of farther ones
        np.copyto(edge, np.float32(1), where=layer.distance < 0)
        np.minimum(edge, np.abs(layer.distance), out=edge)
    return edge


def noise(sketch: Sketch, cells: float, stream: int) -> Field:
    """Smooth noise in [-1, 1], (h, w), with `cells` bumps along the shorter side."""
    side = int(np.ceil(cells * MAX_ASPECT)) + 4
    rng = np.random.default_rng([sketch.seed, 2, stream])
    lattice = rng.uniform(-1, 1, (side, side)).astype(np.float32)
    height, width = sketch.figure.distance.shape
    reach_x, reach_y = width * sketch.pixel * cells / 2, height * sketch.pixel * cells / 2
    box = (side / 2 - reach_x, side / 2 - reach_y, side / 2 + reach_x, side / 2 + reach_y)
    return np.asarray(Image.fromarray(lattice).resize((width, height), Image.Resampling.BICUBIC, box=box))


# --- grounds: each returns the signed distances of its areas, far to near


def _under(curve: Field, slope: Field, y: Field) -> Field:
    """Distance to the area below y = curve(x), both (1, w)."""
    return (curve - y) / np.sqrt(1 + slope * slope)


def _hills(x: Field, y: Field, rng: np.random.Generator) -> list[Field]:
    areas = []
    for level, swing, waves in ((0.14, 0.07, 1.1), (0.30, 0.05, 0.8)):
        phase = 2 * np.pi * (waves * x + np.float32(rng.random()))
        areas.append(_under(level + swing * np.sin(phase), swing * waves * 2 * np.pi * np.cos(phase), y))
    return areas


def _sea(x: Field, y: Field, rng: np.random.Generator) -> list[Field]:
    areas = []
    for level in (0.12, 0.24, 0.36):
        t = (4 * x + np.float32(rng.random())) % 1 * 2 - 1
        areas.append(_under(level - 0.045 * t * t, -0.72 * t, y))
    return areas


def _desert(x: Field, y: Field, rng: np.random.Generator) -> list[Field]:
    areas = []
    for level, waves in ((0.12, 0.9), (0.27, 0.7)):
        t = (waves * x + np.float32(rng.random())) % 1
        rise = np.where(t < 0.7, t / 0.7, (1 - t) / 0.3)
        slope = np.where(t < 0.7, 1 / 0.7, -1 / 0.3) * -0.16 * waves
        areas.append(_under(level + 0.08 - 0.16 * rise, slope, y))
    return areas


def _city(x: Field, y: Field, rng: np.random.Generator) -> list[Field]:
    areas = []
    for level, spread, house in ((0.04, 0.16, 0.17), (0.25, 0.10, 0.13)):
        area = np.full((y.shape[0], x.shape[1]), 1, dtype=np.float32)
        shift = house * rng.random()
        for i in range(-int(MAX_ASPECT / 2 / house) - 1, int(MAX_ASPECT / 2 / house) + 2):
            roof, left = level + spread * rng.random(), i * house + shift
            columns = slice(*np.searchsorted(x[0], (left - REACH, left + house + REACH)))
            aside = np.maximum(left - x[:, columns], x[:, columns] - left - house)
            np.minimum(area[:, columns], np.maximum(aside, roof - y), out=area[:, columns])
        areas.append(area)
    return areas


def _forest(x: Field, y: Field, rng: np.random.Generator) -> list[Field]:
    areas = []
    for level, height, trees in ((0.10, 0.16, 4.5), (0.28, 0.18, 3.5)):
        t = np.abs((trees * x + np.float32(rng.random())) % 1 * 2 - 1)
        areas.append(_under(level + height * (t - 0.5), np.full_like(t, 2 * height * trees), y))
    return areas


_GROUNDS: dict[str, Callable[[Field, Field, np.random.Generator], list[Field]]] = {
    "hills": _hills,
    "sea": _sea,
    "desert": _desert,
    "city": _city,
    "forest": _forest,
}


# --- figures: signed distance of each shape of radius about 1 at (x, y)


@dataclass(frozen=True)
class _Stamp:
    shape: str
    center: tuple[float, float]
    radius: float
    angle: float


def _figure(content: Content, x: Field, y: Field, rng: np.random.Generator) -> Field:
    # as large as two and three figures fit into the picture
    radius = {1: 0.36, 2: 0.215, 3: 0.15}[content.count] * rng.uniform(0.95, 1.05)
    gap = {1: 0.0, 2: 0.48, 3: 0.325}[content.count]
    drift = {1: 0.04, 2: 0.02, 3: 0.01}[content.count]
    field = np.full((y.shape[0], x.shape[1]), 1, dtype=np.float32)
    for i in range(content.count):
        along = (i - (content.count - 1) / 2) * gap
        across = rng.uniform(-0.02, 0.02)
        center = (along, across) if content.layout == "in a row" else (across, along)
        center = (center[0] + rng.uniform(-drift, drift), center[1] + rng.uniform(-drift, drift))
        stamp = _Stamp(content.shape, center, radius, rng.uniform(-0.12, 0.12))
        _put(stamp, field, x, y)
    return field


def _put(stamp: _Stamp, field: Field, x: Field, y: Field) -> None:
    """Add the shape to the field of distances, in place."""
    reach = 1.05 * stamp.radius + REACH
    (left, top), radius = stamp.center, np.float32(stamp.radius)
    columns = slice(*np.searchsorted(x[0], (left - reach, left + reach)))
    rows = slice(*np.searchsorted(y[:, 0], (top - reach, top + reach)))
    u, v = (x[:, columns] - np.float32(left)) / radius, (y[rows] - np.float32(top)) / radius
    cos, sin = np.float32(np.cos(stamp.angle)), np.float32(np.sin(stamp.angle))
    distance = _SHAPES[stamp.shape](cos * u + sin * v, cos * v - sin * u) * radius
    np.minimum(field[rows, columns], distance, out=field[rows, columns])


def _circle(x: Field, y: Field) -> Field:
    return np.hypot(x, y) - np.float32(0.92)


def _square(x: Field, y: Field) -> Field:
    return np.maximum(np.abs(x), np.abs(y)) - np.float32(0.8)


def _triangle(x: Field, y: Field) -> Field:
    """Upright. Folded onto the right half, then the nearer of two edges."""
    x = np.abs(x)
    slanted = np.float32(0.8660254) * x - np.float32(0.5) * y - np.float32(0.56)
    inside = np.maximum(slanted, y - np.float32(0.56))
    top, corner = np.hypot(x, y + np.float32(1.12)), np.hypot(x - np.float32(0.97), y - np.float32(0.56))
    beyond = np.where(y < 0, -np.float32(0.5) * x - np.float32(0.8660254) * (y + np.float32(1.12)) > 0, x > 0.97)
    return np.where((inside > 0) & beyond, np.minimum(top, corner), inside)


def _star(x: Field, y: Field) -> Field:
    """Five points. The plane is folded onto half a point, then the distance to its edge."""
    sector = np.float32(2 * np.pi / 5)
    folded = np.abs((np.arctan2(x, -y) + sector / 2) % sector - sector / 2)
    r = np.hypot(x, y)
    px, py = r * np.sin(folded), r * np.cos(folded) - np.float32(1)
    edge = np.array([0.45 * np.sin(np.pi / 5), 0.45 * np.cos(np.pi / 5) - 1], dtype=np.float32)
    along = np.clip((px * edge[0] + py * edge[1]) / (edge @ edge), 0, 1)
    side = np.sign(py * edge[0] - px * edge[1])
    return np.hypot(px - along * edge[0], py - along * edge[1]) * side


def _heart(x: Field, y: Field) -> Field:
    """Two discs and the wedge below them."""
    x = np.abs(x)
    lobe = np.hypot(x - np.float32(0.45), y + np.float32(0.32)) - np.float32(0.5)
    wedge = (x + y) * np.float32(np.sqrt(0.5)) - np.float32(0.6)
    body = np.maximum(wedge, np.float32(-0.32) - y)
    return np.minimum(lobe, np.maximum(body, x - np.float32(0.95)))


def _ring(x: Field, y: Field) -> Field:
    return np.abs(np.hypot(x, y) - np.float32(0.66)) - np.float32(0.26)


def _moon(x: Field, y: Field) -> Field:
    bite = np.float32(0.74) - np.hypot(x - np.float32(0.44), y + np.float32(0.12))
    return np.maximum(np.hypot(x, y) - np.float32(0.94), bite)


def _flower(x: Field, y: Field) -> Field:
    petals = [
        np.hypot(x - np.float32(0.56 * np.sin(a)), y + np.float32(0.56 * np.cos(a))) - np.float32(0.38)
        for a in np.arange(5) * 2 * np.pi / 5
    ]
    hollow = np.float32(0.2) - np.hypot(x, y)
    return np.maximum(np.minimum.reduce([*petals, np.hypot(x, y) - np.float32(0.4)]), hollow)


_SHAPES: dict[str, Callable[[Field, Field], Field]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "heart": _heart,
    "ring": _ring,
    "moon": _moon,
    "flower": _flower,
}
