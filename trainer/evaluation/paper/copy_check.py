"""Compares samples with the real images that they could be copies of: those of their database and of the training set.

Reads the stored samples, the style databases with their pictures, and training images; writes no files.
Perceptual hashes and contact sheets of the closest pairs need the pictures, CLIP distances do not.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from retrieval.database.database import Database
from retrieval.database.verify import visible_positions
from retrieval.storage.root import Root
from trainer.evaluation.intervals import Rows
from trainer.evaluation.metrics import Features
from trainer.evaluation.paper.copy_distances import Comparison, Distances, Nearest, hash_row, nearest, nearest_per_query
from trainer.evaluation.paper.real_images import TrainingImages, has_pictures, style_picture, training_pictures
from trainer.model.context import unit_rows
from trainer.sampling.conditioning import ConditionedRequest
from trainer.sampling.picture import Grid, cell_edge, open_picture

NearestAndReal = tuple[Nearest, Distances]
"""The nearest real image of each sample, and distances of real images to their nearest other."""
Pairs = Sequence[tuple[int, int]]
"""(number of a sample, row of its nearest real image)."""
ROW_LABELS = {"database": "nearest of its database", "training": "nearest training image"}


@dataclass(frozen=True)
class GeneratedSamples:
    """Stored samples: paths of their pictures below the root, styles, features (n, dim) and conditioning."""

    root: Root
    names: tuple[str, ...]
    styles: tuple[str, ...]
    features: Features
    conditioned: tuple[ConditionedRequest, ...]

    @cached_property
    def hashes(self) -> Features:
        """Perceptual hashes as unit rows (n, 64)."""
        return np.stack([hash_row(self.picture(i)) for i in range(len(self.names))])

    def picture(self, number: int) -> Image.Image:
        return open_picture(self.root, self.names[number])


class DatabaseImages:
    """Rows of the style database of each sample, with the neighbors that conditioned it. They are also the real images.

    A sample is compared with as many rows as a real image with others: minima over more rows are smaller.
    """

    name = "database"

    def __init__(self, databases: dict[str, Database], folder: str, max_rows: int, seed: int) -> None:
        """folder: with the styles' pictures, or empty; max_rows: real images per database."""
        self._databases, self._folder = databases, folder
        self._rows: dict[str, Rows] = {
            style: np.sort(np.random.default_rng([seed, *style.encode()]).permutation(visible_positions(db))[:max_rows])
            for style, db in databases.items()
        }
        self._ids = {style: db.ids_at(self._rows[style]) for style, db in databases.items()}

    def by_clip(self, samples: GeneratedSamples) -> NearestAndReal:
        """CLIP distances to the nearest of each sample's neighbors and other rows of its database."""
        real = {style: unit_rows(db.rows_at(self._rows[style])[1]) for style, db in self._databases.items()}
        candidates = (
            np.concatenate([unit_rows(conditioned.context[1:]), real[style][self._others(style, conditioned)]])
            for style, conditioned in zip(samples.styles, samples.conditioned, strict=True)
        )
        distances = [_to_nearest_other(rows) for rows in real.values()]
        return nearest_per_query(samples.features, candidates), np.concatenate(distances)

    def by_hash(self, samples: GeneratedSamples) -> NearestAndReal | None:
        """The same for perceptual hashes; None unless the folder has all pictures."""
        candidates = [self._candidates(samples, i) for i in range(len(samples.names))]
        real = [self._paths(style, urls) for style, urls in self._urls.items()]
        distinct = {path for paths in (*candidates, *real) for path in paths}
        if None in distinct:
            return None
        hashes = {path: hash_row(_open_file(path)) for path in tqdm(distinct, "style pictures") if path}
        of_samples, of_real = (
            (np.stack([hashes[path] for path in paths if path]) for paths in part) for part in (candidates, real)
        )
        distances = np.concatenate([_to_nearest_other(rows) for rows in of_real])
        return nearest_per_query(samples.hashes, of_samples), distances

    def pictures(self, pairs: Pairs, samples: GeneratedSamples) -> list[Image.Image | None]:
        """The real picture of each pair from the folder; None if it is missing."""
        paths = [self._candidates(samples, i)[row] for i, row in pairs]
        return [_open_file(path) if path else None for path in paths]

    def _others(self, style: str, conditioned: ConditionedRequest) -> Rows:
        """Indices of rows that a sample is compared with besides its neighbors: together one fewer than real images."""
        ids = self._ids[style]
        others = np.flatnonzero(~np.isin(ids, [neighbor.image_id for neighbor in conditioned.neighbors]))
        return others[: max(0, len(ids) - 1 - len(conditioned.neighbors))]

    def _candidates(self, samples: GeneratedSamples, number: int) -> list[Path | None]:
        """The pictures that a sample is compared with, its neighbors first."""
        style, conditioned = samples.styles[number], samples.conditioned[number]
        others = [self._urls[style][row] for row in self._others(style, conditioned)]
        return self._paths(style, [*(neighbor.url for neighbor in conditioned.neighbors), *others])

    @cached_property
    def _urls(self) -> dict[str, list[str]]:
        return {style: db.metadata_at(self._rows[style])["url"].to_pylist() for style, db in self._databases.items()}

    def _paths(self, style: str, urls: Iterable[str]) -> list[Path | None]:
        return [style_picture(self._folder, style, url) for url in urls]


