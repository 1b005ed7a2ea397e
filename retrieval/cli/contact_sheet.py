"""Pictures in and out of the shell: reads a query's picture, draws what a search found as one sheet.

A neighbor whose address is a path of a file below the given folder is drawn; any other is a tile with its
caption.
"""

import io
import struct
import textwrap
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
from PIL import Image, ImageDraw, ImageFont, ImageOps

from retrieval.errors import UserError

if TYPE_CHECKING:
    from retrieval.database.database import Neighbors

TILE = 160
"""Edge of a tile in pixels; three lines of text stand below it."""
LINE = 16
GAP = 8
CELL = TILE + 3 * LINE + GAP
COLUMNS = 10
PAPER, INK, EMPTY = "#ffffff", "#222222", "#dddddd"
# What Pillow's readers raise for damaged files, beside its own error for too many pixels.
BROKEN = (OSError, EOFError, SyntaxError, ValueError, TypeError, LookupError, struct.error, zlib.error)


@dataclass(frozen=True)
class Answer:
    """A query as people call it, and its neighbors, best first: schema.METADATA with rank and similarity."""

    query: str
    neighbors: list[dict[str, Any]]


def read_picture(path: Path) -> Image.Image:
    """The picture in a file, upright, RGB. Raises UserError if it cannot be read."""
    try:
        return decoded(str(path), path.read_bytes())
    except OSError as error:
        raise UserError(f"{path} is not a readable picture: {error}") from error


def decoded(name: str, data: bytes) -> Image.Image:
    """The picture that a file of this name holds, upright, RGB. Raises UserError if it is none."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (*BROKEN, Image.DecompressionBombError) as error:
        raise UserError(f"{name} is not a readable picture: {error}") from error


def answers_of(queries: Sequence[str], found: "Neighbors") -> list[Answer]:
    """What a search found, by query as people call it."""
    results = []
    for query, similarities, rows in zip(queries, found.similarities.tolist(), found.rows, strict=True):
        pairs = enumerate(zip(similarities, rows.to_pylist(), strict=True), 1)
        results.append(
            Answer(query, [{"rank": rank, "similarity": value, **row} for rank, (value, row) in pairs])
        )
    return results


def draw_sheet(answers: Sequence[Answer], pictures: Path) -> tuple[Image.Image, int]:
    """A sheet, for each answer a line and its tiles, and the number of pictures drawn on it.

    pictures: the folder that addresses such as `a/b.jpg` are relative to.
    """
    heights = [_height(answer) for answer in answers]
    widest = max((len(answer.neighbors) for answer in answers), default=0)
    width = GAP + min(COLUMNS, max(widest, 3)) * (TILE + GAP)
    sheet = Image.new("RGB", (width, GAP + sum(heights)), PAPER)
    top, drawn = GAP, 0
    for answer, height in zip(answers, heights, strict=True):
        drawn += _draw_answer(sheet, top, answer, pictures)
        top += height
    return sheet, drawn


def write_sheet(path: Path, answers: Sequence[Answer], pictures: Path) -> int:
    """Write a sheet as an image file. Returns the pictures drawn. Raises UserError where it cannot."""
    sheet, drawn = draw_sheet(answers, pictures)
    try:
        sheet.save(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be written: {error}. Wanted a name such as sheet.png") from error
    return drawn


def _height(answer: Answer) -> int:
    lines = -(-len(answer.neighbors) // COLUMNS)
    return 2 * LINE + lines * CELL


def _draw_answer(sheet: Image.Image, top: int, answer: Answer, pictures: Path) -> int:
    draw = ImageDraw.Draw(sheet)
    font = _font(13)
    draw.text((GAP, top), _fitted(draw, answer.query, font, sheet.width - 2 * GAP), INK, font)
    drawn = 0
    for i, neighbor in enumerate(answer.neighbors):
        left = GAP + (i % COLUMNS) * (TILE + GAP)
        upper = top + 2 * LINE + (i // COLUMNS) * CELL
        picture = _picture_of(neighbor, pictures)
        drawn += picture is not None
        sheet.paste(picture or _caption_tile(neighbor["caption"]), (left, upper))
        label = f"{neighbor['rank']}  {neighbor['similarity']:.3f}"
        for line, text in enumerate((label, neighbor["caption"], credit(neighbor))):
            place = (left, upper + TILE + 1 + line * LINE)
            draw.text(place, _fitted(draw, text, _font(11), TILE), INK, _font(11))
    return drawn


def _picture_of(neighbor: dict[str, Any], pictures: Path) -> Image.Image | None:
    """The tile of a picture below the folder, or of its part, or None where it has none that can be read."""
    address, box = neighbor["url"], neighbor.get("box")
    path = (pictures / address).resolve()
    if not address or "://" in address or not path.is_relative_to(pictures.resolve()):
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
    text = "\n".join(textwrap.wrap(plain(caption), 22)[:8])
    ImageDraw.Draw(tile).multiline_text((GAP, GAP), text, INK, _font(11))
    return tile


def _fitted(draw: ImageDraw.ImageDraw, text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """The text, cut so that it is no wider than `width` pixels."""
    text = plain(text)[:300]
    while text and draw.textlength(text, font) > width:
        text = text[: -max(1, len(text) // 16)]
    return text


def credit(neighbor: dict[str, Any]) -> str:
    """Title, artist and license of a neighbor, as far as its database keeps them."""
    return ", ".join(neighbor[word] for word in ("title", "artist", "license") if neighbor.get(word))


def plain(text: str) -> str:
    """The text on one line, without characters that a terminal or a font would act on."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"), size)
