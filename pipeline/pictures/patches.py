"""Patches: random crops of database pictures, each with its own row, as in the paper's ImageNet model.

Takes pictures; gives crops with their boxes. The number and position of a picture's crops depend on the seed
and its id only. Every picture gives at least one crop. Otherwise the
recipe limits the total.
"""

import io
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from PIL import Image

from pipeline.pictures.picture import ppm_bytes, prepare
from pipeline.recipe import PatchesConfig
from retrieval.errors import UserError
from retrieval.pictures.decode import MAX_PIXELS, PictureError
from retrieval.storage import schema
from retrieval.storage.manifest import Manifest

PICTURES_PER_CHUNK = 32
"""Pictures that are cropped before the next are read."""
Counts = npt.NDArray[np.int64]
Box = tuple[int, int, int, int]
"""x, y, width, height in pixels."""


def patch_quotas(download: Manifest, config: PatchesConfig) -> dict[str, int]:
    """Patches of each database shard, in total max_patches; empty if that is 0. Raises UserError for more pictures."""
    if not config.max_patches:
        return {}
    shards = [record for record in download.shards if record.shard.startswith("database/")]
    rows = np.array([record.rows for record in shards])
    if rows.sum() > config.max_patches:
        raise UserError(
            f"[embed.patches] max_patches = {config.max_patches}, but each of the {rows.sum()} pictures "
            "gives at least one patch. Raise it, or select fewer rows."
        )
    extra = config.max_patches - int(rows.sum())
    cumulative_extra = np.cumsum(rows) * extra // max(1, int(rows.sum()))
    quotas = rows + np.diff(cumulative_extra, prepend=0)
    return {record.shard: int(quota) for record, quota in zip(shards, quotas, strict=True)}


def draw_boxes(pictures: pa.Table, quota: int, config: PatchesConfig) -> dict[int, list[Box]]:
    """The boxes of each picture of a shard, by image id. pictures: image_id, width and height in pixels."""
    ids = pictures[schema.IMAGE_ID].to_pylist()
    shard = ids[0] & (1 << 64) - 1 if ids else 0
    counts = patch_counts(len(ids), quota, config, np.random.default_rng([config.seed, shard]))
    sizes = zip(pictures["width"].to_pylist(), pictures["height"].to_pylist(), strict=True)
    return {
        id_: patch_boxes(size, int(count), config, id_) for id_, size, count in zip(ids, sizes, counts, strict=True)
    }


def patch_counts(num_pictures: int, quota: int, config: PatchesConfig, rng: np.random.Generator) -> Counts:
    """Random numbers of patches for the pictures of a shard, (num_pictures,), in total at most the quota.

    Each is from min_per_picture to max_per_picture, or less if the quota requires it, but at least 1.
    """
    counts = rng.integers(config.min_per_picture, config.max_per_picture + 1, num_pictures)
    extra = rng.permutation(np.repeat(np.arange(num_pictures), counts - 1))[: quota - num_pictures]
    return np.asarray(1 + np.bincount(extra, minlength=num_pictures))


def patch_boxes(size: tuple[int, int], count: int, config: PatchesConfig, image_id: int) -> list[Box]:
    """Random boxes in a picture of size (width, height), in its pixels, without duplicates."""
    rng = np.random.default_rng([config.seed, image_id & (1 << 64) - 1])
    edge = max(1, min(*size, round(config.edge * min(size) / config.shorter_side)))
    corners = rng.integers(0, [size[0] - edge + 1, size[1] - edge + 1], (count, 2))
    return list(dict.fromkeys((int(x), int(y), edge, edge) for x, y in corners))


def crop(image: Image.Image, box: Box, edge: int) -> Image.Image:
    """The part of a picture in a box, scaled to edge x edge pixels."""
    x, y, width, height = box
    return image.resize((edge, edge), Image.Resampling.BICUBIC, box=(x, y, x + width, y + height))


def patch_id(image_id: int, box: Box) -> int:
    """The id of a patch: the hash of its picture's id and its box, as text."""
    return schema.image_id(f"{image_id}#{','.join(map(str, box))}")


def patch_rows(pictures: pa.Table, boxes: Mapping[int, list[Box]]) -> pa.Table:
    """A row for each patch: id, size and box of the patch, other columns of its picture.

    Columns of METADATA and DETAILS come first, then further ones of the pictures.
    """
    boxes_of_rows = [boxes[id_] for id_ in pictures[schema.IMAGE_ID].to_pylist()]
    repeats = [len(row_boxes) for row_boxes in boxes_of_rows]
    rows = pictures.take(pa.array(np.repeat(np.arange(len(repeats)), repeats)))
    flat = [box for row_boxes in boxes_of_rows for box in row_boxes]
    ids = [patch_id(id_, box) for id_, box in zip(rows[schema.IMAGE_ID].to_pylist(), flat, strict=True)]
    of_patches: dict[str, list[Any]] = {schema.IMAGE_ID: ids, schema.BOX: flat}
    of_patches |= {"width": [box[2] for box in flat], "height": [box[3] for box in flat]}
    of_pictures = {name: rows[name] for name in rows.column_names}
    target = pa.schema([*schema.METADATA, *schema.DETAILS])
    target = pa.schema([*target, *(field for field in pictures.schema if field.name not in target.names)])
    missing: dict[str, Any] = {name: pa.nulls(len(flat), target.field(name).type) for name in target.names}
    columns = missing | of_pictures | of_patches
    return pa.table({name: columns[name] for name in target.names}, schema=target)


def patch_pictures(
    pictures: Iterator[tuple[int, bytes]], boxes: Mapping[int, list[Box]], edge: int, threads: int
) -> Iterator[tuple[int, bytes]]:
    """Id of each patch and its pixels as PPM; no bytes for a picture that cannot be read."""
    with ThreadPoolExecutor(threads) as pool:
        while chunk := list(islice(pictures, PICTURES_PER_CHUNK)):
            crops = pool.map(lambda picture: _crop_all(picture[1], boxes[picture[0]], edge), chunk)
            for (id_, _), patches in zip(chunk, crops, strict=True):
                ids = [patch_id(id_, box) for box in boxes[id_]]
                yield from zip(ids, patches, strict=True)


def _crop_all(data: bytes, boxes: list[Box], edge: int) -> list[bytes]:
    try:
        picture = prepare(data, MAX_PIXELS, 0)
    except PictureError:
        return [b""] * len(boxes)
    with Image.open(io.BytesIO(picture.data)) as image:
        rgb = image.convert("RGB")
    return [ppm_bytes(np.asarray(crop(rgb, box, edge))) for box in boxes]
