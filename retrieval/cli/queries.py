"""Queries of every kind (texts, pictures, vectors in files) as vectors that one database can be asked.

torch is loaded here alone, and only for texts and pictures.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from retrieval.cli.contact_sheet import read_picture
from retrieval.database.database import Database
from retrieval.errors import UserError
from retrieval.imports.readers import check_array, load_npy, split_path
from retrieval.recipe import ClipConfig

if TYPE_CHECKING:
    from retrieval.clip.encoder import Encoder

Array = npt.NDArray[np.generic]


@dataclass(frozen=True)
class Asked:
    """What somebody wants to search for."""

    texts: list[str]
    images: list[Path]
    """Files of pictures."""
    vectors: list[str]
    """.npy files of one vector or several."""
    clip: str = ""
    """Encoder of the texts and pictures: open_clip's name, or local-dir:<folder>."""
    pretrained: str = ""
    """open_clip's tag or a checkpoint path."""


def encode(asked: Asked, database: Database) -> tuple[list[str], Array]:
    """The queries as people call them, and as (n, database.dim) rows: texts, then pictures, then vectors.

    Raises UserError for no query, an unreadable file, another encoder or vectors of another length.
    """
    names = [*asked.texts, *map(str, asked.images)]
    vectors: list[Array] = []
    if names:
        pictures = [read_picture(path) for path in asked.images]
        encoder = _encoder(asked, database)
        vectors += [encoder.encode_texts(asked.texts), encoder.encode_images(pictures)]
    for path in asked.vectors:
        rows = read_vectors(path)
        names += [f"{path}[{i}]" for i in range(len(rows))]
        vectors.append(rows)
    if not names:
        raise UserError("nothing to search for: give a text, a picture or a vector")
    for rows in vectors:
        if rows.shape[1] != database.dim:
            raise UserError(
                f"a query has length {rows.shape[1]}; {database.root.url} has vectors of {database.dim}"
            )
    return names, np.concatenate(vectors)


def read_vectors(path: str) -> Array:
    """The rows of a .npy file, (n, dim); a single vector is one row."""
    root, name = split_path(path)
    return check_array(np.atleast_2d(load_npy(root, name)), path)


def _encoder(asked: Asked, database: Database) -> "Encoder":
    made_by = database.encoder
    if not asked.clip:
        raise UserError(
            f"texts and pictures must be encoded as the rows were, by {made_by.model} "
            f"({made_by.weights or 'weights unknown'}): name it with --clip and --pretrained, or give vectors"
        )
    from retrieval.clip.encoder import Encoder

    encoder = Encoder(ClipConfig(model=asked.clip, pretrained=asked.pretrained))
    # Who built from another tool's vectors may know no more of their encoder than its name.
    unknown = {} if made_by.weights else {"weights": "", "preprocessing": made_by.preprocessing}
    database.require_encoder(encoder.identity.model_copy(update=unknown))
    return encoder