class TrainingSetImages:
    """Training images; they are also the real images."""

    name = "training"

    def __init__(self, root: Root, images: TrainingImages) -> None:
        self._root, self._images = root, images
        self._has_pictures = has_pictures(root, images)

    def by_clip(self, samples: GeneratedSamples) -> NearestAndReal:
        """CLIP distances to the nearest of all training images."""
        return nearest(samples.features, self._images.features), _to_nearest_other(self._images.features)

    def by_hash(self, samples: GeneratedSamples) -> NearestAndReal | None:
        """The same for perceptual hashes; None if tars are missing."""
        if not self._has_pictures:
            return None
        count = len(self._images.ids)
        hashes = np.empty((count, 64), np.float32)
        pictures = training_pictures(self._root, self._images, range(count))
        for row, picture in tqdm(pictures, "training pictures", count):
            hashes[row] = hash_row(picture)
        return nearest(samples.hashes, hashes), _to_nearest_other(hashes)

    def pictures(self, pairs: Pairs, samples: GeneratedSamples) -> list[Image.Image | None]:
        """The real picture of each pair from the tars; None if it is missing."""
        rows = [row for _, row in pairs]
        if not self._has_pictures:
            return [None] * len(rows)
        pictures = dict(training_pictures(self._root, self._images, rows))
        return [pictures[row] for row in rows]


RealImages = DatabaseImages | TrainingSetImages


def compare(samples: GeneratedSamples, real_images: RealImages, max_pairs: int) -> list[tuple[Comparison, Grid]]:
    """Comparisons by CLIP and, if there are pictures, by hash; each with the sheet of its closest pairs."""
    measured = {"clip": real_images.by_clip(samples), "hash": real_images.by_hash(samples)}
    results = []
    for measure, result in measured.items():
        if result is not None:
            closest, real = result
            prompts = tuple(item.request.prompt for item in samples.conditioned)
            comparison = Comparison(f"{real_images.name}_{measure}", closest.distances, real, prompts)
            order = np.argsort(closest.distances, kind="stable")[:max_pairs].tolist()
            pairs = [(i, int(closest.rows[i])) for i in order]
            results.append((comparison, _sheet(comparison, pairs, samples, real_images)))
    return results


def _sheet(comparison: Comparison, pairs: Pairs, samples: GeneratedSamples, real_images: RealImages) -> Grid:
    pictures = [samples.picture(i) for i, _ in pairs]
    return Grid(
        cells=[pictures, real_images.pictures(pairs, samples)],
        rows=["sample", ROW_LABELS[real_images.name]],
        columns=[comparison.label(comparison.samples[i]) for i, _ in pairs],
        cell=min(128, cell_edge(pictures[0])),
    )


def _to_nearest_other(rows: Features) -> Distances:
    """Distance of each row to the nearest other row."""
    return nearest(unit_rows(rows), unit_rows(rows), same_rows=True).distances


def _open_file(path: Path) -> Image.Image:
    with Image.open(path) as picture:
        return picture.convert("RGB")
