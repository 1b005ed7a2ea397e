"""Sources of style databases and their pictures: the settings, a picture with its metadata, the names of fields."""

import codecs
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, Protocol

import pyarrow as pa

from retrieval.errors import UserError
from retrieval.storage.listing import safe_text
from retrieval.storage.schema import DETAILS, METADATA, further_name

log = logging.getLogger(__name__)

SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".png", ".apng", ".webp", ".avif", ".bmp", ".dib"),
    *(".gif", ".tif", ".tiff"),
)
# Without TIFF, whose signature the raw files of cameras share.
_SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a")
SIGNATURE_BYTES = 16
MAX_TEXT_CHARACTERS = 4096
MAX_FURTHER = 64
"""Most further columns of a source. More are values in the place of names."""
VALUES = (str, int, float)
FIELDS = {
    "path": ("path", "file", "filename", "file_name", "filepath", "image_path", "image", "name"),
    "label": ("label", "style", "style_name", "class"),
    "caption": ("caption", "text"),
    "title": ("title",),
    "artist": ("artist", "artist_name"),
    "license": ("license", "licence", "rights"),
    "source": ("source", "source_set", "url", "attribution"),
}
"""Names of each field in a table or in the JSON files of a tar, in lower case, in order of preference."""
FURTHER = "further"
"""Key of the other values of a picture in its fields."""
_KNOWN = {*METADATA.names, *DETAILS.names, "split", *(name for names in FIELDS.values() for name in names)}
"""Columns that are no further ones."""
_NOT_READ = {"", *_KNOWN}.difference(*FIELDS.values())
Fields = Mapping[str, Any]


@dataclass(frozen=True)
class PictureSource:
    """A collection of pictures, and settings for its layout."""

    path: Path
    """A folder of pictures, tars or Parquet files, a tar, or a table (.csv, .tsv, .jsonl, .parquet, .arrow)."""
    images: Path | None = None
    """The folder that the paths of a table are relative to; None: the folder of the table."""
    artist_title: bool = False
    """Files are named `artist_title.jpg`, with hyphens between words."""
    license: str = ""
    """Licence of pictures without one in their metadata."""
    style_captions: bool = False
    """Pictures without caption and title have their style as caption, as classes of ImageNet; else their file name."""


class Content(Protocol):
    """Where the bytes of a picture are."""

    def read(self) -> bytes:
        """The bytes of the picture file."""


@dataclass(frozen=True)
class FileRange:
    """A file or a part of it. offset, size: in bytes; size -1: to the end of the file."""

    file: Path
    offset: int = 0
    size: int = -1

    def read(self) -> bytes:
        """The bytes of the range."""
        with self.file.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


class Item(NamedTuple):
    """A picture as a reader yields it."""

    name: str
    """Unique path in the source, with / as separator."""
    content: Content
    fields: Fields
    """As `read_fields` gives them."""
    folders: tuple[str, ...] = ()
    """Folders of the picture in the source, the outermost first, for its style."""
    other_name: str = ""
    """Its name if another picture has `name`: for a picture in a tar or table with the suffix of that; for a name that
    is no UTF-8 with its bytes as %XX."""


@dataclass(frozen=True)
class SourcePicture:
    """A picture of a source and its metadata."""

    name: str
    content: Content
    label: str = ""
    """Style."""
    caption: str = ""
    title: str = ""
    artist: str = ""
    license: str = ""
    source: str = ""
    further: Fields = field(default_factory=dict)
    """Other values by column: texts, numbers, truth values."""


def is_picture(name: str, beginning: bytes) -> bool:
    """Whether a file is a picture by its suffix or its first SIGNATURE_BYTES."""
    if PurePosixPath(name).suffix.lower() in SUFFIXES or beginning.startswith(_SIGNATURES):
        return True
    return beginning[8:12] == b"WEBP" or beginning[4:12] == b"ftypavif"


