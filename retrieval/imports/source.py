"""Describes vectors of another tool: where they are, and how their columns are named."""

import os
import warnings
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import Field

from retrieval.config import Config
from retrieval.errors import UserError
from retrieval.storage.arrow_columns import plain_type
from retrieval.storage.schema import further_name, is_further

Path = str | os.PathLike[str]


class SourceColumns(Config):
    """Names of a source's columns. Empty: the first of the default names that exists, in any case."""

    vector: str = ""
    """Lists of floats of equal length; default: the only such column."""
    image_id: str = ""
    """Whole numbers, or texts that `schema.image_id` turns into numbers; default image_id, sample_id."""
    url: str = ""
    """URL or path of the picture; default url, image_url, image_path, path, file_name."""
    caption: str = ""
    """Caption of the picture; default caption, text."""
    license: str = ""
    """License of the picture."""
    width: str = ""
    """Pixels."""
    height: str = ""
    """Pixels."""


DEFAULT_NAMES = {
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
    """Vectors of another tool, and the metadata of their pictures."""

    vectors: npt.NDArray[np.generic] | Path
    """(n, dim) floats; or a .npy or .parquet file, a folder of these, or clip-retrieval's output folder."""
    metadata: pa.Table | Path | None = None
    """One row per vector: a table for an array, or one Parquet file per file of vectors (or their folder)."""
    columns: SourceColumns = field(default_factory=SourceColumns)
    """Names of the columns."""
    part: Literal["images", "texts"] = "images"
    """Vectors to read from a clip-retrieval folder."""
    text_queries: npt.NDArray[np.generic] | Path | None = None
    """Vectors of typical texts, (n, dim) or a .npy file, to measure the recall of searches for texts. Default: those
    of a clip-retrieval folder, if it has any."""


class VectorsConfig(Config):
    """Vectors of another tool that `index` takes in place of those of `embed` (section `vectors` of a recipe).

    The encoder of `[clip]` must have made them.
    """

    source: str = Field(min_length=1)
    """A .npy or Parquet file, a folder of these, or clip-retrieval's output folder; a path or a URL."""
    metadata: str = ""
    """Parquet files of the metadata of .npy files, one for each, or their folder. Empty: none, or for clip-retrieval's
    folder its own."""
    columns: SourceColumns = SourceColumns()
    """Names of the columns."""

    def vector_source(self) -> VectorSource:
        """The source that these settings describe."""
        return VectorSource(self.source, self.metadata or None, self.columns)


def find_column(table: pa.Schema, columns: SourceColumns, field_name: str, location: str) -> str:
    """The source's column for a field of SourceColumns, or "" if there is none.

    Raises UserError if `columns` names a column that does not exist, or if there are several of this name.
    location: the file, for the message.
    """
    if name := getattr(columns, field_name):
        if name not in table.names:
            raise UserError(f"{location} has no column {name!r} for {field_name}; it has {', '.join(table.names)}")
    else:
        lowered = {name.lower(): name for name in reversed(table.names)}
        name = next((lowered[name] for name in DEFAULT_NAMES[field_name] if name in lowered), "")
    if table.names.count(name) > 1:
        raise UserError(f"{location} has {table.names.count(name)} columns {name!r}. Rename or remove all but one.")
    return str(name)


def metadata_columns(table: pa.Schema, columns: SourceColumns, location: str) -> list[str]:
    """The source's columns that go into a database, without the vectors."""
    names = [find_column(table, columns, name, location) for name in DEFAULT_NAMES if name != "vector"]
    return [name for name in dict.fromkeys([*names, *further_columns(table, columns, location)]) if name]


def further_columns(table: pa.Schema, columns: SourceColumns, location: str) -> list[str]:
    """The source's columns that a database keeps besides those of SourceColumns: all of plain types, not twice.

    Warns of columns of other types.
    """
    used = {find_column(table, columns, name, location) for name in DEFAULT_NAMES if name != "vector"}
    fields = [field for field in table if field.name not in used and table.names.count(field.name) == 1]
    stored = {field.name: pa.field(further_name(field.name), further_type(field.type)) for field in fields}
    names = [name for name, field in stored.items() if is_further(field) or pa.types.is_null(field.type)]
    others = [f"{field.name} ({field.type})" for field in fields if field.name not in names]
    if others:
        warnings.warn(
            f"{location}: left out, because a database keeps only further columns of texts, numbers, truth values, "
            f"times, and lists of texts or integers: {', '.join(others)}. Convert these columns to keep them.",
            UserWarning,
            stacklevel=2,
        )
    return names


def further_type(kind: pa.DataType) -> pa.DataType:
    """The type in a database of a further column. Arrow compares no float16 numbers, so conditions need wider ones."""
    kind = plain_type(kind)
    if pa.types.is_decimal(kind):
        return pa.float64()
    return pa.float32() if pa.types.is_float16(kind) else kind
