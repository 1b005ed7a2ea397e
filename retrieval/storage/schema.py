"""Every column of every table, spelled once, with the checks that run on write and on open.

Also the closed vocabulary of reasons for which a row is not kept, and the 64-bit image id.
"""

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
NEIGHBOR_IDS = "neighbor_ids"
SIMILARITIES = "similarities"
NEIGHBOR_EMBEDDINGS = "neighbor_embeddings"
MOMENTS = "moments"
SPLITS = ("train", "database")
REPEATING = ["license", "reason", "message"]
"""Columns whose values repeat. Dictionaries of the others cost a third of the time and only grow the file."""


class Reason(StrEnum):
    """Why a row was not kept. Every refused row carries exactly one of these words."""

    # filter
    BAD_URL = "bad_url"
    NO_SCORE = "no_score"
    BAD_SIZE = "bad_size"
    UNSAFE = "unsafe"
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
    TOO_SMALL = "too_small"
    # embed
    UNREADABLE = "unreadable"
    DUPLICATE_CONTENT = "duplicate_content"
    NEAR_COPY = "near_copy"
    # vectors from elsewhere
    BAD_VECTOR = "bad_vector"
    DUPLICATE_ID = "duplicate_id"
    # neighbors
    TOO_FEW_NEIGHBORS = "too_few_neighbors"


SELECTED = pa.schema(
    [
        pa.field(IMAGE_ID, pa.int64(), nullable=False),
        pa.field("url", pa.string(), nullable=False),
        pa.field("caption", pa.string(), nullable=False),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
        pa.field("similarity", pa.float32()),
        pa.field("pwatermark", pa.float32()),
        pa.field("punsafe", pa.float32()),
        pa.field("license", pa.string()),
    ]
)
"""Rows that filter keeps: width and height in pixels as the metadata states them."""

DOWNLOADED = pa.schema(
    [
        pa.field(IMAGE_ID, pa.int64(), nullable=False),
        pa.field("url", pa.string(), nullable=False),
        pa.field("caption", pa.string(), nullable=False),
        pa.field("license", pa.string()),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("message", pa.string(), nullable=False),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
        pa.field("original_width", pa.int32(), nullable=False),
        pa.field("original_height", pa.int32(), nullable=False),
        pa.field("sha256", pa.string(), nullable=False),
        pa.field("phash", pa.int64(), nullable=False),
    ]
)
"""One row per URL: reason is empty for an image that was stored, sizes in pixels (0 where unknown),
sha256 in hex of the bytes as the server sent them (empty where none came), phash of the picture as
decoded (retrieval.perceptual_hash; 0 where there is none)."""

METADATA = pa.schema(
    [
        pa.field(IMAGE_ID, pa.int64(), nullable=False),
        pa.field("url", pa.string(), nullable=False),
        pa.field("caption", pa.string(), nullable=False),
        pa.field("license", pa.string()),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
    ]
)
"""What a database shows beside a neighbor."""

BOX = "box"
DETAILS = pa.schema(
    [
        pa.field("title", pa.string()),
        pa.field("artist", pa.string()),
        pa.field("source", pa.string()),
        pa.field(BOX, pa.list_(pa.int32(), 4)),
    ]
)
"""Columns with which METADATA and embeddings may end. source: where a picture came from; box: x, y, width and
height, in pixels of the picture as stored, of the part that a row stands for."""


def embeddings(dim: int) -> pa.Schema:
    """Rows of `embed`: the id and its unit vector, float16."""
    return METADATA.append(pa.field(EMBEDDING, pa.list_(pa.float16(), dim), nullable=False))


def neighbors(k: int, dim: int) -> pa.Schema:
    """Rows of `neighbors`, best first; the k embeddings stand one after another."""
    return pa.schema(
        [
            pa.field(IMAGE_ID, pa.int64(), nullable=False),
            pa.field(NEIGHBOR_IDS, pa.list_(pa.int64(), k), nullable=False),
            pa.field(SIMILARITIES, pa.list_(pa.float32(), k), nullable=False),
            pa.field(NEIGHBOR_EMBEDDINGS, pa.list_(pa.float16(), k * dim), nullable=False),
        ]
    )


def latents(length: int) -> pa.Schema:
    """Rows of `latents`: `views` x (mean, standard deviation) x channels x height x width, float16, flat."""
    return pa.schema(
        [
            pa.field(IMAGE_ID, pa.int64(), nullable=False),
            pa.field(MOMENTS, pa.list_(pa.float16(), length), nullable=False),
        ]
    )


def image_id(name: str) -> int:
    """The int64 id of an image: the first 64 bits of SHA-256 of its canonical URL or relative path.

    >>> image_id("http://example.org/a.jpg")
    -2724313939254161307
    """
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little", signed=True)


def check(table: pa.Table, wanted: pa.Schema, where: str) -> pa.Table:
    """The table, if it has just the wanted columns, types and no nulls where none may be; else UserError.

    Those of DETAILS may follow.
    """
    if not table.schema.equals(wanted) and not table.schema.equals(pa.schema([*wanted, *DETAILS])):
        raise UserError(
            f"{where} has columns\n{table.schema}\nbut\n{wanted}\nwas wanted. Run the stage that wrote it."
        )
    for column in wanted:
        if not column.nullable and table[column.name].null_count:
            raise UserError(
                f"{where}: column {column.name} has {table[column.name].null_count} nulls; none may be."
            )
    return table


def write_table(root: Root, name: str, table: pa.Table, wanted: pa.Schema) -> FileRecord:
    """Check a table and write it as Parquet (zstd), atomically."""
    check(table, wanted, root.at(name))
    with root.writing(name) as pending:
        pq.write_table(
            table, pending.path, compression="zstd", row_group_size=10_000, use_dictionary=REPEATING
        )
    return pending.record


def read_table(root: Root, name: str, wanted: pa.Schema) -> pa.Table:
    """Read a Parquet table and check it. Raises UserError for a missing, damaged or different file."""
    with root.open(name) as file:
        try:
            table = pq.read_table(file)
        except (pa.ArrowInvalid, OSError) as error:
            raise UserError(
                f"{root.at(name)} is not a readable Parquet file: {error}. Remove it and run again."
            ) from error
    return check(table, wanted, root.at(name))


def vectors(table: pa.Table, column: str) -> npt.NDArray[np.float16]:
    """A fixed-size list column as an array (rows, length), without a copy where the table has one chunk."""
    lists = table[column].combine_chunks()
    length = lists.type.list_size
    return np.asarray(lists.flatten().to_numpy(zero_copy_only=False)).reshape(-1, length)


def fixed_lists(array: npt.NDArray[np.generic]) -> pa.FixedSizeListArray:
    """An array (rows, length) as a fixed-size list column of its own dtype."""
    flat = pa.array(np.ascontiguousarray(array).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, array.shape[1])
