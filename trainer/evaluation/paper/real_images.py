"""Real images that samples are compared with: training images and the pictures of the style databases.

Reads `embed/train`, the tars of `download/train` and a folder of style pictures; writes no files. All are
optional, since a released model comes without its training set.
"""

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
from PIL import Image

from retrieval.storage import schema
from retrieval.storage.manifest import shard_file
from retrieval.storage.root import Root
from trainer.data.images import ImageTar, stored_members
from trainer.evaluation.metrics import Features
from trainer.evaluation.styles import style_words
from trainer.model.context import unit_rows


@dataclass(frozen=True)
class TrainingImages:
    """Training images: shard, id and CLIP features (n, dim) unit rows."""

    shards: tuple[str, ...]
    ids: tuple[int, ...]
    features: Features


def training_images(root: Root, max_images: int, seed: int) -> TrainingImages | None:
    """Up to `max_images` random images of random shards; None if `embed` has fewer than 2 images."""
    names = root.list("embed/train", ".parquet")
    rng = np.random.default_rng([seed, len(names)])
    shards: list[str] = []
    ids: list[int] = []
    parts: list[npt.NDArray[np.float16]] = []
    for number in rng.permutation(len(names)):
        with root.open(names[number]) as file:
            table = pq.read_table(file, columns=[schema.IMAGE_ID, schema.EMBEDDING])
        shards += [Path(names[number]).stem] * len(table)
        ids += table[schema.IMAGE_ID].to_pylist()
        parts.append(schema.vectors(table, schema.EMBEDDING))
        if len(ids) >= max_images:
            break
    if len(ids) < 2:
        return None
    selected = np.sort(rng.permutation(len(ids))[:max_images])
    features = unit_rows(np.concatenate(parts)[selected])
    return TrainingImages(tuple(shards[i] for i in selected), tuple(ids[i] for i in selected), features)


def has_pictures(root: Root, images: TrainingImages) -> bool:
    """Whether the tars of all these images exist."""
    return all(root.exists(_tar(root, shard)) for shard in set(images.shards))


def _tar(root: Root, shard: str) -> str:
    return shard_file(root, "download", f"train/{shard}", ".tar")


def training_pictures(root: Root, images: TrainingImages, rows: Sequence[int]) -> Iterator[tuple[int, Image.Image]]:
    """The pictures of some rows with their row numbers, shard by shard."""
    by_shard: dict[str, list[int]] = {}
    for row in rows:
        by_shard.setdefault(images.shards[row], []).append(row)
    for shard, rows_of_shard in by_shard.items():
        name = _tar(root, shard)
        with root.local(name) as path, closing(ImageTar(path, stored_members(root, name))) as tar:
            for row in rows_of_shard:
                with Image.open(BytesIO(tar.read(images.ids[row]))) as picture:
                    yield row, picture.convert("RGB")


def style_picture(folder: str, style: str, url: str) -> Path | None:
    """The file of a row with url `<style or union>/<path>` in folder/<style> (as the database or in words), or None."""
    inside = url.split("/", 1)[-1].lstrip("/")  # an absolute path would leave the folder
    for path in (*(Path(folder, name, inside) for name in (style, style_words(style))), Path(folder, inside)):
        if folder and ".." not in path.parts and path.is_file():
            return path
    return None
