"""The columns of all tables, checked on write and on read; reasons for left-out rows; image ids."""

import hashlib
from enum import StrEnum

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from retrieval.errors import UserError
from retrieval.storage.root import FileRecord, Root

VERSION = 1

IMAGE_ID = "image_id"
EMBEDDING = "embedding"
NORM = "norm"
NEIGHBOR_IDS = "neighbor_ids"
SIMILARITIES = "similarities"
NEIGHBOR_EMBEDDINGS = "neighbor_embeddings"
NEIGHBOR_NORMS = "neighbor_norms"
MOMENTS = "moments"
TAR_OFFSET = "tar_offset"
TAR_BYTES = "tar_bytes"
SPLITS = ("train", "database")
REPEATING = ["language", "license", "reason", "message"]
"""Columns with few distinct values: only these are dictionary-encoded. Dictionaries of the others take a third of
the writing time and enlarge the file."""


class Reason(StrEnum):
    """Why a row was left out. Every row that is left out has exactly one reason."""

    # filter
    BAD_ROW = "bad_row"
    BAD_URL = "bad_url"
    NO_SCORE = "no_score"
    BAD_SIZE = "bad_size"
    UNSAFE = "unsafe"
    LOW_SIMILARITY = "low_similarity"
    LOW_AESTHETIC = "low_aesthetic"
    OTHER_LANGUAGE = "other_language"
    ASPECT_RATIO = "aspect_ratio"
    CAPTION_LENGTH = "caption_length"
    NOT_SAMPLED = "not_sampled"
    BLOCKED = "blocked"
    DUPLICATE_URL = "duplicate_url"
    # download
    REFUSED_ADDRESS = "refused_address"
    NOT_FOUND = "not_found"
    HTTP_ERROR = "http_error"
    UNAVAILABLE = "unavailable"
    NO_CONNECTION = "no_connection"
    TIMEOUT = "timeout"
    TOO_MANY_REDIRECTS = "too_many_redirects"
    TOO_LARGE = "too_large"
    TOO_MANY_PIXELS = "too_many_pixels"
    OPTED_OUT = "opted_out"
    DISALLOWED = "disallowed"
    NOT_AN_IMAGE = "not_an_image"
    TRUNCATED = "truncated"
    CHECKSUM_MISMATCH = "checksum_mismatch"
    TOO_SMALL = "too_small"
    BAD_FACE_BOXES = "bad_face_boxes"
    # embed
    UNREADABLE = "unreadable"
    DUPLICATE_CONTENT = "duplicate_content"
    NEAR_COPY = "near_copy"
    HIGH_SCORE = "high_score"
    LOW_SCORE = "low_score"
    # vectors of another tool
    BAD_VECTOR = "bad_vector"
    DUPLICATE_ID = "duplicate_id"
    # neighbors
    TOO_FEW_NEIGHBORS = "too_few_neighbors"


def columns(types: dict[str, pa.DataType], nullable: bool = False) -> list[pa.Field]:
    """Columns in this order, by name and type."""
    return [pa.field(name, type_, nullable=nullable) for name, type_ in types.items()]


_IMAGE = columns({IMAGE_ID: pa.int64(), "url": pa.string(), "caption": pa.string()})
_SIZE = columns({"width": pa.int32(), "height": pa.int32()})
_LICENSE = columns({"license": pa.string()}, nullable=True)
SCORES = ("similarity", "pwatermark", "punsafe", "aesthetic")
"""Scores of a picture in the metadata."""
_SCORES = columns(dict.fromkeys(SCORES, pa.float32()) | {"language": pa.string()}, nullable=True)
FURTHER_DOWNLOADED = [field.name for field in _SCORES]
"""Columns of DOWNLOADED that follow METADATA in a database, see `further_name`."""
_FOR_DOWNLOAD = columns({"checksum": pa.string(), "face_boxes": pa.string()}, nullable=True)
ADDED = ("face_boxes", TAR_OFFSET, TAR_BYTES)
"""Columns that files of earlier versions lack: they are read as null."""
_OUTCOME = columns({"reason": pa.string(), "message": pa.string()})
_ORIGINAL_SIZE = columns({"original_width": pa.int32(), "original_height": pa.int32()})
_HASHES = columns({"sha256": pa.string(), "phash": pa.int64()})
_TAR_RANGE = columns({TAR_OFFSET: pa.int64(), TAR_BYTES: pa.int64()}, nullable=True)

