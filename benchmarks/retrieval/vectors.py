"""Generated vectors with the properties of CLIP vectors that make search difficult.

Rows lie in a cone around a mean, in clusters and topics; the cluster sizes follow Zipf's law. The spectrum
falls as 1/i in a random basis. Some rows are near copies of others. Image queries come from the same mixture.
Text queries have another mean (the modality gap) and a weakened, noisy direction of an image.
"""

from dataclasses import dataclass

import numpy as np

from retrieval.index.routing import Vectors, unit

DIM = 768
TOPICS, CLUSTERS = 300, 20_000
ZIPF = 0.8
CONE = 0.65
"""Length of the mean before normalization; the rest has length 0.76, so two images have cosine 0.42."""
COPIES = 0.03
COPY_NOISE = 0.15
"""Length of the noise on a copy, which gives a cosine of about 0.99 to the original."""
BLOCK_ROWS = 1 << 16


@dataclass(frozen=True)
class Mixture:
    """Distribution of images and texts."""

    basis: Vectors
    """(dim, dim): orthogonal basis, scaled by the spectrum."""
    image_mean: Vectors
    text_mean: Vectors
    topics: Vectors
    """(TOPICS, dim) in coordinates of the basis."""
    clusters: Vectors
    """(CLUSTERS, dim) in coordinates of the basis, around their topics."""
    weights: np.ndarray
    """(CLUSTERS,) shares of the rows."""


def mixture(seed: int, dim: int = DIM) -> Mixture:
    """The mixture of a seed in dim dimensions."""
    rng = np.random.default_rng([seed, 0])
    spectrum = 1 / np.arange(1, dim + 1)
    basis, _ = np.linalg.qr(rng.standard_normal((dim, dim)))
    scaled = basis * np.sqrt(spectrum / spectrum.sum())
    topics = rng.standard_normal((TOPICS, dim), dtype=np.float32)
    clusters = topics[rng.integers(TOPICS, size=CLUSTERS)] * 0.55
    clusters += 0.55 * rng.standard_normal((CLUSTERS, dim), dtype=np.float32)
    means = unit(rng.standard_normal((2, dim), dtype=np.float32)) * CONE
    weights = np.arange(1, CLUSTERS + 1) ** -ZIPF
    return Mixture(scaled.T.astype(np.float32), means[0], means[1], topics, clusters, weights / weights.sum())


def images(mixture: Mixture, rows: int, seed: int) -> Vectors:
    """(rows, dim) float32 unit rows, with near copies at random positions."""
    rng = np.random.default_rng([seed, 1])
    out = np.empty((rows, len(mixture.basis)), np.float32)
    for start in range(0, rows, BLOCK_ROWS):
        out[start : start + BLOCK_ROWS] = _draw(mixture, min(BLOCK_ROWS, rows - start), rng)
    copies = rng.permutation(rows)[: int(COPIES * rows)]
    originals = rng.integers(rows, size=len(copies))
    noise = rng.standard_normal((len(copies), len(mixture.basis)), dtype=np.float32) @ mixture.basis
    out[copies] = unit(out[originals] + COPY_NOISE * noise)
    return out


def texts(mixture: Mixture, rows: int, seed: int) -> Vectors:
    """(rows, dim) float32 unit rows: weakened image directions with noise, around the mean of texts."""
    rng = np.random.default_rng([seed, 2])
    directions = _coordinates(mixture, rows, rng)
    noisy = 0.7 * directions + 0.5 * rng.standard_normal((rows, len(mixture.basis)), dtype=np.float32)
    return unit(noisy @ mixture.basis * 0.76 + mixture.text_mean)


def _draw(mixture: Mixture, rows: int, rng: np.random.Generator) -> Vectors:
    return unit(_coordinates(mixture, rows, rng) @ mixture.basis * 0.76 + mixture.image_mean)


def _coordinates(mixture: Mixture, rows: int, rng: np.random.Generator) -> Vectors:
    chosen = rng.choice(CLUSTERS, size=rows, p=mixture.weights)
    return mixture.clusters[chosen] + 0.63 * rng.standard_normal((rows, len(mixture.basis)), dtype=np.float32)
