"""The cross-attention context: the tokens that condition the UNet.

Takes CLIP vectors (of a prompt and of its neighbors) and returns a short sequence of them. Training, sampling and
evaluation share these functions. A context with fewer neighbors is shorter, not padded with zeros: padding changed
the output of a trained model by half as much as conditioning did.

The length of a token belongs to the model (`model.context_norm`). The paper's LAION model was trained on vectors of
length 1, its ImageNet model on vectors as CLIP gives them. Databases and neighbor tables store unit vectors and,
beside them, their lengths.
"""

from typing import Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt

from retrieval.errors import UserError
from trainer.model.recipe import ContextNorm

Vectors = npt.NDArray[np.float32]
Float = TypeVar("Float", np.float16, np.float32)
Mode = Literal["text_and_neighbors", "neighbors", "text", "unconditional"]


def unit_rows(vectors: npt.NDArray[np.floating[Any]]) -> Vectors:
    """Rows normalized to length 1, (n, dim) float32. Raises ValueError for zero or non-finite rows."""
    rows = np.asarray(vectors, dtype=np.float32)
    lengths = np.linalg.norm(rows, axis=-1, keepdims=True)
    if not np.all(np.isfinite(lengths) & (lengths > 0)):
        raise ValueError("cannot normalize a vector of length zero or with non-finite values")
    return np.asarray(rows / lengths, dtype=np.float32)


def at_raw_norm(units: npt.NDArray[Float], norms: npt.NDArray[np.floating[Any]], source: str) -> npt.NDArray[Float]:
    """Unit vectors (..., dim) at the lengths that CLIP gave them, in their dtype. norms: (...), NaN if unknown.

    Raises UserError for an unknown length. source: where the vectors are stored, for the message.
    """
    if unknown := int(np.isnan(norms).sum()):
        raise UserError(
            f'{source} lacks the lengths of {unknown:,} of {norms.size:,} vectors, and model.context_norm is "raw". '
            "Build it from pictures, or from vectors that were not normalized."
        )
    return np.multiply(units, norms[..., None], out=np.empty_like(units), casting="same_kind")


def make_context(mode: Mode, query: Vectors, neighbors: Vectors, norm: ContextNorm = "unit") -> Vectors:
    """Tokens of one image: texts and images of the query first, then the neighbors (paper section 2.2).

    query: (q, dim), unused in the modes `neighbors` and `unconditional`; neighbors: (n, dim), n >= 0, unused in mode
    `text`; both at raw length for norm `raw`. Returns (tokens, dim): unit rows, or for `raw` the rows as they are.
    Raises ValueError if there are no tokens.
    """
    queries = [query] if mode in ("text", "text_and_neighbors") else []
    tokens = np.concatenate([*queries, *([] if mode == "text" else [neighbors])])
    if not len(tokens):
        raise ValueError(f"mode {mode} without neighbors gives an empty context")
    units = unit_rows(tokens)  # for `raw` too: raises for a row of zeros
    return units if norm == "unit" else tokens
