"""Metadata of OpenImages: titles, authors and licences of its pictures.

Reads the CSV files with the columns ImageID, OriginalURL, License, Author and Title, such as
`train-images-boxable-with-rotation.csv` and `image_ids_and_rotation.csv`. They have up to nine million rows, so only
the rows of pictures that are there are kept.
"""

import csv
from collections.abc import Collection, Iterator
from pathlib import Path, PurePosixPath

from pipeline.databases.sources import SourcePicture
from retrieval.errors import UserError
from retrieval.storage.listing import safe_text

COLUMNS = {"Title": "caption", "License": "license", "Author": "artist", "OriginalURL": "source"}
"""The columns of OpenImages, by our field."""


def with_open_images(pictures: list[SourcePicture], folder: Path) -> list[SourcePicture]:
    """The pictures with their metadata from OpenImages' CSV files in a folder; others as they are.

    A picture is named `<ImageID>.jpg`. Empty titles leave the caption that it has. Raises UserError for a damaged file.
    """
    ids = {PurePosixPath(picture.name).stem for picture in pictures}
    rows = {row["ImageID"]: row for file in _files(folder) for row in _rows(file, ids)}
    described = []
    for picture in pictures:
        row = rows.get(PurePosixPath(picture.name).stem, {})
        fields = {field: safe_text(row[name].strip()) for name, field in COLUMNS.items() if row.get(name)}
        described.append(SourcePicture(**{**vars(picture), **{name: text for name, text in fields.items() if text}}))
    return described


def _files(folder: Path) -> Iterator[Path]:
    files = sorted(folder.glob("*.csv")) if folder.is_dir() else []
    return (file for file in files if {"ImageID", *COLUMNS} <= {*_header(file)})


def _header(file: Path) -> list[str]:
    """The columns of a CSV file; none if its beginning is no row, for example because a quote does not end."""
    with file.open(encoding="utf-8-sig", errors="replace", newline="") as lines:
        try:
            return next(csv.reader(lines), [])
        except csv.Error:
            return []


def _rows(file: Path, ids: Collection[str]) -> Iterator[dict[str, str]]:
    with file.open(encoding="utf-8-sig", errors="replace", newline="") as lines:
        try:
            yield from (row for row in csv.DictReader(lines) if row["ImageID"] in ids)
        except csv.Error as error:
            raise UserError(f"{file} is not a readable table: {error}. Download it again.") from error