SELECTED = pa.schema([*_IMAGE, *_SIZE, *_SCORES, *_LICENSE, *_FOR_DOWNLOAD])
"""Rows that `filter` keeps. width, height: pixels according to the metadata; checksum: of the file according to the
metadata, `sha256:` or `md5:` and hex digits; face_boxes: of `pipeline.pictures.faces`, as JSON."""

FROM_METADATA = [field.name for field in (*_IMAGE, *_SCORES, *_LICENSE, *_FOR_DOWNLOAD)]
"""The columns that SELECTED and DOWNLOADED have in common: `filter` fills them from the metadata."""

DOWNLOADED = pa.schema(
    [*_IMAGE, *_SCORES, *_LICENSE, *_FOR_DOWNLOAD, *_OUTCOME, *_SIZE, *_ORIGINAL_SIZE, *_HASHES, *_TAR_RANGE]
)
"""One row per URL. Its first columns are FROM_METADATA. reason: empty for a stored image; sizes: pixels, 0 if unknown;
sha256: hex, of the bytes that the server sent, empty if none; phash: retrieval.perceptual_hash of the decoded picture,
0 if none; tar_offset, tar_bytes: where the shard's tar has the picture, null without a stored image."""

METADATA = pa.schema([*_IMAGE, *_LICENSE, *_SIZE, pa.field(NORM, pa.float32())])
"""Metadata of an image in a database. norm: length of its CLIP vector before normalization, null if unknown."""

BOX = "box"
_DETAIL_TYPES = {"title": pa.string(), "artist": pa.string(), "source": pa.string(), BOX: pa.list_(pa.int32(), 4)}
DETAILS = pa.schema(columns(_DETAIL_TYPES, nullable=True))
"""Optional last columns of METADATA and embeddings. source: origin of the picture; box: x, y, width, height
of the part of the picture that a row describes, in pixels of the stored picture. Any other columns for which
`is_further` holds may follow METADATA too, for conditions of searches."""

SCORE = "score_"
"""Begins the names of further columns, float32, with the scores of the recipe's heads."""


RESULT_COLUMNS = ("query", "rank", "similarity", "position")
"""Columns of a result besides those of METADATA."""
_RESERVED = {*METADATA.names, EMBEDDING, *RESULT_COLUMNS}


def further_name(name: str) -> str:
    """The name of another column in a database: `source_` precedes the names of METADATA and of results.

    >>> further_name("similarity"), further_name("aesthetic")
    ('source_similarity', 'aesthetic')
    """
    return f"source_{name}" if name in _RESERVED else name


def is_further(field: pa.Field) -> bool:
    """Whether a column may follow METADATA: nullable, of texts, numbers, truth values, times, lists of texts or of
    integers."""
    if field.name in DETAILS.names:
        return bool(field == DETAILS.field(field.name))
    kind, types = field.type, pa.types
    is_list_of_floats = types.is_list(kind) and types.is_floating(kind.value_type)  # a vector
    kind = kind.value_type if types.is_list(kind) else kind
    is_number = types.is_integer(kind) or types.is_floating(kind)
    is_value = is_number or kind == pa.string() or types.is_boolean(kind) or types.is_temporal(kind)
    return field.nullable and field.name not in _RESERVED and bool(is_value and not is_list_of_floats)


def embeddings(dim: int) -> pa.Schema:
    """Rows of `embed`: METADATA and the unit vector of each image, float16."""
    return METADATA.append(pa.field(EMBEDDING, pa.list_(pa.float16(), dim), nullable=False))


