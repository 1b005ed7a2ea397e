"""The cross-attention context: what the UNet is told about the picture it should make.

Takes CLIP vectors (a prompt's, k neighbors'), gives a short sequence of unit tokens. Training, sampling
and evaluation share these functions, so that a token means the same in all three. A context with fewer
neighbors is shorter, never filled up with zeros: that moves the output by half the effect of
conditioning (DESIGN section 8).
"""

from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Vectors = npt.NDArray[np.float32]
Mode = Literal["text_and_neighbors", "neighbors", "text", "unconditional"]


def unit_rows(vectors: npt.NDArray[np.floating[Any]]) -> Vectors:
    """Rows scaled to length 1, float32. vectors: (n, dim). Raises ValueError for a row without direction."""
    rows = np.asarray(vectors, dtype=np.float32)
    lengths = np.linalg.norm(rows, axis=-1, keepdims=True)
    if not np.all(np.isfinite(lengths) & (lengths > 0)):
        raise ValueError("a vector of length zero or with a value that is not finite has no direction")
    return np.asarray(rows / lengths, dtype=np.float32)


def make_context(mode: Mode, query: Vectors, neighbors: Vectors) -> Vectors:
    """Tokens of one picture: the text and images first, then the neighbors (paper section 2.2).

    query: (q, dim), not said in the modes `neighbors` and `unconditional`; neighbors: (n, dim), n >= 0, not
    said in mode `text`. Returns (tokens, dim) unit rows. Raises ValueError where nothing is left to say.
    """
    parts = [query] if mode in ("text", "text_and_neighbors") else []
    tokens = np.concatenate([*parts, *([] if mode == "text" else [neighbors])])
    if not len(tokens):
        raise ValueError(f"mode {mode} with no neighbors leaves an empty context")
    return unit_rows(tokens)
