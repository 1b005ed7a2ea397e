"""PNG files with the recipe in their metadata, and labelled grids of pictures.

Takes arrays and PIL images, returns PIL images and PNG bytes. Writes no files.
"""

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont, ImageOps, PngImagePlugin

from retrieval.errors import UserError
from retrieval.pictures.decode import PictureError, codec_errors
from retrieval.storage.root import Root

RECIPE = "recipe"
LABEL_CHARS = 160
Font = ImageFont.FreeTypeFont
BACKGROUND, TEXT_COLOR, EMPTY_CELL = (255, 255, 255), (34, 34, 34), (238, 238, 238)


@dataclass(frozen=True)
class Grid:
    """Pictures in rows and columns, with one label for each row and each column."""

    cells: Sequence[Sequence[Image.Image | None]]
    """cells[row][column]; `None` is an empty grey cell."""
    rows: Sequence[str]
    columns: Sequence[str]
    title: str = ""
    cell: int = 160
    """Edge of a cell in pixels; pictures are scaled to fit."""


def to_pictures(pixels: npt.NDArray[np.floating[Any]]) -> list[Image.Image]:
    """Decoded pixels (n, 3, height, width) as RGB pictures; -1..1 becomes 0..255, clipped."""
    scaled = np.clip(np.rint((np.asarray(pixels, np.float32) + 1) * 127.5), 0, 255).astype(np.uint8)
    return [Image.fromarray(np.ascontiguousarray(array.transpose(1, 2, 0))) for array in scaled]


def to_pixels(picture: Image.Image, size: tuple[int, int]) -> npt.NDArray[np.float32]:
    """The picture scaled and cropped around its center to (width, height): (3, height, width) float32 in -1..1."""
    fitted = ImageOps.fit(picture.convert("RGB"), size, Image.Resampling.LANCZOS)
    return np.asarray(fitted, np.float32).transpose(2, 0, 1) / 127.5 - 1


