"""The styles: each paints a sketch with its own palette and texture, and keeps the color of the figure.

Texture periods are at least 1/16 of the shorter side, 4 px at 64 px, so that styles differ in small pictures too.
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from jobs.demo.world.sketch import Field, Sketch, coverage, flat, noise, outline, over

_GRAY = np.array([0.3, 0.59, 0.11], dtype=np.float32)


def _rgb(red: int, green: int, blue: int) -> Field:
    return np.array([red, green, blue], dtype=np.float32) / 255


def _saturate(color: Field, amount: float) -> Field:
    gray = (color @ _GRAY)[..., None]
    return np.clip(gray + (color - gray) * np.float32(amount), 0, 1)


def _vivid(color: Field) -> Field:
    """The color at full brightness, for light and chalk."""
    strong = _saturate(color, 1.3)
    return strong / strong.max()


def _cells(x: Field, period: float) -> tuple[npt.NDArray[np.int64], Field]:
    """Index of the cell of each coordinate, and the position in the cell, in [-0.5, 0.5)."""
    index = np.floor(x / np.float32(period))
    return index.astype(np.int64), (x / np.float32(period) - index - np.float32(0.5)).astype(np.float32)


def _table(rng: np.random.Generator, spread: float, channels: int = 1) -> Field:
    """Random values of cells, (64, 64, channels) in [-spread, spread]; take indices modulo 64."""
    return rng.uniform(-spread, spread, (64, 64, channels)).astype(np.float32)


def _pick(picture: Field, sketch: Sketch, x: Field, y: Field) -> Field:
    """Colors of the picture at coordinates x (1, n) and y (m, 1), or both (m, n)."""
    height, width = picture.shape[:2]
    columns = np.clip(((x - sketch.x[0, 0]) / sketch.pixel + 0.5).astype(np.int64), 0, width - 1)
    rows = np.clip(((y - sketch.y[0, 0]) / sketch.pixel + 0.5).astype(np.int64), 0, height - 1)
    return picture[rows, columns]


def _watercolor(sketch: Sketch) -> Field:
    wobble = noise(sketch, 9, 0) * 0.012 + noise(sketch, 30, 8) * 0.004
    paper = _rgb(250, 246, 236)
    wash = np.float32(0.5) + np.float32(0.4) * noise(sketch, 3.5, 1)
    picture = paper + (sketch.sky - paper) * wash[:, :, None]
    for i, layer in enumerate(sketch.layers):
        distance = layer.distance + wobble
        pool = 0.62 + 0.25 * noise(sketch, 5, 2 + i) + 0.35 * np.exp(np.minimum(distance, 0) * 45)
        dry_rim = 0.85 * coverage(distance, 0.02)
        over(picture, paper, 0.6 * coverage(distance - np.float32(0.012), 0.008))
        over(picture, layer.color, dry_rim * np.clip(pool, 0.2, 1))
    picture *= (1 + 0.03 * noise(sketch, 90, 9))[:, :, None]
    return picture


def _mosaic(sketch: Sketch) -> Field:
    period = 1 / 11
    (columns, u), (rows, v) = _cells(sketch.x, period), _cells(sketch.y, period)
    jitter = _table(sketch.rng, 0.11)[rows % 64, columns % 64]
    picture = _saturate(flat(sketch), 0.85) * 0.92 + jitter
    gap = np.maximum(np.abs(u), np.abs(v)) * np.float32(period) - np.float32(0.5 * period - 0.009)
    over(picture, _rgb(238, 230, 214), coverage(-gap, 0.004))
    over(picture, _rgb(238, 230, 214), coverage(np.abs(sketch.figure.distance) - np.float32(0.009), 0.004))
    return picture


def _pointillism(sketch: Sketch) -> Field:
    period = 1 / 12
    plain = _saturate(flat(sketch), 1.25)
    paper = _rgb(244, 236, 216)
    picture = paper + (plain - paper) * np.float32(0.16)
    for shift in (0.0, period / 2):
        (columns, u), (rows, v) = _cells(sketch.x + shift, period), _cells(sketch.y + shift, period)
        hue = _table(sketch.rng, 0.1, 3)[rows % 64, columns % 64]
        distance = np.hypot(u, v) - np.float32(0.33)
        over(picture, plain + hue, coverage(distance, 0.12))
    return picture


def _woodcut(sketch: Sketch) -> Field:
    ink, paper = _rgb(28, 22, 24), _rgb(240, 226, 196)
    waver = noise(sketch, 3, 0) * np.float32(0.02)
    _, stripe = _cells(sketch.y + waver + 0 * sketch.x, 1 / 13)
    stripe = np.abs(stripe)
    tone = np.broadcast_to(sketch.sky @ _GRAY, stripe.shape).copy()
    for layer in sketch.grounds:
        np.copyto(tone, layer.color @ _GRAY, where=layer.distance < 0)
    width = np.clip(np.float32(0.42) * (np.float32(1.06) - tone), 0.05, 0.34)
    picture = paper * (1 - np.float32(0.5) * (1 - _saturate(flat(sketch), 1.5)))
    over(picture, ink, coverage(stripe - width, 0.06))
    inside = coverage(sketch.figure.distance, 0.004)
    over(picture, _saturate(sketch.figure.color, 0.9) * 0.95, inside)
    over(picture, ink, inside * coverage(stripe - np.float32(0.09), 0.06))
    over(picture, ink, coverage(outline(sketch) - np.float32(0.011), 0.004))
    return picture


def _neon(sketch: Sketch) -> Field:
    dark = _rgb(14, 8, 34)
    picture = np.broadcast_to(dark + sketch.sky * np.float32(0.06), (*sketch.figure.distance.shape, 3)).copy()
    for layer in sketch.layers:
        light = _vivid(layer.color)
        over(picture, dark + layer.color * np.float32(0.07), coverage(layer.distance, 0.004))
        distance = np.abs(layer.distance)
        strength = 1.0 if layer is sketch.figure else 0.6
        glow = np.exp(distance * np.float32(-1 / 0.035)) * np.float32(0.75 * strength)
        picture += light * glow[:, :, None]
        over(picture, light * 0.45 + 0.55, strength * coverage(distance - np.float32(0.007), 0.006))
    return picture


def _stained_glass(sketch: Sketch) -> Field:
    gap, tint = _voronoi(sketch, 1 / 5)
    picture = _saturate(flat(sketch), 1.6) * (0.95 + np.float32(0.2) * tint)[:, :, None]
    lead = np.minimum(gap, np.minimum(outline(sketch), 1)) - np.float32(0.011)
    picture *= (0.78 + 0.3 * np.clip(lead / 0.07, 0, 1))[:, :, None]
    over(picture, _rgb(16, 14, 20), coverage(lead, 0.006))
    return picture


def _voronoi(sketch: Sketch, period: float) -> tuple[Field, Field]:
    """Distance to the nearest border of jittered cells, and a random tint in [-1, 1] of each cell."""
    x, y = sketch.x[0], sketch.y[:, 0]
    table = _table(sketch.rng, 1, 3)
    first = np.full((y.size, x.size), 9, dtype=np.float32)
    second, tint = first.copy(), np.zeros_like(first)
    for row in range(int(y[0] // period) - 1, int(y[-1] // period) + 2):
        for column in range(int(x[0] // period) - 1, int(x[-1] // period) + 2):
            site_x, site_y, shade = table[row % 64, column % 64]
            # only pixels within two cells have this site as the nearest or second nearest
            columns = slice(*np.searchsorted(x, ((column - 1.5) * period, (column + 2.5) * period)))
            rows = slice(*np.searchsorted(y, ((row - 1.5) * period, (row + 2.5) * period)))
            far_x = x[columns] - np.float32((column + 0.5 + 0.36 * site_x) * period)
            far_y = y[rows] - np.float32((row + 0.5 + 0.36 * site_y) * period)
            distance = np.sqrt(far_x[None, :] ** 2 + far_y[:, None] ** 2)
            nearest, box = first[rows, columns], np.s_[rows, columns]
            second[box] = np.minimum(second[box], np.maximum(nearest, distance))
            tint[box] = np.where(distance < nearest, shade, tint[box])
            np.minimum(nearest, distance, out=nearest)
    return (second - first) / 2, tint


def _chalk(sketch: Sketch) -> Field:
    board = _rgb(34, 62, 52)
    diagonal = (sketch.x + sketch.y) * np.float32(np.sqrt(0.5)) + noise(sketch, 6, 0) * np.float32(0.01)
    _, stroke = _cells(diagonal, 1 / 14)
    grain = np.float32(0.5) + np.float32(0.5) * noise(sketch, 110, 1)
    rubbed = np.clip(np.float32(1.25) - np.abs(stroke) * np.float32(3.4), 0.1, 1) * (0.55 + 0.45 * grain)
    picture = np.broadcast_to(board, (*grain.shape, 3)) * (1 + 0.18 * noise(sketch, 4, 2))[:, :, None]
    over(picture, sketch.sky * 0.7 + 0.2, rubbed * np.float32(0.2))
    for layer in sketch.layers:
        inside = coverage(layer.distance, 0.006)
        strength = 0.9 if layer is sketch.figure else 0.42
        over(picture, board, inside * np.float32(0.8))
        over(picture, _vivid(layer.color) * 0.85 + 0.15, inside * rubbed * np.float32(strength))
        line = coverage(np.abs(layer.distance) - np.float32(0.007), 0.012) * (0.45 + 0.55 * grain)
        over(picture, _vivid(layer.color) * 0.35 + 0.62, line * np.float32(min(1, strength + 0.2)))
    return picture


def _pixel_art(sketch: Sketch) -> Field:
    period = 1 / 24
    (columns, _), (rows, _) = _cells(sketch.x, period), _cells(sketch.y, period)
    centers = (columns + 0.5) * period, (rows + 0.5) * period
    distance = _pick(sketch.figure.distance, sketch, *centers)
    checker = (columns + rows) % 2 * np.float32(0.18) - np.float32(0.09)
    picture = _saturate(_pick(flat(sketch), sketch, *centers), 1.4) + checker[:, :, None]
    picture = np.round(picture * 4) / np.float32(4)
    over(picture, sketch.figure.color * 0.3, coverage(distance - np.float32(0.6 * period), 0.001))
    over(picture, _saturate(sketch.figure.color, 1.3), coverage(distance + np.float32(0.15 * period), 0.001))
    return picture


def _paper_cutout(sketch: Sketch) -> Field:
    picture = np.broadcast_to(sketch.sky * 0.8 + 0.16, (*sketch.figure.distance.shape, 3)).copy()
    drop = round(0.022 / sketch.pixel)
    for layer in sketch.layers:
        rim = 0.022 if layer is sketch.figure else 0.014
        sheet = layer.distance - np.float32(rim)
        shadow = np.pad(sheet, ((drop, 0), (drop, 0)), mode="edge")[:-drop, :-drop]
        over(picture, _rgb(30, 24, 40), coverage(shadow, 0.045) * np.float32(0.5))
        over(picture, _rgb(253, 251, 246), coverage(sheet, 0.004))
        over(picture, layer.color * 0.85 + 0.12, coverage(layer.distance, 0.004))
    picture *= (1 + 0.025 * noise(sketch, 60, 0))[:, :, None]
    return picture


def _knitting(sketch: Sketch) -> Field:
    period = 1 / 13
    _, u = _cells(sketch.x, period)
    _, v = _cells(sketch.y - np.abs(u) * np.float32(0.9 * period), period)
    plain = _saturate(flat(sketch), 0.9) * 0.95
    yarn = _pick(plain, sketch, sketch.x, sketch.y - v * np.float32(0.8 * period))
    round_v, round_u = 1 - (2 * v) ** 2, 1 - (4 * np.abs(np.abs(u) - np.float32(0.25))) ** 2
    shade = np.clip(round_v, 0, 1) ** 0.6 * (0.35 + 0.65 * np.clip(round_u, 0, 1) ** 0.6)
    fuzz = 1 + np.float32(0.08) * noise(sketch, 80, 0)
    return yarn * ((np.float32(0.3) + np.float32(0.82) * shade) * fuzz)[:, :, None]


PAINTERS: dict[str, Callable[[Sketch], Field]] = {
    "watercolor": _watercolor,
    "mosaic": _mosaic,
    "pointillism": _pointillism,
    "woodcut": _woodcut,
    "neon": _neon,
    "stained glass": _stained_glass,
    "chalk": _chalk,
    "pixel art": _pixel_art,
    "paper cutout": _paper_cutout,
    "knitting": _knitting,
}
STYLES: tuple[str, ...] = tuple(PAINTERS)


def _blueprint(sketch: Sketch) -> Field:
    paper, ink = _rgb(22, 52, 122), _rgb(226, 236, 250)
    picture = np.broadcast_to(paper, (*sketch.figure.distance.shape, 3)) * (1 + 0.12 * noise(sketch, 5, 0))[:, :, None]
    (_, across), (_, down) = _cells(sketch.x, 1 / 8), _cells(sketch.y, 1 / 8)
    to_line = np.float32(0.5) - np.maximum(np.abs(across), np.abs(down))
    over(picture, ink, coverage(to_line - np.float32(0.05), 0.06) * np.float32(0.3))
    for layer in sketch.layers:
        inside = coverage(layer.distance, 0.006)
        over(picture, paper, inside * np.float32(0.9))
        over(picture, _vivid(layer.color), inside * np.float32(0.55 if layer is sketch.figure else 0.06))
        over(picture, ink, coverage(np.abs(layer.distance) - np.float32(0.009), 0.008))
    return picture


def _cross_stitch(sketch: Sketch) -> Field:
    period = 1 / 12
    (columns, u), (rows, v) = _cells(sketch.x, period), _cells(sketch.y, period)
    thread = _pick(_saturate(flat(sketch), 1.2), sketch, (columns + 0.5) * period, (rows + 0.5) * period)
    to_diagonal = np.minimum(np.abs(u - v), np.abs(u + v))
    shade = np.float32(1.1) - np.float32(1.2) * to_diagonal
    picture = np.broadcast_to(_rgb(240, 232, 214), thread.shape) * (1 + 0.05 * noise(sketch, 90, 0))[:, :, None]
    over(picture, np.clip(thread * shade[:, :, None], 0, 1), coverage(to_diagonal - np.float32(0.2), 0.12))
    return picture


UNKNOWN_PAINTERS: dict[str, Callable[[Sketch], Field]] = {"blueprint": _blueprint, "cross stitch": _cross_stitch}
UNKNOWN_STYLES: tuple[str, ...] = tuple(UNKNOWN_PAINTERS)
"""Styles of style databases and judges alone: no caption names them, and no model is trained on them."""
