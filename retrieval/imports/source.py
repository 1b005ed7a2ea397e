"""Where vectors made elsewhere stand, and the names that their columns have.

`retrieval.imports.readers` reads what a `VectorSource` points to.
"""

import os
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from retrieval.config import Config
from retrieval.errors import UserError

Path = str | os.PathLike[str]


class SourceColumns(Config):
    """Names of a source's columns. Empty: the first of the usual names that is there, whatever its case."""

    vector: str = ""
    """Lists of floats, one length in all rows; by default the only such column."""
    image_id: str = ""
    """Whole numbers, or texts that `schema.image_id` makes numbers of; default image_id, sample_id."""
    url: str = ""
    """Address or path of the picture; default url, image_url, image_path, path, file_name."""
    caption: str = ""
    """Text to the picture; default caption, text."""
    license: str = ""
    """License of the picture."""
    width: str = ""
    """Pixels."""
    height: str = ""
    """Pixels."""


USUAL = {
    "vector": ("embedding", "vector", "image_embedding", "emb"),
    "image_id": ("image_id", "sample_id"),
    "url": ("url", "image_url", "image_path", "path", "file_name"),
    "caption": ("caption", "text"),
    "license": ("license",),
    "width": ("width",),
    "height": ("height",),
}


@dataclass(frozen=True)
class VectorSource:
    """Vectors made elsewhere, and what is known of their pictures."""

    vectors: npt.NDArray[np.generic] | Path
    """(n, dim) floats; or a .npy or .parquet file, a folder of these, or a folder of clip-retrieval."""
    metadata: pa.Table | Path | None = None
    """A row for each vector: a table, or a Parquet file (a folder of them) for each file of vectors."""
    columns: SourceColumns = field(default_factory=SourceColumns)
    """Names of the columns in use."""
    part: Literal["images", "texts"] = "images"
    """Which vectors of a clip-retrieval folder: those of its images or of its texts."""


def find_column(found: pa.Schema, columns: SourceColumns, word: str, where: str) -> str:
    """The source's name for a field of SourceColumns, or "" if it has none. Raises UserError for a missing one."""
    if given := getattr(columns, word):
        if given not in found.names:
            raise UserError(f"{where} has no column {given!r} for {word}; it has {', '.join(found.names)}")
        return str(given)
    lowered = {name.lower(): name for name in reversed(found.names)}
    return next((lowered[name] for name in USUAL[word] if name in lowered), "")


def known_columns(found: pa.Schema, columns: SourceColumns, where: str) -> list[str]:
    """The source's columns that a database has a use for, the vectors left aside."""
    names = [find_column(found, columns, word, where) for word in USUAL if word != "vector"]
    return [name for name in dict.fromkeys(names) if name]