def white_cells(picture: Image.Image, size: tuple[int, int], cell: int) -> npt.NDArray[np.bool_]:
    """Squares of `cell` pixels of a mask with a white pixel: (height / cell, width / cell). size: as in `to_pixels`."""
    fitted = ImageOps.fit(picture.convert("L"), size, Image.Resampling.NEAREST)
    white = np.asarray(fitted) >= 128
    return white.reshape(size[1] // cell, cell, size[0] // cell, cell).any(axis=(1, 3))


def png_bytes(picture: Image.Image, recipe: dict[str, Any]) -> bytes:
    """A PNG with `recipe` as JSON in its text metadata. Equal inputs give equal bytes."""
    text = PngImagePlugin.PngInfo()
    # ASCII JSON, since PNG readers differ in how they decode Unicode text chunks
    text.add_text(RECIPE, json.dumps(recipe, sort_keys=True, ensure_ascii=True), zip=True)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", pnginfo=text)
    return buffer.getvalue()


def grid_png(grid: Grid) -> bytes:
    """The grid as PNG bytes."""
    buffer = io.BytesIO()
    draw_grid(grid).save(buffer, "PNG")
    return buffer.getvalue()


def open_picture(root: Root, name: str) -> Image.Image:
    """A stored picture, decoded to RGB."""
    with root.open(name) as file, Image.open(file) as picture:
        return picture.convert("RGB")


def cell_edge(picture: Image.Image) -> int:
    """Cell edge for pictures of this size: a whole multiple of at least 160 px, but at most 256 px."""
    edge = max(picture.size)
    return min(256, edge * -(-160 // edge))


def read_recipe(png: bytes) -> dict[str, Any]:
    """The recipe in a PNG of `png_bytes`. Raises UserError if there is none, and for a file that Pillow refuses."""
    try:
        with codec_errors(), Image.open(io.BytesIO(png), formats=["PNG"]) as picture:
            text = picture.info.get(RECIPE)
    except PictureError as error:
        raise UserError(f"this file is no readable PNG: {error}") from error
    try:
        recipe = json.loads(text) if isinstance(text, str) else None
    except (ValueError, RecursionError) as error:
        raise UserError(f"the recipe in the metadata of this picture is not JSON: {error}") from error
    if not isinstance(recipe, dict):
        raise UserError("this picture has no recipe in its metadata")
    return recipe


def fit(picture: Image.Image, edge: int) -> Image.Image:
    """The picture scaled to fit a square of this edge. Small pictures are enlarged by whole factors."""
    longest = max(picture.size)
    factor = edge / longest if longest > edge else max(1, edge // longest)
    size = (max(1, round(picture.width * factor)), max(1, round(picture.height * factor)))
    filter_ = Image.Resampling.LANCZOS if factor < 1 else Image.Resampling.BICUBIC
    return picture.convert("RGB").resize(size, filter_)


def draw_grid(grid: Grid) -> Image.Image:
    """The grid as one picture, with wrapped row labels on the left and column labels on top."""
    size = max(13, grid.cell // 10)
    font, gap, line = _font(size), max(4, grid.cell // 24), round(size * 1.3)
    columns = [wrap(label[:LABEL_CHARS], grid.cell, font) for label in grid.columns]
    rows = [wrap(label[:LABEL_CHARS], round(grid.cell * 1.1), font) for label in grid.rows]
    side = round(max((font.getlength(text) + 3 * gap for lines in rows for text in lines), default=0))
    title = line * 2 if grid.title else 0
    top = title + line * max((len(lines) for lines in columns), default=0) + 2 * gap
    heights = [max(grid.cell, line * len(lines)) + gap for lines in rows]
    sheet = Image.new("RGB", (side + gap + (grid.cell + gap) * len(columns), top + sum(heights)), BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    draw.text((gap, gap), grid.title, TEXT_COLOR, _font(round(size * 1.25)))
    lefts = [side + gap + (grid.cell + gap) * column for column in range(len(columns))]
    for left, lines in zip(lefts, columns, strict=True):
        _write(draw, lines, (left + grid.cell // 2, top - gap - line * len(lines)), line, (font, "ma"))
    for row, (lines, pictures) in enumerate(zip(rows, grid.cells, strict=True)):
        y = top + sum(heights[:row])
        _write(draw, lines, (gap, y + (heights[row] - gap - line * len(lines)) // 2), line, (font, "la"))
        for left, picture in zip(lefts, pictures, strict=True):
            _paste(sheet, picture, (left, y), grid.cell)
    return sheet


def wrap(text: str, width: int, font: Font) -> list[str]:
    """Lines of a text, at most `width` pixels wide, broken between words or, in long words, within them."""
    lines: list[str] = []
    for word in text.split():
        joined = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(joined) <= width:
            lines[-1] = joined
        else:
            lines.extend(_split_word(word, width, font))
    return lines


def _split_word(word: str, width: int, font: Font) -> list[str]:
    if len(word) < 2 or font.getlength(word) <= width:
        return [word]
    cut = next((n for n in range(len(word) - 1, 1, -1) if font.getlength(word[:n]) <= width), 1)
    return [word[:cut], *_split_word(word[cut:], width, font)]


def _font(size: int) -> Font:
    # DejaVu, which matplotlib installs, covers more scripts than Pillow's font.
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"), size)


def _write(
    draw: ImageDraw.ImageDraw, lines: list[str], at: tuple[int, int], line: int, style: tuple[Font, str]
) -> None:
    for number, text in enumerate(lines):
        draw.text((at[0], at[1] + number * line), text, TEXT_COLOR, style[0], anchor=style[1])


def _paste(sheet: Image.Image, picture: Image.Image | None, at: tuple[int, int], edge: int) -> None:
    if picture is None:
        sheet.paste(EMPTY_CELL, (*at, at[0] + edge, at[1] + edge))
        return
    fitted = fit(picture, edge)
    sheet.paste(fitted, (at[0] + (edge - fitted.width) // 2, at[1] + (edge - fitted.height) // 2))
