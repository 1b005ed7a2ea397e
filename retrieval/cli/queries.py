"""Turns queries (texts, pictures, files of vectors) into vectors. Loads torch only for texts and pictures."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from retrieval.database.database import Database
from retrieval.errors import UserError
from retrieval.imports.npy_files import check_array, load_own_npy
from retrieval.pictures.picture_file import read_picture
from retrieval.recipe import ClipConfig

if TYPE_CHECKING:
    from retrieval.clip.encoder import Encoder

log = logging.getLogger("search")

Array = npt.NDArray[np.generic]


@dataclass(frozen=True)
class QueryInputs:
    """The queries of one search, and the encoder of texts and pictures."""

    texts: list[str]
    images: list[Path]
    """Picture files."""
    vectors: list[str]
    """.npy files of one or more vectors."""
    clip: str = ""
    """Encoder of the texts and pictures: open_clip's model name, or local-dir:<folder>."""
    pretrained: str = ""
    """open_clip's tag or a checkpoint path."""


@dataclass(frozen=True)
class EncodedQueries:
    """Queries of one kind, which is a key of the calibration: name and vector (n, database.dim) of each."""

    like: str
    names: list[str]
    vectors: Array


def encode_queries(inputs: QueryInputs, database: Database, like: str) -> list[EncodedQueries]:
    """The queries: texts first, then pictures, then vectors. like: the kind of the vectors.

    Raises UserError if there is no query, a file cannot be read, the encoder is not that of the database, or
    vectors have another length.
    """
    queries = []
    if inputs.texts or inputs.images:
        pictures = [read_picture(path) for path in inputs.images]
        encoder = _load_encoder(inputs, database)
        if note := encoder.truncation_note(inputs.texts):
            log.warning(note)
        queries.append(EncodedQueries("texts", inputs.texts, encoder.encode_texts(inputs.texts)))
        queries.append(EncodedQueries("images", [*map(str, inputs.images)], encoder.encode_images(pictures)))
    for path in inputs.vectors:
        rows = read_vectors(path)
        if rows.shape[1] != database.dim:
            raise UserError(f"a query has length {rows.shape[1]}; vectors of {database.root.url} have {database.dim}")
        queries.append(EncodedQueries(like, [f"{path}[{i}]" for i in range(len(rows))], rows))
    queries = [each for each in queries if each.names]
    if not queries:
        raise UserError("nothing to search for: give a text, a picture or a vector")
    return queries


def read_vectors(path: str) -> Array:
    """The rows of a .npy file, (n, dim). A single vector becomes one row."""
    return check_array(np.atleast_2d(load_own_npy(path)), path)


def _load_encoder(inputs: QueryInputs, database: Database) -> "Encoder":
    identity = database.encoder
    if not inputs.clip:
        raise UserError(
            f"texts and pictures need the encoder of the database, {identity.model} "
            f"({identity.weights or 'weights unknown'}). Set --clip and --pretrained, or give vectors."
        )
    from retrieval.clip.encoder import Encoder

    encoder = Encoder(ClipConfig(model=inputs.clip, pretrained=inputs.pretrained))
    # A database of imported vectors may know only the name of its encoder.
    unknown = {} if identity.weights else {"weights": "", "preprocessing": identity.preprocessing}
    database.require_encoder(encoder.identity.model_copy(update=unknown))
    return encoder
