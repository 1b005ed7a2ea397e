"""Real images to compare samples with: training images with their features, and the styles' pictures.

Reads `embed/train`, the tars of `download/train` and a folder of style pictures; writes nothing. What is
not at hand is left out, since a released model comes without its training set.
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
from retrieval.storage.root import Root
from trainer.data.images import ImageTar
from trainer.evaluation.metrics import Features
from trainer.evaluation.styles import style_words
from trainer.model.context import unit_rows


@dataclass(frozen=True)
class TrainingImages:
    """Some training images: shard and id of each, and their CLIP features (n, dim) unit rows."""

    shards: tuple[str, ...]
    ids: tuple[int, ...]
    features: Features


def training_images(root: Root, most: int, seed: int) -> TrainingImages | None:
    """At most so many images, of shards drawn by the seed until they have enough; None without `embed`."""
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
        if len(ids) >= most:
            break
    if len(ids) < 2:
        return None
    kept = np.sort(rng.permutation(len(ids))[:most])
    return TrainingImages(
        tuple(shards[i] for i in kept), tuple(ids[i] for i in kept), unit_rows(np.concatenate(parts)[kept])
    )


def has_pictures(root: Root, images: TrainingImages) -> bool:
    """Whether the tars of all these images are there."""
    return all(root.exists(f"download/train/{shard}.tar") for shard in set(images.shards))


def training_pictures(
    root: Root, images: TrainingImages, rows: Sequence[int]
) -> Iterator[tuple[int, Image.Image]]:
    """The pictures of some rows with their row numbers, shard by shard."""
    by_shard: dict[str, list[int]] = {}
    for row in rows:
        by_shard.setdefault(images.shards[row], []).append(row)
    for shard, here in by_shard.items():
        with root.local(f"download/train/{shard}.tar") as path, closing(ImageTar(path)) as tar:
            for row in here:
                with Image.open(BytesIO(tar.read(images.ids[row]))) as picture:
                    yield row, picture.convert("RGB")


def style_picture(folder: str, style: str, url: str) -> Path | None:
    """The file of a style database's row `<style or union>/<path>`, below a folder of folders by style; None
    if not there."""
    inside = url.split("/", 1)[-1]
    for path in (*(Path(folder, name, inside) for name in (style, style_words(style))), Path(folder, inside)):
        if folder and ".." not in path.parts and path.is_file():
            return path
    return None
