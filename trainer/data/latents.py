"""Encodes training images to latents once, so that training does not decode and encode them at each step.

Reads `embed/train/<shard>.parquet` (ids and their order) and `download/train/<shard>.tar`. Writes mean and standard
deviation of the latents of several views of each image to `latents/<size>/<shard>.parquet`. View 0 is the center crop;
the others are random crops, half of them mirrored if `latents.flip` is true. Images that cannot be read are left out
and counted; training replaces them by others.
"""

import logging
import time
from collections.abc import Callable, Iterator
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
from trainer.data.images import ImageTar, Pixels, center_crop, decode_image, random_crop, stored_members, unsigned_id
from trainer.data.unreadable import UnreadableError, retried
from trainer.model.autoencoder import Autoencoder
from trainer.recipe import AutoencoderConfig, LatentsConfig

log = logging.getLogger("latents")


def manifest_values(config: LatentsConfig, autoencoder: Autoencoder) -> dict[str, Any]:
    """Manifest values that training compares with its recipe."""
    return {
        "autoencoder": autoencoder.identity,
        "shape": list(latent_shape(config.size, autoencoder)),
        "views": config.views,
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
    autoencoder = Autoencoder.load(autoencoder_config, "cuda" if config.gpus_per_worker else "cpu")
    columns = schema.latents(config.views * 2 * int(np.prod(latent_shape(config.size, autoencoder))))

    def encode(shard: str) -> ShardRecord:
        began = time.monotonic()
        ids = _embedded_ids(root, shard)
        name = shard_file(root, "download", f"train/{shard}", ".tar")
        with root.local(name) as path:
            tar = ImageTar(path, stored_members(root, name))
            readable, moments = encode_shard(tar, ids, autoencoder, config)
            tar.close()
        table = pa.table([ids[readable], schema.fixed_lists(moments)], schema=columns)
        unreadable = len(ids) - len(table)
        reasons = {str(Reason.UNREADABLE): unreadable} if unreadable else {}
        file = schema.write_table(root, f"latents/{config.size}/{shard}.parquet", table, columns)
        return ShardRecord(shard, len(table), (file,), reasons, seconds=time.monotonic() - began)

    return encode


def encode_shard(
    tar: ImageTar, ids: npt.NDArray[np.int64], autoencoder: Autoencoder, config: LatentsConfig
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.float16]]:
    """Which images can be read, (n,) bool, and the moments of all their views: (rows, views * 2 * c * h * w) float16.

    Rows are in the order of `ids`. An image that the tar lacks is an error, because earlier stages found it there.
    """
    readable = np.ones(len(ids), bool)
    views = _readable_views(tar, ids, config, readable)
    encoded = [_encode(pixels, autoencoder) for pixels in _batches(views, config.batch_size)]
    length = 2 * int(np.prod(latent_shape(config.size, autoencoder)))
    flat = np.concatenate([np.empty((0, length), np.float16), *encoded])
    return readable, flat.reshape(int(readable.sum()), config.views * length)


def _readable_views(
    tar: ImageTar, ids: npt.NDArray[np.int64], config: LatentsConfig, readable: npt.NDArray[np.bool_]
) -> Iterator[Pixels]:
    """All views of all images in order; sets `readable` to False for images that cannot be read."""
    for number, image_id in enumerate(ids.tolist()):
        try:
            yield from retried(partial(image_views, tar, image_id, config))
        except UnreadableError as error:
            readable[number] = False
            log.warning(f"left out: {error}")


def image_views(tar: ImageTar, image_id: int, config: LatentsConfig) -> list[Pixels]:
    """The views of one image, (3, size, size) float32 in [-1, 1] each."""
    image = decode_image(tar.read(image_id), f"{tar.name}: image {image_id}", config.size)
    seeds = ((config.seed, view, unsigned_id(image_id)) for view in range(1, config.views))
    return [center_crop(image), *(random_crop(image, view_seeds, config.flip) for view_seeds in seeds)]


def _encode(pixels: list[Pixels], autoencoder: Autoencoder) -> npt.NDArray[np.float16]:
    with torch.inference_mode():
        moments = autoencoder.encode_moments(torch.from_numpy(np.stack(pixels)))
    return moments.flatten(1).half().cpu().numpy()


def _batches(views: Iterator[Pixels], count: int) -> Iterator[list[Pixels]]:
    while batch := list(islice(views, count)):
        yield batch


def _embedded_ids(root: Root, shard: str) -> npt.NDArray[np.int64]:
    """Ids of the embedded images, in table order. Other columns are not read."""
    name = f"embed/train/{shard}.parquet"
    with root.open(name) as file:
        try:
            return pq.read_table(file, columns=[schema.IMAGE_ID])[schema.IMAGE_ID].to_numpy()
        except (pa.ArrowInvalid, KeyError, OSError) as error:
            message = f"{root.at(name)} is not a table of embeddings: {error}. Run 'make embed' again."
            raise UserError(message) from error
