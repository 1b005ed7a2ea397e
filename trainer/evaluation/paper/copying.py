"""Samples beside their neighbors and beside training images: what `memorization` compares, from the files.

Reads the stored samples, the style databases and their pictures, training images; writes nothing. Hashes
are compared, and the closest pairs shown, where pictures are at hand.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image
from tqdm import tqdm

from retrieval.database.database import Database
from retrieval.storage.root import Root
from trainer.evaluation.metrics import Features
from trainer.evaluation.paper.gallery import TrainingImages, has_pictures, style_picture, training_pictures
from trainer.evaluation.paper.intervals import Rows
from trainer.evaluation.paper.memorization import (
    Comparison,
    Distances,
    Nearest,
    hash_row,
    nearest,
    nearest_own,
)
from trainer.model.context import unit_rows
from trainer.sampling.conditioning import Conditioned
from trainer.sampling.picture import Grid, cell_edge, open_picture

Measured = tuple[Nearest, Distances]
"""What each sample is nearest to, and how near real images are to each other."""
Pairs = Sequence[tuple[int, int]]
"""Numbers of a sample and of what it is nearest to."""
WORDS = {"neighbors": "nearest of its neighbors", "training": "nearest training image"}


@dataclass(frozen=True)
class Samples:
    """Samples: their pictures' names below a root, styles, features (n, dim), and what they were told."""

    root: Root
    names: tuple[str, ...]
    styles: tuple[str, ...]
    features: Features
    told: tuple[Conditioned, ...]

    @cached_property
    def hashes(self) -> Features:
        """Perceptual hashes (n, 64)."""
        return np.stack([hash_row(self.picture(i)) for i in range(len(self.names))])

    def picture(self, number: int) -> Image.Image:
        """A sample's picture."""
        return open_picture(self.root, self.names[number])


class Originals(Protocol):
    """Images that samples may be copies of."""

    name: str

    def by_clip(self, samples: Samples) -> Measured:
        """Compared by CLIP features."""
        ...

    def by_hash(self, samples: Samples) -> Measured | None:
        """Compared by perceptual hashes; None without pictures."""
        ...

    def pictures(self, pairs: Pairs, samples: Samples) -> list[Image.Image | None]:
        """The second of each pair; None where it is not at hand."""
        ...


class OwnNeighbors:
    """The neighbors that each sample was told; real: rows of a style's database to the nearest other."""

    name = "neighbors"

    def __init__(self, databases: dict[str, Database], folder: str, most_rows: int, seed: int) -> None:
        """folder: of the styles' pictures, or empty. most_rows: real images of each database."""
        self._databases, self._folder = databases, folder
        self._rows: dict[str, Rows] = {
            style: np.sort(np.random.default_rng([seed, *style.encode()]).permutation(len(one))[:most_rows])
            for style, one in databases.items()
        }

    def by_clip(self, samples: Samples) -> Measured:
        """The nearest of each sample's own neighbors."""
        real = [_among(one.rows_at(self._rows[style])[1]) for style, one in self._databases.items()]
        return nearest_own(samples.features, [one.context[1:] for one in samples.told]), np.concatenate(real)

    def by_hash(self, samples: Samples) -> Measured | None:
        """The same, where every neighbor's picture is in the folder."""
        told = [
            self._paths(style, [found.url for found in one.neighbors])
            for style, one in zip(samples.styles, samples.told, strict=True)
        ]
        real = [
            self._paths(style, one.metadata_at(self._rows[style])["url"].to_pylist())
            for style, one in self._databases.items()
        ]
        wanted = {path for paths in (*told, *real) for path in paths}
        if None in wanted:
            return None
        known = {path: hash_row(_opened(path)) for path in tqdm(wanted, "style pictures") if path}
        own, among = (
            [np.stack([known[path] for path in paths if path]) for paths in part] for part in (told, real)
        )
        return nearest_own(samples.hashes, own), np.concatenate([_among(one) for one in among])

    def pictures(self, pairs: Pairs, samples: Samples) -> list[Image.Image | None]:
        """From the folder."""
        found = [
            self._paths(samples.styles[i], [samples.told[i].neighbors[match].url])[0] for i, match in pairs
        ]
        return [_opened(path) if path else None for path in found]

    def _paths(self, style: str, urls: Iterable[str]) -> list[Path | None]:
        return [style_picture(self._folder, style, url) for url in urls]


class Training:
    """Training images; real: each to the nearest other."""

    name = "training"

    def __init__(self, root: Root, images: TrainingImages) -> None:
        self._root, self._images = root, images
        self._have_pictures = has_pictures(root, images)

    def by_clip(self, samples: Samples) -> Measured:
        """The nearest of all."""
        return nearest(samples.features, self._images.features), _among(self._images.features)

    def by_hash(self, samples: Samples) -> Measured | None:
        """The same, where the tars are there."""
        if not self._have_pictures:
            return None
        count = len(self._images.ids)
        hashes = np.empty((count, 64), np.float32)
        pictures = training_pictures(self._root, self._images, range(count))
        for row, picture in tqdm(pictures, "training pictures", count):
            hashes[row] = hash_row(picture)
        return nearest(samples.hashes, hashes), _among(hashes)

    def pictures(self, pairs: Pairs, samples: Samples) -> list[Image.Image | None]:
        """From the tars."""
        rows = [match for _, match in pairs]
        if not self._have_pictures:
            return [None] * len(rows)
        found = dict(training_pictures(self._root, self._images, rows))
        return [found[row] for row in rows]


def compare(samples: Samples, originals: Originals, most_pairs: int) -> list[tuple[Comparison, Grid]]:
    """By CLIP and, where there are pictures, by hash; each with the sheet of its closest pairs."""
    measured = {"clip": originals.by_clip(samples), "hash": originals.by_hash(samples)}
    results = []
    for measure, found in measured.items():
        if found is not None:
            comparison = Comparison(f"{originals.name}_{measure}", found[0].distances, found[1])
            results.append((comparison, _closest(comparison, found[0], samples, (originals, most_pairs))))
    return results


def _closest(comparison: Comparison, found: Nearest, samples: Samples, shown: tuple[Originals, int]) -> Grid:
    originals, most = shown
    order = np.argsort(found.distances, kind="stable")[:most].tolist()
    pictures = [samples.picture(i) for i in order]
    return Grid(
        cells=[pictures, originals.pictures([(i, int(found.rows[i])) for i in order], samples)],
        rows=["sample", WORDS[originals.name]],
        columns=[comparison.said(found.distances[i]) for i in order],
        cell=min(128, cell_edge(pictures[0])),
    )


def _among(rows: Features) -> Distances:
    return nearest(unit_rows(rows), unit_rows(rows), among_themselves=True).distances


def _opened(path: Path) -> Image.Image:
    with Image.open(path) as picture:
        return picture.convert("RGB")
