"""Draws the neighbors of queries as a contact sheet, a title and rows of tiles for each query.

Draws pictures with a URL that is a path below the given folder. Other neighbors become gray tiles with the caption.
"""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageDraw, ImageFont, ImageOps

from retrieval.errors import UserError
from retrieval.pictures.picture_file import read_picture

if TYPE_CHECKING:
    from retrieval.database.database import Neighbors

TILE = 160
"""Edge of a tile in pixels. Three lines of text follow below it."""
LINE = 16
GAP = 8
CELL = TILE + 3 * LINE + GAP
COLUMNS = 10
BACKGROUND, TEXT, EMPTY = "#ffffff", "#222222", "#dddddd"

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@dataclass(frozen=True)
class QueryResult:
    """The name of a query, and its neighbors, best first: columns of METADATA, rank and similarity."""

    query: str
    neighbors: list[dict[str, Any]]


def query_results(names: Sequence[str], neighbors: "Neighbors") -> list[QueryResult]:
    """The result of each query. names: of the queries, in the order of the search."""
    results = []
    for name, similarities, table in zip(names, neighbors.similarities.tolist(), neighbors.rows, strict=True):
        rows = enumerate(zip(similarities, table.to_pylist(), strict=True), 1)
        lines = [{"rank": rank, "similarity": similarity, **row} for rank, (similarity, row) in rows]
        results.append(QueryResult(name, lines))
    return results


def draw_contact_sheet(results: Sequence[QueryResult], folder: Path) -> tuple[Image.Image, int]:
    """The contact sheet and the number of pictures on it. folder: base of URLs such as `a/b.jpg`."""
    heights = [_height(result) for result in results]
    widest = max((len(result.neighbors) for result in results), default=0)
    width = GAP + min(COLUMNS, max(widest, 3)) * (TILE + GAP)
    sheet = Image.new("RGB", (width, GAP + sum(heights)), BACKGROUND)
    top, num_pictures = GAP, 0
    for result, height in zip(results, heights, strict=True):
        num_pictures += _draw_result(sheet, top, result, folder)
        top += height
    return sheet, num_pictures


def write_contact_sheet(path: Path, results: Sequence[QueryResult], folder: Path) -> int:
    """Write a contact sheet as an image file. Returns the number of pictures on it."""
    sheet, num_pictures = draw_contact_sheet(results, folder)
    try:
        sheet.save(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be written: {error}. Use a name such as sheet.png") from error
    return num_pictures


def _height(result: QueryResult) -> int:
    return 2 * LINE + -(-len(result.neighbors) // COLUMNS) * CELL


def _draw_result(sheet: Image.Image, top: int, result: QueryResult, folder: Path) -> int:
    draw = ImageDraw.Draw(sheet)
    draw.text((GAP, top), _fitted(draw, result.query, _font(13), sheet.width - 2 * GAP), TEXT, _font(13))
    num_pictures = 0
    for i, neighbor in enumerate(result.neighbors):
        left = GAP + (i % COLUMNS) * (TILE + GAP)
        upper = top + 2 * LINE + (i // COLUMNS) * CELL
        tile = _picture_tile(neighbor, folder)
        num_pictures += tile is not None
        sheet.paste(tile or _caption_tile(neighbor["caption"]), (left, upper))
        label = f"{neighbor['rank']}  {neighbor['similarity']:.3f}"
        for line, text in enumerate((label, neighbor["caption"], credit(neighbor))):
            place = (left, upper + TILE + 1 + line * LINE)
            draw.text(place, _fitted(draw, text, _font(11), TILE), TEXT, _font(11))
    return num_pictures


def _picture_tile(neighbor: dict[str, Any], folder: Path) -> Image.Image | None:
    """The neighbor's picture, cropped to its box, or None if the folder has no readable file of it."""
    url, box = neighbor["url"], neighbor.get("box")
    if not url or "://" in url or "\0" in url:
        return None
    path = (folder / url).resolve()
    if not path.is_relative_to(folder.resolve()):
        return None
    try:
        picture = read_picture(path)
        if box:
            picture = picture.crop((box[0], box[1], box[0] + box[2], box[1] + box[3]))
        return ImageOps.pad(picture, (TILE, TILE), color=EMPTY)
    except UserError:
        return None


def _caption_tile(caption: str) -> Image.Image:
    tile = Image.new("RGB", (TILE, TILE), EMPTY)
    text = "\n".join(textwrap.wrap(printable(caption), 22)[:8])
    ImageDraw.Draw(tile).multiline_text((GAP, GAP), text, TEXT, _font(11))
    return tile


def _fitted(draw: ImageDraw.ImageDraw, text: str, font: Font, width: int) -> str:
    """The text, shortened to at most `width` pixels."""
    text = printable(text)[:300]
    while text and draw.textlength(text, font) > width:
        text = text[: -max(1, len(text) // 16)]
    return text


def credit(neighbor: dict[str, Any]) -> str:
    """Title, artist and license of a neighbor, as far as the database has them."""
    return ", ".join(neighbor[column] for column in ("title", "artist", "license") if neighbor.get(column))


def printable(text: str) -> str:
    """The text on one line, without control characters."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


@cache
def _font(size: int) -> Font:
    """DejaVu Sans of an installed matplotlib, which has more alphabets than Pillow's own font."""
    matplotlib = find_spec("matplotlib")
    if matplotlib and matplotlib.origin:
        return ImageFont.truetype(str(Path(matplotlib.origin).parent / "mpl-data/fonts/ttf/DejaVuSans.ttf"), size)
    return ImageFont.load_default(size)
