"""What a style database can be made of: folders of pictures, WebDataset tars, CSV or Parquet with paths.

Lists pictures in a fixed order with what is known of them, and reads each when asked. Knows how ArtBench-10
and WikiArt are laid out: folders by style, perhaps below train and test; names such as `artist_title.jpg`;
tables of paths, with a header or as `style_train.csv` beside `style_class.txt`.
"""

import csv
import io
import json
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from retrieval.errors import UserError

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
SPLITS = ("train", "test", "val", "validation")
"""Folders that stand above those of the styles."""
MAX_TEXT_BYTES = 4096
FIELDS = {
    "path": ("path", "file", "filename", "file_name", "filepath", "image_path", "image", "name"),
    "label": ("label", "style", "style_name", "class"),
    "caption": ("caption", "text"),
    "title": ("title",),
    "artist": ("artist", "artist_name"),
    "license": ("license", "licence", "rights"),
    "source": ("source", "source_set", "url", "attribution"),
}
"""What a table or a tar's JSON may call each field, in small letters, best first."""
Known = Mapping[str, Any]


@dataclass(frozen=True)
class Source:
    """Where pictures are, and what the layout alone does not say."""

    path: Path
    """A folder of pictures or of tars, a tar, or a table (.csv, .parquet)."""
    images: Path | None = None
    """The folder that a table's paths are relative to; None: that of the table."""
    artist_title: bool = False
    """Files are named `artist_title.jpg`, words joined by hyphens."""
    license: str = ""
    """Of pictures that state none themselves."""


@dataclass(frozen=True)
class Item:
    """A picture of a source and what is known of it."""

    name: str
    """Its path in the source, parts joined by /."""
    file: Path
    label: str = ""
    """Its style."""
    caption: str = ""
    title: str = ""
    artist: str = ""
    license: str = ""
    source: str = ""
    offset: int = 0
    size: int = -1
    """Where it lies in the file, in bytes; -1: to the end."""

    def read(self) -> bytes:
        """The picture's bytes."""
        with self.file.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


def read_items(source: Source) -> tuple[list[Item], int]:
    """The pictures of a source by name, and how many a table names that are not there.

    Raises UserError for a source that cannot be read or has no picture.
    """
    kind = source.path.suffix.lower()
    if source.path.is_dir():
        tars = sorted(source.path.glob("*.tar"))
        items = list(_tarred(tars, source) if tars else _foldered(source))
    elif kind == ".tar" and source.path.is_file():
        items = list(_tarred([source.path], source))
    elif kind in (".csv", ".parquet") and source.path.is_file():
        return _tabled(source)
    else:
        raise UserError(f"{source.path} is no folder, .tar, .csv or .parquet. Name one that is there.")
    return _checked(items, source, 0)


def _foldered(source: Source) -> Iterator[Item]:
    for path in sorted(source.path.rglob("*")):
        if path.suffix.lower() in PICTURES and path.is_file():
            beside = path.with_suffix(".txt")
            known = {"caption": _text(beside.read_bytes())} if beside.is_file() else {}
            yield _item(path.relative_to(source.path).as_posix(), path, known, source)


def _tarred(tars: Iterable[Path], source: Source) -> Iterator[Item]:
    for path in tars:
        pictures: dict[str, tuple[str, tarfile.TarInfo]] = {}
        known: dict[str, dict[str, Any]] = {}
        try:
            with tarfile.open(path, "r:") as tar:
                for member in tar:
                    folder, slash, base = member.name.rpartition("/")
                    stem, _, kind = base.partition(".")
                    key = f"{folder}{slash}{stem}"
                    if PurePosixPath(base).suffix.lower() in PICTURES:
                        pictures[member.name] = key, member
                    elif kind in ("txt", "cls", "json") and (file := tar.extractfile(member)):
                        known.setdefault(key, {}).update(_beside(kind, file.read()))
        except tarfile.TarError as error:
            raise UserError(f"{path} is not a readable tar: {error}") from error
        for name, (key, member) in sorted(pictures.items()):
            place = (member.offset_data, member.size)
            yield _item(f"{path.stem}/{name}", path, {"label": "", **known.get(key, {})}, source, place)


def _beside(kind: str, data: bytes) -> dict[str, Any]:
    """What a tar says of a picture: its caption, its class, or a JSON object of fields."""
    if kind != "json":
        return {"caption" if kind == "txt" else "label": _text(data)}
    try:
        found = json.loads(data)
    except ValueError:
        return {}
    return _fields(found) if isinstance(found, dict) else {}


