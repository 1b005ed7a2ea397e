"""Aspect-ratio buckets: the shapes of batches, and the bucket of every image.

Reads the sizes of images in `embed/train/<shard>.parquet`; writes nothing. An image belongs to the bucket with the
nearest ratio of its edges. It is scaled to cover the shape of the bucket, then cropped.
"""

import numpy as np
import numpy.typing as npt

from retrieval.errors import UserError
from retrieval.storage import schema
from retrieval.storage.root import Root

MAX_RATIO = 2.0
"""Largest ratio of the edges of a bucket. Longer images are cropped to it."""

Shape = tuple[int, int]
"""Height and width in pixels."""


def bucket_shapes(size: int, step: int) -> tuple[Shape, ...]:
    """Shapes whose edges are multiples of `step` and whose area is at most size^2, widest last. step 0: the square.

    For each width the height is the largest that fits, and vice versa. Raises UserError unless `step` divides `size`
    and gives other shapes than the square.
    """
    if not step:
        return ((size, size),)
    if size % step:
        raise UserError(f"aspect_step must divide size {size}, got {step}.")
    wide = {(size * size // width // step * step, width) for width in range(size, int(MAX_RATIO * size) + 1, step)}
    shapes = [shape for shape in wide if shape[1] <= MAX_RATIO * shape[0]]
    if len(shapes) == 1:
        raise UserError(f"aspect_step {step} gives no shape but the square of {size} px: lower it, or set it to 0.")
    tall = [(width, height) for height, width in shapes]
    return tuple(sorted({*shapes, *tall}, key=lambda shape: shape[1] / shape[0]))


def nearest_bucket(
    widths: npt.NDArray[np.int64], heights: npt.NDArray[np.int64], shapes: tuple[Shape, ...]
) -> npt.NDArray[np.int64]:
    """The bucket of each image, (n,): that with the nearest logarithm of width / height."""
    ratios = np.log([width / height for height, width in shapes])
    return np.abs(np.log(widths / heights)[:, None] - ratios).argmin(axis=1)


def read_buckets(
    root: Root, shard: str, ids: npt.NDArray[np.int64], shapes: tuple[Shape, ...]
) -> npt.NDArray[np.int64]:
    """The bucket of each image of a shard, (n,). Raises UserError for an image that was not embedded."""
    if len(shapes) == 1:
        return np.zeros(len(ids), np.int64)
    name = f"embed/train/{shard}.parquet"
    table = schema.read_table(root, name, schema.METADATA, [schema.IMAGE_ID, "width", "height"])
    stored, widths, heights = (table[column].to_numpy() for column in table.column_names)
    order = np.argsort(stored)
    places = np.minimum(np.searchsorted(stored, ids, sorter=order), len(stored) - 1)
    rows = order[places]
    if len(missing := ids[stored[rows] != ids]):
        raise UserError(
            f"{root.at(name)} lacks {len(missing)} images of the neighbors table, the first is {missing[0]}: the "
            f"shards do not match. Run 'make embed' again."
        )
    return nearest_bucket(widths[rows], heights[rows], shapes)
