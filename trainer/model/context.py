"""The cross-attention context: the tokens that condition the UNet.

Takes CLIP vectors (of a prompt and of its neighbors) and returns a short sequence of unit vectors. Training,
sampling and evaluation share these functions. A context with fewer neighbors is shorter, not padded with
zeros: padding changed the output of a trained model by half as much as conditioning did.
"""

from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Vectors = npt.NDArray[np.float32]
Mode = Literal["text_and_neighbors", "neighbors", "text", "unconditional"]


def unit_rows(vectors: npt.NDArray[np.floating[Any]]) -> Vectors:
    """Rows normalized to length 1, (n, dim) float32. Raises ValueError for zero or non-finite rows."""
    rows = np.asarray(vectors, dtype=np.float32)
    lengths = np.linalg.norm(rows, axis=-1, keepdims=True)
    if not np.all(np.isfinite(lengths) & (lengths > 0)):
        raise ValueError("cannot normalize a vector of length zero or with non-finite values")
    return np.asarray(rows / lengths, dtype=np.float32)


def make_context(mode: Mode, query: Vectors, neighbors: Vectors) -> Vectors:
    """Tokens of one image: texts and images of the query first, then the neighbors (paper section 2.2).

    query: (q, dim), unused in the modes `neighbors` and `unconditional`; neighbors: (n, dim), n >= 0, unused in mode
    `text`. Returns (tokens, dim) unit rows. Raises ValueError if there are no tokens.
    """
    queries = [query] if mode in ("text", "text_and_neighbors") else []
    tokens = np.concatenate([*queries, *([] if mode == "text" else [neighbors])])
    if not len(tokens):
        raise ValueError(f"mode {mode} without neighbors gives an empty context")
    return unit_rows(tokens)