def _tabled(source: Source) -> tuple[list[Item], int]:
    base = (source.images or source.path.parent).resolve()
    rows = _rows(source.path)
    items = []
    for row in rows:
        known = _fields(row)
        if "path" not in known:
            raise UserError(
                f"{source.path} has no column of paths; wanted one of {', '.join(FIELDS['path'])}."
            )
        found = _located(base, known, row)
        if found is not None:
            items.append(_item(found.relative_to(base).as_posix(), found, known, source))
    return _checked(items, source, len(rows) - len(items))


def _rows(path: Path) -> list[dict[str, Any]]:
    try:
        if path.suffix.lower() == ".parquet":
            return [_small(row) for row in pq.read_table(path).to_pylist()]
        text = path.read_text(encoding="utf-8-sig")
    except (pa.ArrowInvalid, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a readable table: {error}") from error
    first = next(csv.reader(io.StringIO(text)), [""])
    if PurePosixPath(first[0]).suffix.lower() not in PICTURES:
        return [_small(row) for row in csv.DictReader(io.StringIO(text))]
    classes = _classes(path)
    lines = csv.DictReader(io.StringIO(text), ("path", "label"))
    return [{"path": row["path"], "label": classes.get(row["label"] or "", "")} for row in lines]


def _classes(path: Path) -> dict[str, str]:
    """Names by number of `style_class.txt` beside `style_train.csv`, lines such as `3 Baroque`."""
    beside = path.with_name(f"{path.stem.rpartition('_')[0]}_class.txt")
    lines = beside.read_text().splitlines() if beside.is_file() else []
    return {number: name.strip() for number, _, name in (line.strip().partition(" ") for line in lines)}


def _small(row: Mapping[str | None, Any]) -> dict[str, Any]:
    return {name.strip().lower(): value for name, value in row.items() if name}


def _fields(row: Known) -> dict[str, Any]:
    """The fields that a row has, as texts without blanks around them."""
    row = {name.lower(): value for name, value in row.items()}
    known: dict[str, str] = {}
    for field, names in FIELDS.items():
        kind = str if field == "path" else object  # a column of pictures may have the name of one of paths
        there = [row[name] for name in names if row.get(name) not in (None, "")]
        values = [str(value).strip() for value in there if isinstance(value, kind)]
        known |= {field: values[0]} if values else {}
    if "license" not in known and str(row.get("is_public_domain")).lower() in ("true", "1"):
        known["license"] = "public domain"
    return known


def _located(base: Path, known: Known, row: Known) -> Path | None:
    """The file of a row: as the path says, in a folder of its style, or of its split and style."""
    label, split = known.get("label", ""), str(row.get("split") or "")
    for folder in ("", label, f"{split}/{label}"):
        try:
            path: Path = (base / folder / known["path"]).resolve()
            if path.is_relative_to(base) and path.is_file():
                return path
        except (OSError, ValueError):  # no file can have such a path: too long, or with a zero byte
            continue
    return None


def _item(name: str, file: Path, known: Known, source: Source, place: tuple[int, int] = (0, -1)) -> Item:
    stem = PurePosixPath(name).stem
    artist, title = known.get("artist", ""), known.get("title", "")
    if source.artist_title and "_" in stem:
        first, _, rest = stem.partition("_")
        artist, title = artist or _words(first), title or _words(rest)
    told = f"{title} by {artist}" if title and artist else title
    folders = [part for part in PurePosixPath(name).parts[:-1] if part not in SPLITS]
    return Item(
        name=name,
        file=file,
        label=known.get("label", folders[0] if folders else ""),
        caption=known.get("caption") or told or _words(stem),
        title=title,
        artist=artist,
        license=known.get("license") or source.license,
        source=known.get("source", ""),
        offset=place[0],
        size=place[1],
    )


def _checked(items: list[Item], source: Source, missing: int) -> tuple[list[Item], int]:
    if not items:
        lost = f"; {missing} paths of the table are not there" if missing else ""
        raise UserError(f"{source.path} holds no picture ({' '.join(PICTURES)}){lost}. Name other images.")
    unique = {item.name: item for item in items}
    return [unique[name] for name in sorted(unique)], missing


def _words(stem: str) -> str:
    return stem.replace("_", " ").replace("-", " ")


def _text(data: bytes) -> str:
    return data[:MAX_TEXT_BYTES].decode(errors="replace").strip()
