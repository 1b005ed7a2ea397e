"""Vectors that are hard in the way CLIP's are, made from a seed: there is no download here to take them from.

Rows lie in a cone about a mean, in clusters within topics whose sizes follow Zipf's law, with a spectrum
that falls as 1/i in a basis no axis is aligned with; some rows are near copies of others. Queries come
from the same mixture (images) or from beside it (texts): a text points where its image does, weakly,
from across a gap.
"""

from dataclasses import dataclass

import numpy as np

from retrieval.index.routing import Vectors, unit

DIM = 768
TOPICS, CLUSTERS = 300, 20_000
ZIPF = 0.8
CONE = 0.65
"""Length of the mean before normalization; the rest is about 0.76 long, so two images are 0.42 alike."""
COPIES = 0.03
COPY_NOISE = 0.15
"""Length of the noise on a copy: its cosine to the original is about 0.99."""
BLOCK_ROWS = 1 << 16


@dataclass(frozen=True)
class Mixture:
    """What images and texts are drawn from."""

    basis: Vectors
    """(DIM, DIM): an orthogonal basis, scaled by the spectrum."""
    image_mean: Vectors
    text_mean: Vectors
    topics: Vectors
    """(TOPICS, DIM) in coordinates of the basis."""
    clusters: Vectors
    """(CLUSTERS, DIM) likewise, about their topics."""
    weights: np.ndarray
    """(CLUSTERS,) shares of the rows."""


def mixture(seed: int) -> Mixture:
    """The mixture that a seed stands for."""
    rng = np.random.default_rng([seed, 0])
    spectrum = 1 / np.arange(1, DIM + 1)
    basis, _ = np.linalg.qr(rng.standard_normal((DIM, DIM)))
    scaled = basis * np.sqrt(spectrum / spectrum.sum())
    topics = rng.standard_normal((TOPICS, DIM), dtype=np.float32)
    clusters = topics[rng.integers(TOPICS, size=CLUSTERS)] * 0.55
    clusters += 0.55 * rng.standard_normal((CLUSTERS, DIM), dtype=np.float32)
    means = unit(rng.standard_normal((2, DIM), dtype=np.float32)) * CONE
    weights = np.arange(1, CLUSTERS + 1) ** -ZIPF
    return Mixture(scaled.T.astype(np.float32), means[0], means[1], topics, clusters, weights / weights.sum())


def images(kind: Mixture, rows: int, seed: int) -> Vectors:
    """(rows, DIM) float32 unit rows, the near copies among them at random places."""
    rng = np.random.default_rng([seed, 1])
    out = np.empty((rows, DIM), np.float32)
    for start in range(0, rows, BLOCK_ROWS):
        out[start : start + BLOCK_ROWS] = _draw(kind, min(BLOCK_ROWS, rows - start), rng)
    copies = rng.permutation(rows)[: int(COPIES * rows)]
    originals = rng.integers(rows, size=len(copies))
    noise = rng.standard_normal((len(copies), DIM), dtype=np.float32) @ kind.basis
    out[copies] = unit(out[originals] + COPY_NOISE * noise)
    return out


def texts(kind: Mixture, rows: int, seed: int) -> Vectors:
    """(rows, DIM) float32 unit rows: what an image shows, weakened and blurred, about another mean."""
    rng = np.random.default_rng([seed, 2])
    shown = _coordinates(kind, rows, rng)
    blurred = 0.7 * shown + 0.5 * rng.standard_normal((rows, DIM), dtype=np.float32)
    return unit(blurred @ kind.basis * 0.76 + kind.text_mean)


def _draw(kind: Mixture, rows: int, rng: np.random.Generator) -> Vectors:
    return unit(_coordinates(kind, rows, rng) @ kind.basis * 0.76 + kind.image_mean)


def _coordinates(kind: Mixture, rows: int, rng: np.random.Generator) -> Vectors:
    chosen = rng.choice(CLUSTERS, size=rows, p=kind.weights)
    return kind.clusters[chosen] + 0.63 * rng.standard_normal((rows, DIM), dtype=np.float32)
