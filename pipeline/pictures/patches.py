"""Patches: random crops of a database's pictures, each a row of its own, as the ImageNet model has them.

Takes decoded pictures, gives crops with their boxes. Every picture gives at least one; how many, and where
they lie, follows from the seed and the picture's id, and in all there are no more than the recipe allows.
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

from pipeline.pictures.picture import prepared
from pipeline.recipe import PatchesConfig
from pipeline.web.sockets import Refusal
from retrieval.errors import UserError
from retrieval.storage import schema
from retrieval.storage.manifest import Manifest

MAX_PIXELS = 160_000_000
"""More than any picture that download keeps, and less than what PIL takes for a bomb."""
AT_ONCE = 32
"""Pictures that are cut before the next are read."""
Counts = npt.NDArray[np.int64]
Box = tuple[int, int, int, int]
"""x, y, width, height in pixels."""


def quotas(download: Manifest, config: PatchesConfig) -> dict[str, int]:
    """How many patches each database shard may give, in all max_patches; empty where pictures stay whole.

    Raises UserError if not every picture could give one.
    """
    if not config.max_patches:
        return {}
    shards = [record for record in download.shards if record.shard.startswith("database/")]
    rows = np.array([record.rows for record in shards])
    if rows.sum() > config.max_patches:
        raise UserError(
            f"[embed.patches] max_patches = {config.max_patches}, but each of {rows.sum()} pictures is to "
            "give a patch. Raise it, or select fewer rows."
        )
    spare = config.max_patches - int(rows.sum())
    reach = np.cumsum(rows) * spare // max(1, int(rows.sum()))
    most = rows + np.diff(reach, prepend=0)
    return {record.shard: int(quota) for record, quota in zip(shards, most, strict=True)}


def draw_boxes(pictures: pa.Table, quota: int, config: PatchesConfig) -> dict[int, list[Box]]:
    """The boxes of each picture by its id. pictures: image_id, width and height, in pixels as stored."""
    ids = pictures[schema.IMAGE_ID].to_pylist()
    shard = ids[0] & (1 << 64) - 1 if ids else 0
    counts = patch_counts(len(ids), quota, config, np.random.default_rng([config.seed, shard]))
    sizes = zip(pictures["width"].to_pylist(), pictures["height"].to_pylist(), strict=True)
    return {
        id_: patch_boxes(size, int(count), config, id_)
        for id_, size, count in zip(ids, sizes, counts, strict=True)
    }


def patch_counts(pictures: int, quota: int, config: PatchesConfig, rng: np.random.Generator) -> Counts:
    """Patches of each picture of a shard, (pictures,): fewest .. most, cut down at random to the quota."""
    wanted = rng.integers(config.fewest, config.most + 1, pictures)
    extra = rng.permutation(np.repeat(np.arange(pictures), wanted - 1))[: quota - pictures]
    return np.asarray(1 + np.bincount(extra, minlength=pictures))


def patch_boxes(size: tuple[int, int], count: int, config: PatchesConfig, image_id: int) -> list[Box]:
    """Where the patches of a picture (width, height) lie, in its own pixels; equal ones once."""
    rng = np.random.default_rng([config.seed, image_id & (1 << 64) - 1])
    edge = max(1, min(*size, round(config.edge * min(size) / config.shorter_side)))
    corners = rng.integers(0, [size[0] - edge + 1, size[1] - edge + 1], (count, 2))
    return list(dict.fromkeys((int(x), int(y), edge, edge) for x, y in corners))


def cut(image: Image.Image, box: Box, edge: int) -> Image.Image:
    """The part of a picture in a box, scaled to a square of this edge."""
    x, y, width, height = box
    part = (x, y, x + width, y + height)
    return image.resize((edge, edge), Image.Resampling.BICUBIC, box=part)


def patch_id(image_id: int, box: Box) -> int:
    """The id of a patch: that of its picture's id and the box as text."""
    return schema.image_id(f"{image_id}#{','.join(map(str, box))}")


def patch_rows(pictures: pa.Table, boxes: Mapping[int, list[Box]]) -> pa.Table:
    """A row for each patch in the order of the pictures: METADATA and DETAILS, its own id, size and box."""
    each = [boxes[id_] for id_ in pictures[schema.IMAGE_ID].to_pylist()]
    rows = pictures.take(pa.array(np.repeat(np.arange(len(each)), [len(one) for one in each])))
    flat = [box for one in each for box in one]
    ids = [patch_id(id_, box) for id_, box in zip(rows[schema.IMAGE_ID].to_pylist(), flat, strict=True)]
    made: dict[str, list[Any]] = {schema.IMAGE_ID: ids, schema.BOX: flat}
    made |= {"width": [box[2] for box in flat], "height": [box[3] for box in flat]}
    wanted = pa.schema([*schema.METADATA, *schema.DETAILS])
    unknown = pa.nulls(len(flat), pa.string())
    columns = {
        name: made[name] if name in made else rows[name] if name in rows.column_names else unknown
        for name in wanted.names
    }
    return pa.table(columns, schema=wanted)


def patch_pictures(
    pictures: Iterator[tuple[int, bytes]], boxes: Mapping[int, list[Box]], edge: int, threads: int
) -> Iterator[tuple[int, bytes]]:
    """Id and bytes of each patch, uncompressed; no bytes where the picture cannot be read."""
    with ThreadPoolExecutor(threads) as pool:
        while chunk := list(islice(pictures, AT_ONCE)):
            cuts = pool.map(lambda one: _cut_all(one[1], boxes[one[0]], edge), chunk)
            for (id_, _), patches in zip(chunk, cuts, strict=True):
                ids = [patch_id(id_, box) for box in boxes[id_]]
                yield from zip(ids, patches, strict=True)


def _cut_all(data: bytes, boxes: list[Box], edge: int) -> list[bytes]:
    picture = prepared(data, MAX_PIXELS, 0)
    if isinstance(picture, Refusal):
        return [b""] * len(boxes)
    with Image.open(io.BytesIO(picture.data)) as image:
        rgb = image.convert("RGB")
    return [_ppm(cut(rgb, box, edge)) for box in boxes]


def _ppm(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PPM")
    return buffer.getvalue()
