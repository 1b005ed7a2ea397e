"""Sources of style databases: folders of pictures, WebDataset tars, CSV or Parquet files with paths.

Lists the pictures of a source in a fixed order with their metadata. Supports the layouts of ArtBench-10 and
WikiArt: folders by style, optionally below train and test; file names such as `artist_title.jpg`; tables of
paths, with a header or as `style_train.csv` with `style_class.txt`.
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

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
SPLITS = ("train", "test", "val", "validation")
"""Folders that can contain the folders of the styles."""
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
"""Names of each field in a table or in the JSON files of a tar, in lower case, in order of preference."""
Fields = Mapping[str, Any]


@dataclass(frozen=True)
class PictureSource:
    """A collection of pictures, and settings for its layout."""

    path: Path
    """A folder of pictures or of tars, a tar, or a table (.csv, .parquet)."""
    images: Path | None = None
    """The folder that the paths of a table are relative to; None: the folder of the table."""
    artist_title: bool = False
    """Files are named `artist_title.jpg`, with hyphens between words."""
    license: str = ""
    """Licence of pictures without one in their metadata."""


@dataclass(frozen=True)
class SourcePicture:
    """A picture of a source and its metadata."""

    name: str
    """Path in the source, with / as separator."""
    file: Path
    label: str = ""
    """Style."""
    caption: str = ""
    title: str = ""
    artist: str = ""
    license: str = ""
    source: str = ""
    offset: int = 0
    size: int = -1
    """Position in the file in bytes; size -1: to the end of the file."""

    def read(self) -> bytes:
        """Read the bytes of the picture."""
        with self.file.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


def list_pictures(source: PictureSource) -> tuple[list[SourcePicture], int]:
    """The pictures of a source, sorted by name, and the number of paths in a table without a file.

    Raises UserError for a source that cannot be read or has no picture.
    """
    kind = source.path.suffix.lower()
    if source.path.is_dir():
        tars = sorted(source.path.glob("*.tar"))
        pictures = list(_from_tars(tars, source) if tars else _from_folder(source))
    elif kind == ".tar" and source.path.is_file():
        pictures = list(_from_tars([source.path], source))
    elif kind in (".csv", ".parquet") and source.path.is_file():
        return _from_table(source)
    else:
        raise UserError(f"{source.path} is no existing folder, .tar, .csv or .parquet. Check the path.")
    return _sorted_by_name(pictures, source, 0)


def _from_folder(source: PictureSource) -> Iterator[SourcePicture]:
    for path in sorted(source.path.rglob("*")):
        if path.suffix.lower() in SUFFIXES and path.is_file():
            caption = path.with_suffix(".txt")
            fields = {"caption": _text(caption.read_bytes())} if caption.is_file() else {}
            yield _picture(path.relative_to(source.path).as_posix(), path, fields, source)


def _from_tars(tars: Iterable[Path], source: PictureSource) -> Iterator[SourcePicture]:
    for path in tars:
        pictures: dict[str, tuple[str, tarfile.TarInfo]] = {}
        fields: dict[str, dict[str, Any]] = {}
        try:
            with tarfile.open(path, "r:") as tar:
                for member in tar:
                    folder, slash, base = member.name.rpartition("/")
                    stem, _, kind = base.partition(".")
                    key = f"{folder}{slash}{stem}"
                    if PurePosixPath(base).suffix.lower() in SUFFIXES:
                        pictures[member.name] = key, member
                    elif kind in ("txt", "cls", "json") and (file := tar.extractfile(member)):
                        fields.setdefault(key, {}).update(_member_fields(kind, file.read()))
        except tarfile.TarError as error:
            raise UserError(f"{path} is not a readable tar: {error}") from error
        for name, (key, member) in sorted(pictures.items()):
            position = (member.offset_data, member.size)
            yield _picture(f"{path.stem}/{name}", path, {"label": "", **fields.get(key, {})}, source, position)


def _member_fields(kind: str, data: bytes) -> dict[str, Any]:
    """The fields of a metadata member of a tar: a caption (txt), a class (cls) or a JSON object."""
    if kind != "json":
        return {"caption" if kind == "txt" else "label": _text(data)}
    try:
        content = json.loads(data)
    except ValueError:
        return {}
    return _read_fields(content) if isinstance(content, dict) else {}


def _from_table(source: PictureSource) -> tuple[list[SourcePicture], int]:
    base = (source.images or source.path.parent).resolve()
    rows = _rows(source.path)
    pictures = []
    for row in rows:
        fields = _read_fields(row)
        if "path" not in fields:
            raise UserError(f"{source.path} has no column of paths. Wanted: one of {', '.join(FIELDS['path'])}.")
        path = _find_file(base, fields, row)
        if path is not None:
            pictures.append(_picture(path.relative_to(base).as_posix(), path, fields, source))
    return _sorted_by_name(pictures, source, len(rows) - len(pictures))


def _rows(path: Path) -> list[dict[str, Any]]:
    try:
        if path.suffix.lower() == ".parquet":
            return [_lower_names(row) for row in pq.read_table(path).to_pylist()]
        text = path.read_text(encoding="utf-8-sig")
    except (pa.ArrowInvalid, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a readable table: {error}") from error
    first = next(csv.reader(io.StringIO(text)), [""])
    if PurePosixPath(first[0]).suffix.lower() not in SUFFIXES:
        return [_lower_names(row) for row in csv.DictReader(io.StringIO(text))]
    classes = _classes(path)
    lines = csv.DictReader(io.StringIO(text), ("path", "label"))
    return [{"path": row["path"], "label": classes.get(row["label"] or "", "")} for row in lines]


def _classes(path: Path) -> dict[str, str]:
    """Names of the styles by number, from lines such as `3 Baroque` in `style_class.txt`."""
    classes = path.with_name(f"{path.stem.rpartition('_')[0]}_class.txt")
    lines = classes.read_text().splitlines() if classes.is_file() else []
    return {number: name.strip() for number, _, name in (line.strip().partition(" ") for line in lines)}


def _lower_names(row: Mapping[str | None, Any]) -> dict[str, Any]:
    return {name.strip().lower(): value for name, value in row.items() if name}


def _read_fields(row: Fields) -> dict[str, Any]:
    """The FIELDS of a row as stripped strings, without empty ones."""
    row = {name.lower(): value for name, value in row.items()}
    fields: dict[str, str] = {}
    for field, names in FIELDS.items():
        kind = str if field == "path" else object  # a column `image` can also contain pictures
        present = [row[name] for name in names if row.get(name) not in (None, "")]
        values = [str(value).strip() for value in present if isinstance(value, kind)]
        fields |= {field: values[0]} if values else {}
    if "license" not in fields and str(row.get("is_public_domain")).lower() in ("true", "1"):
        fields["license"] = "public domain"
    return fields


def _find_file(base: Path, fields: Fields, row: Fields) -> Path | None:
    """The file of a row: at its path below base, the folder of its style, or of its split and style."""
    label, split = fields.get("label", ""), str(row.get("split") or "")
    for folder in ("", label, f"{split}/{label}"):
        try:
            path: Path = (base / folder / fields["path"]).resolve()
            if path.is_relative_to(base) and path.is_file():
                return path
        except (OSError, ValueError):  # an impossible path: too long, or with a zero byte
            continue
    return None


def _picture(
    name: str, file: Path, fields: Fields, source: PictureSource, position: tuple[int, int] = (0, -1)
) -> SourcePicture:
    stem = PurePosixPath(name).stem
    artist, title = fields.get("artist", ""), fields.get("title", "")
    if source.artist_title and "_" in stem:
        first, _, rest = stem.partition("_")
        artist, title = artist or _words(first), title or _words(rest)
    title_and_artist = f"{title} by {artist}" if title and artist else title
    folders = [part for part in PurePosixPath(name).parts[:-1] if part not in SPLITS]
    return SourcePicture(
        name=name,
        file=file,
        label=fields.get("label", folders[0] if folders else ""),
        caption=fields.get("caption") or title_and_artist or _words(stem),
        title=title,
        artist=artist,
        license=fields.get("license") or source.license,
        source=fields.get("source", ""),
        offset=position[0],
        size=position[1],
    )


def _sorted_by_name(
    pictures: list[SourcePicture], source: PictureSource, missing: int
) -> tuple[list[SourcePicture], int]:
    if not pictures:
        note = f"; {missing} paths of the table do not exist" if missing else ""
        raise UserError(f"{source.path} has no picture ({' '.join(SUFFIXES)}){note}. Use another source.")
    unique = {picture.name: picture for picture in pictures}
    return [unique[name] for name in sorted(unique)], missing


def _words(stem: str) -> str:
    return stem.replace("_", " ").replace("-", " ")


def _text(data: bytes) -> str:
    return data[:MAX_TEXT_BYTES].decode(errors="replace").strip()
