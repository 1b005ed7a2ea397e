"""Encodes training images to latents once, so that training does not decode and encode them at each step.

Reads `embed/train/<shard>.parquet` (ids and their order) and `download/train/<shard>.tar`. Writes mean and standard
deviation of the latents of several views of each image to `latents/<size>/<shard>.parquet`. View 0 is the center crop;
the others are random crops, half of them mirrored if `latents.flip` is true. With `latents.aspect_step` an image has
the shape of its aspect-ratio bucket, and its values in the table are padded with 0. Images that cannot be read are
left out and counted; training replaces them by others.
"""

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from retrieval.errors import UserError
from retrieval.storage import schema
from retrieval.storage.manifest import ShardRecord, shard_file
from retrieval.storage.root import Root
from retrieval.storage.schema import Reason
from trainer.data.aspect import Shape, bucket_shapes, read_buckets
from trainer.data.images import ImageTar, Pixels, center_crop, decode_image, random_crop, stored_members, unsigned_id
from trainer.data.unreadable import UnreadableError, retried
from trainer.model.autoencoder import Autoencoder
from trainer.model.recipe import AutoencoderConfig
from trainer.recipe import LatentsConfig

log = logging.getLogger("latents")


def manifest_values(config: LatentsConfig, autoencoder: Autoencoder) -> dict[str, Any]:
    """Manifest values that training compares with its recipe."""
    return {
        "autoencoder": autoencoder.identity,
        "shape": list(latent_shape(config.size, autoencoder)),
        "views": config.views,
        "aspect_step": config.aspect_step,
    }


def latent_shape(size: int, autoencoder: Autoencoder) -> tuple[int, int, int]:
    """(c, h, w) of the latent of a square image. Raises UserError if `size` is no multiple of the factor."""
    edge, remainder = divmod(size, autoencoder.factor)
    if remainder:
        raise UserError(
            f"a size of {size} px is no multiple of the autoencoder's factor {autoencoder.factor}. "
            f"Set size to {size - remainder} or {size - remainder + autoencoder.factor}."
        )
    return autoencoder.channels, edge, edge


def make_shard_encoder(
    config: LatentsConfig, autoencoder_config: AutoencoderConfig, root: Root
) -> Callable[[str], ShardRecord]:
    """A function that encodes a shard by name (`00003-00012`), with the autoencoder loaded once for many shards."""
    autoencoder = Autoencoder.load(autoencoder_config, config.device)
    columns = schema.latents(config.views * 2 * int(np.prod(latent_shape(config.size, autoencoder))))
    if config.aspect_step:
        latent_shape(config.aspect_step, autoencoder)  # raises UserError for fractions of a latent

    def encode(shard: str) -> ShardRecord:
        began = time.monotonic()
        ids = _embedded_ids(root, shard)
        buckets = read_buckets(root, shard, ids, bucket_shapes(config.size, config.aspect_step))
        name = shard_file(root, "download", f"train/{shard}", ".tar")
        with root.local(name) as path:
            tar = ImageTar(path, stored_members(root, name))
            readable, moments = encode_shard(tar, ids, buckets, autoencoder, config)
            tar.close()
        table = pa.table([ids[readable], schema.fixed_lists(moments)], schema=columns)
        unreadable = len(ids) - len(table)
        reasons = {str(Reason.UNREADABLE): unreadable} if unreadable else {}
        file = schema.write_table(root, f"latents/{config.size}/{shard}.parquet", table, columns)
        return ShardRecord(shard, len(table), (file,), reasons, seconds=time.monotonic() - began)

    return encode


def encode_shard(
    tar: ImageTar,
    ids: npt.NDArray[np.int64],
    buckets: npt.NDArray[np.int64],
    autoencoder: Autoencoder,
    config: LatentsConfig,
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.float16]]:
    """Which images can be read, (n,) bool, and the moments of all their views: (rows, views * 2 * c * h * w) float16.

    Rows are in the order of `ids`. buckets: the aspect-ratio bucket of each image. Moments of a shape that is smaller
    than the square are followed by 0. An image that the tar lacks is an error, because earlier stages found it there.
    """
    readable = np.ones(len(ids), bool)
    length = 2 * int(np.prod(latent_shape(config.size, autoencoder)))
    moments = np.zeros((len(ids) * config.views, length), np.float16)
    for bucket, shape in enumerate(bucket_shapes(config.size, config.aspect_step)):
        rows = np.flatnonzero(buckets == bucket)
        images = list(zip(rows.tolist(), ids[rows].tolist(), strict=True))
        with closing(_readable_views(tar, images, shape, config, readable)) as views:
            while batch := list(islice(views, config.batch_size)):
                places, pixels = zip(*batch, strict=True)
                encoded = _encode(pixels, autoencoder)
                moments[list(places), : encoded.shape[1]] = encoded
    moments = moments.reshape(len(ids), config.views * length)
    return readable, moments if readable.all() else moments[readable]


def _readable_views(
    tar: ImageTar, images: list[tuple[int, int]], shape: Shape, config: LatentsConfig, readable: npt.NDArray[np.bool_]
) -> Generator[tuple[int, Pixels]]:
    """All views of images of one shape, in order; sets `readable` to False for images that cannot be read.

    Each view comes after its place, row * views + view. images: row and id of each. Threads decode the views of the
    next batch while the caller encodes. They end when the generator is closed.
    """
    waiting = iter(images)
    ahead: deque[tuple[int, Future[list[Pixels]]]] = deque()
    # The image that is handed out, and those of a batch, or one for each thread.
    num_decoded = 1 + max(config.decode_threads, math.ceil(config.batch_size / config.views))
    pool = ThreadPoolExecutor(config.decode_threads, "latents")
    try:
        while True:
            for row, image_id in islice(waiting, num_decoded - len(ahead)):
                ahead.append((row, pool.submit(retried, partial(image_views, tar, image_id, shape, config))))
            if not ahead:
                return
            row, views = ahead.popleft()
            try:
                yield from enumerate(views.result(), row * config.views)
            except UnreadableError as error:
                readable[row] = False
                log.warning(f"left out: {error}")
    finally:
        pool.shutdown(cancel_futures=True)


def image_views(tar: ImageTar, image_id: int, shape: Shape, config: LatentsConfig) -> list[Pixels]:
    """The views of one image in a shape, (3, height, width) float32 in [-1, 1] each."""
    image = decode_image(tar.read(image_id), f"{tar.name}: image {image_id}", shape)
    seeds = ((config.seed, view, unsigned_id(image_id)) for view in range(1, config.views))
    return [center_crop(image), *(random_crop(image, view_seeds, config.flip) for view_seeds in seeds)]


def _encode(pixels: Sequence[Pixels], autoencoder: Autoencoder) -> npt.NDArray[np.float16]:
    with torch.inference_mode():
        moments = autoencoder.encode_moments(torch.from_numpy(np.stack(pixels)))
    return moments.flatten(1).half().cpu().numpy()


def _embedded_ids(root: Root, shard: str) -> npt.NDArray[np.int64]:
    """Ids of the embedded images, in table order. Other columns are not read."""
    name = f"embed/train/{shard}.parquet"
    with root.open(name) as file:
        try:
            return pq.read_table(file, columns=[schema.IMAGE_ID])[schema.IMAGE_ID].to_numpy()
        except (pa.ArrowInvalid, KeyError, OSError) as error:
            message = f"{root.at(name)} is not a table of embeddings: {error}. Run 'make embed' again."
            raise UserError(message) from error
