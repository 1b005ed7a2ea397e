"""CLIP vectors of encoded pictures, and the pictures of a tar. Needs no Ray: stages and benchmarks call it."""

import io
import tarfile
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from itertools import islice

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from pipeline.recipe import EmbedConfig
from retrieval.clip.encoder import Encoder
from retrieval.errors import UserError
from retrieval.pictures.decode import BROKEN, PictureError, decode_share
from retrieval.storage.schema import PICTURE_SUFFIXES

REMOVE = "Remove it and run 'make download' again."


def embed_images(
    pictures: Iterator[tuple[int, bytes]], encoder: Encoder, config: EmbedConfig
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Ids (n,) and CLIP vectors (n, dim), not normalized, of the readable pictures. pictures: ids and bytes."""
    ids: list[int] = []
    vectors = [torch.empty(0, encoder.identity.dim)]
    for batch in _decoded_batches(pictures, encoder, config):
        decoded = [(image_id, pixels) for image_id, pixels in batch if pixels is not None]
        if decoded:
            ids += [image_id for image_id, _ in decoded]
            # The batch before this one is copied while the device computes this one.
            computed = encoder.encode_pixels(torch.stack([pixels for _, pixels in decoded]))
            vectors[-1] = vectors[-1].cpu()
            vectors.append(computed)
    return np.asarray(ids, np.int64), torch.cat([part.cpu() for part in vectors]).numpy()


def _decoded_batches(
    pictures: Iterator[tuple[int, bytes]], encoder: Encoder, config: EmbedConfig
) -> Iterator[list[tuple[int, torch.Tensor | None]]]:
    """Batches for the encoder; threads decode the next batch while the encoder processes one."""
    ahead: deque[list[tuple[int, Future[torch.Tensor | None]]]] = deque()
    with ThreadPoolExecutor(config.decode_threads) as pool:
        while chunk := list(islice(pictures, config.batch_size)):
            ahead.append([(image_id, pool.submit(_decode, encoder, data)) for image_id, data in chunk])
            if len(ahead) > 1:
                yield [(image_id, tensor.result()) for image_id, tensor in ahead.popleft()]
        for batch in ahead:
            yield [(image_id, tensor.result()) for image_id, tensor in batch]


def _decode(encoder: Encoder, data: bytes) -> torch.Tensor | None:
    """The pixels for the encoder, or None if the picture cannot be read. Errors of the encoder are raised."""
    with ExitStack() as stack:
        try:
            image = stack.enter_context(Image.open(io.BytesIO(data)))
            stack.enter_context(decode_share(image))
            image.load()
        except (Image.DecompressionBombError, PictureError, *BROKEN):
            return None
        return encoder.pixels(image)


def read_pictures(path: str, keys: set[str]) -> Iterator[tuple[int, bytes]]:
    """Ids and bytes of the pictures with these keys in a tar. Raises UserError if it is damaged or lacks some."""
    missing = set(keys)
    try:
        with tarfile.open(path) as tar:
            for member in tar:
                key = member.name.partition(".")[0]
                if member.name.endswith(PICTURE_SUFFIXES) and key in missing and (file := tar.extractfile(member)):
                    missing.remove(key)
                    image_id = int(key, 16)
                    yield image_id - (1 << 64) if image_id >> 63 else image_id, file.read()
    except tarfile.TarError as error:
        raise UserError(f"{path} is not a readable tar ({error}). {REMOVE}") from error
    # tarfile treats a damaged header as the end of the file.
    if missing:
        raise UserError(f"{path} has {len(keys) - len(missing)} of its {len(keys)} pictures. {REMOVE}")
