"""Examples of the page: captions of the databases that the loaded CLIP knows.

A caption counts as known if CLIP finds its own picture with it, among a sample of rows.
"""

from collections.abc import Iterable

import numpy as np

from retrieval.clip.encoder import Encoder
from retrieval.database.database import Database
from retrieval.index.routing import Vectors

CANDIDATES = 48
"""Rows that are compared, of one partition: reading all could fetch a large database from its object store."""
EXAMPLES = 4
MAX_CHARACTERS = 80


def example_captions(databases: Iterable[Database], encoder: Encoder) -> list[str]:
    """At most EXAMPLES captions of the first database with such captions, the best first; empty if none has any."""
    for database in databases:
        captions, vectors = candidates(database)
        if len(captions) > 1 and (known := known_captions(captions, encoder.encode_texts(captions), vectors)):
            return known
    return []


def candidates(database: Database) -> tuple[list[str], Vectors]:
    """Different captions (n,) of visible rows of the first filled partition, and the vectors (n, dim) of the rows."""
    filled = np.flatnonzero(database.partition_rows)
    if not len(filled):
        return [], np.empty((0, database.dim), np.float32)
    count = int(database.partition_rows[filled[0]])
    rows = np.unique(np.linspace(0, count - 1, CANDIDATES).astype(np.int64)) + database.first_position(int(filled[0]))
    ids, vectors = database.rows_at(rows)
    captions = [" ".join(caption.split()) for caption in database.metadata_at(rows)["caption"].to_pylist()]
    is_visible = ~np.isin(ids, database.hidden)
    first: dict[str, int] = {}
    for row, caption in enumerate(captions):
        if is_visible[row] and is_example(caption):
            first.setdefault(caption, row)
    return [*first], vectors[[*first.values()]]


def is_example(caption: str) -> bool:
    """True for a short text with a letter: a picture of a folder may have only its number as caption."""
    return len(caption) <= MAX_CHARACTERS and any(map(str.isalpha, caption))


def known_captions(captions: list[str], texts: Vectors, pictures: Vectors) -> list[str]:
    """At most EXAMPLES captions (n,) that are nearest to their own pictures, the most similar first.

    texts, pictures: (n, dim) unit rows of the captions and of their pictures.
    """
    similarities = texts @ pictures.T
    known = np.flatnonzero(similarities.argmax(axis=1) == np.arange(len(captions)))
    best = known[np.argsort(-similarities[known, known], kind="stable")]
    return [captions[row] for row in best[:EXAMPLES]]