def neighbors(k: int, dim: int) -> pa.Schema:
    """Rows of `neighbors`: the k neighbors of each image, best first, with k x dim unit vectors and k lengths.

    A length is that of the CLIP vector before normalization, NaN if unknown.
    """
    lists = {NEIGHBOR_IDS: pa.list_(pa.int64(), k), SIMILARITIES: pa.list_(pa.float32(), k)}
    vectors = {NEIGHBOR_EMBEDDINGS: pa.list_(pa.float16(), k * dim), NEIGHBOR_NORMS: pa.list_(pa.float32(), k)}
    return pa.schema(columns({IMAGE_ID: pa.int64(), **lists, **vectors}))


def latents(length: int) -> pa.Schema:
    """Rows of `latents`: `views` x (mean, standard deviation) x channels x height x width, float16, flat."""
    return pa.schema(columns({IMAGE_ID: pa.int64(), MOMENTS: pa.list_(pa.float16(), length)}))


def image_id(name: str) -> int:
    """The int64 id of an image: the first 64 bits of the SHA-256 of its canonical URL or relative path.

    >>> image_id("http://example.org/a.jpg")
    -2724313939254161307
    """
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little", signed=True)


def sample_key(image_id: int) -> str:
    """The name of an image in a tar: the 64 bits of its id in hex.

    >>> sample_key(-1)
    'ffffffffffffffff'
    """
    return f"{image_id & (1 << 64) - 1:016x}"


PICTURE_SUFFIXES = (".jpg", ".webp")
"""Of the stored pictures in tars, behind their `sample_key`."""


def check_table(table: pa.Table, schema: pa.Schema, path: str) -> pa.Table:
    """The table. Raises UserError unless it has the columns, types and non-null columns of the schema.

    Columns of `is_further` with different names may follow those of METADATA. path: of its file, for the message.
    """
    further = [*table.schema][len(schema) :]
    may_follow = [*schema][: len(METADATA)] == [*METADATA] and all(map(is_further, further))
    is_wanted = [*table.schema][: len(schema)] == [*schema] and len({*table.schema.names}) == len(table.schema)
    if not is_wanted or (further and not may_follow):
        raise UserError(
            f"{path} has columns\n{table.schema}\nbut\n{schema}\nwas expected. Run the stage that wrote it."
        )
    for column in schema:
        if not column.nullable and (nulls := table[column.name].null_count):
            raise UserError(f"{path}: column {column.name} has {nulls} nulls; expected none.")
    return table


def write_table(root: Root, name: str, table: pa.Table, schema: pa.Schema) -> FileRecord:
    """Check a table and write it as a Parquet file (zstd)."""
    check_table(table, schema, root.at(name))
    with root.writing(name) as pending:
        pq.write_table(table, pending.path, compression="zstd", row_group_size=10_000, use_dictionary=REPEATING)
    return pending.record


def read_table(root: Root, name: str, schema: pa.Schema, columns: list[str] | None = None) -> pa.Table:
    """Read a Parquet file and check it. Raises UserError if it is missing, damaged or has another schema.

    columns: only these, in the order of the schema.
    """
    schema = schema if columns is None else pa.schema([schema.field(column) for column in columns])
    with root.open(name) as file:
        try:
            table = pq.ParquetFile(file, pre_buffer=True).read(columns)  # without those of ADDED that the file lacks
        except (pa.ArrowInvalid, OSError) as error:
            raise UserError(
                f"{root.at(name)} is not a readable Parquet file: {error}. Remove it and run again."
            ) from error
    for number, field in enumerate(schema):
        if field.name in ADDED and field.name not in table.column_names:
            table = table.add_column(number, field, pa.nulls(len(table), field.type))
    return check_table(table, schema, root.at(name))


def vectors(table: pa.Table, column: str) -> npt.NDArray[np.float16]:
    """A fixed-size list column as an array (rows, length). Copies only if the table has several chunks."""
    chunks = table[column]
    lists = chunks.chunk(0) if chunks.num_chunks == 1 else chunks.combine_chunks()  # which copies one chunk too
    length = lists.type.list_size
    return np.asarray(lists.flatten().to_numpy(zero_copy_only=False)).reshape(-1, length)


def fixed_lists(array: npt.NDArray[np.generic]) -> pa.FixedSizeListArray:
    """An array (rows, length) as a fixed-size list column of the same dtype."""
    flat = pa.array(np.ascontiguousarray(array).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, array.shape[1])