def source_picture(item: Item, label: str, source: PictureSource) -> SourcePicture:
    """The picture of an item. label: its style, if its fields have none."""
    stem, fields = PurePosixPath(item.name).stem, item.fields
    artist, title = fields.get("artist", ""), fields.get("title", "")
    if source.artist_title and "_" in stem:
        first, _, rest = stem.partition("_")
        artist, title = artist or words(first), title or words(rest)
    title_and_artist = f"{title} by {artist}" if title and artist else title
    label = fields.get("label", label)
    return SourcePicture(
        name=item.name,
        content=item.content,
        label=label,
        caption=fields.get("caption") or title_and_artist or words(label if source.style_captions and label else stem),
        title=title,
        artist=artist,
        license=fields.get("license") or source.license,
        source=fields.get("source", ""),
        further=fields.get(FURTHER, {}),
    )


def check_names(names: Iterable[str], path: Path) -> None:
    """Raises UserError for two columns that `read_fields` cannot tell from each other. path: of their table."""
    first: dict[str, str] = {}
    for name in names:
        key = _key(name)
        if key in first and key not in _NOT_READ:
            raise UserError(
                f"{path} has the columns {first[key]!r} and {name!r}. Wanted: names that differ in more than case and"
                " outer spaces. Rename or remove one of the two."
            )
        first[key] = name


def _key(name: str) -> str:
    return safe_text(name.strip().lower())


def read_fields(row: Fields) -> dict[str, Any]:
    """The FIELDS of a row as stripped strings, without empty ones, and its other values under FURTHER."""
    row = {_key(name): value for name, value in row.items() if name and name.strip()}
    fields: dict[str, Any] = {}
    for name, columns in FIELDS.items():
        # A column `image` can also contain pictures, a column `artist` numbers without names.
        kind = str if name in ("path", "artist") else object
        given = map(_first, (row.get(column) for column in columns))
        values = [value for value in given if value is not None and isinstance(value, kind)]
        if text := next(filter(None, (safe_text(str(value).strip()) for value in values)), ""):
            fields[name] = text
    if "license" not in fields and str(row.get("is_public_domain")).lower() in ("true", "1"):
        fields["license"] = "public domain"
    further = {name: _value(row[name]) for name in row.keys() - _KNOWN if isinstance(row[name], VALUES)}
    if further := {name: value for name, value in further.items() if value != ""}:
        fields[FURTHER] = further
    return fields


def joined(fields: Fields, others: Fields) -> Fields:
    """The fields of a picture from two places. The others count where both have one."""
    further = {**fields.get(FURTHER, {}), **others.get(FURTHER, {})}
    return {**fields, **others, **({FURTHER: further} if further else {})}


def _first(value: Any) -> Any:
    """The first of several captions or other values in a list; None for an empty list and for an object."""
    value = next(iter(value), None) if isinstance(value, list) else value
    return None if isinstance(value, list | dict) else value


def _value(value: Any) -> Any:
    return safe_text(value.strip()) if isinstance(value, str) else value


def further_columns(pictures: Iterable[SourcePicture]) -> dict[str, pa.Array]:
    """The further values of the pictures by column, in sorted order: truth values, int64, float64 or texts.

    A column of texts that are all numbers becomes numbers. At most MAX_FURTHER columns; the others are logged.
    """
    values = [picture.further for picture in pictures]
    names = sorted({name for row in values for name in row})
    if left_out := names[MAX_FURTHER:]:
        log.warning("%d further columns of the pictures are left out: %s ...", len(left_out), left_out[0])
    return {further_name(name): _typed([row.get(name) for row in values]) for name in names[:MAX_FURTHER]}


def _typed(values: list[Any]) -> pa.Array:
    texts = pa.array([None if value is None else str(value) for value in values], pa.string())
    for kind in (pa.int64(), pa.float64(), pa.bool_()):
        try:
            return texts.cast(kind)
        except pa.ArrowInvalid:
            continue
    return texts


def text_of(data: bytes) -> str:
    """The text of a caption file, at most MAX_TEXT_CHARACTERS."""
    return decoded(data).strip()[:MAX_TEXT_CHARACTERS]


def decoded(data: bytes) -> str:
    """The text of a file in UTF-32 or UTF-16 with a byte order mark, in UTF-8, or else in Latin-1."""
    if data.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):  # the first begins with a mark of UTF-16
        return data.decode("utf-32", errors="replace")
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return data.decode("utf-16", errors="replace")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return data.decode("latin-1")


def words(stem: str) -> str:
    """The words of a file name or style, which _ and - join."""
    return stem.replace("_", " ").replace("-", " ")
