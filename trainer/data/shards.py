"""Open shards: the neighbors of each row in memory or memory-mapped, its latents or its image by row.

Reads `neighbors/<shard>.parquet` and `latents/<size>/<shard>.parquet` (or `download/train/<shard>.tar`) through
`FileCache`, the offsets of images from `download/train/<shard>.parquet` and, for aspect-ratio buckets, their sizes from
`embed/train/<shard>.parquet`; writes nothing else.
"""

import gc
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable
from contextlib import ExitStack, suppress

import numpy as np
import numpy.typing as npt

from retrieval.errors import UserError
from retrieval.file_cache import FileCache, NoRoomError
from retrieval.storage import schema
from retrieval.storage.manifest import shard_file
from trainer.data.aspect import read_buckets
from trainer.data.images import ImageTar, decode_image, random_crop, stored_members, unsigned_id
from trainer.data.plan import TrainingSet
from trainer.data.unreadable import Shard, UnreadableError
from trainer.model.context import at_raw_norm

ROOM_S = 60.0
"""Time that other ranks have to close shards when the file cache has no room."""
PAUSE_S = 0.2


class LatentShard:
    """A shard of latents: moments of all views of each row; epoch e uses view e % views.

    With aspect-ratio buckets the table has the moments of other shapes than the square at the start of their places.
    """

    def __init__(self, files: FileCache, training_set: TrainingSet, name: str) -> None:
        resources = _resources_of(self)
        self.ids, self.context = read_neighbors(files, training_set, name, resources)
        self.buckets, self.bucket_rows = _buckets_of(files, training_set, name, self.ids)
        self._shapes = [(2 * channels, height, width) for channels, height, width in training_set.latent_shapes]
        layout = (training_set.views, 2 * int(np.prod(training_set.latent_shape)))
        table_name = f"latents/{training_set.size}/{name}.parquet"
        columns = schema.latents(int(np.prod(layout)))
        table = resources.enter_context(files.table(table_name, columns, columns.names))
        unreadable = training_set.unreadable[training_set.shards.index(name)]
        self._rows = _rows_of(self.ids, table[schema.IMAGE_ID].to_numpy(), files.root.at(table_name), unreadable)
        self._moments = schema.vectors(table, schema.MOMENTS).reshape(-1, *layout)

    def inputs(self, row: int, epoch: int) -> npt.NDArray[np.generic]:
        """Mean and standard deviation, (2c, h, w) float16."""
        if self._rows[row] < 0:
            raise UnreadableError("it has no latents, because 'make latents' could not read it")
        shape = self._shapes[self.buckets[row]]
        moments = self._moments[self._rows[row], epoch % self._moments.shape[1]]
        return moments[: int(np.prod(shape))].reshape(shape)


class ImageShard:
    """A shard of images in a tar: decoded on access, with a new random crop in every epoch."""

    def __init__(self, files: FileCache, training_set: TrainingSet, seed: int, name: str) -> None:
        resources = _resources_of(self)
        self.ids, self.context = read_neighbors(files, training_set, name, resources)
        self.buckets, self.bucket_rows = _buckets_of(files, training_set, name, self.ids)
        self._training_set, self._seed = training_set, seed
        tar = shard_file(files.root, "download", f"train/{name}", ".tar")
        self._tar = ImageTar(resources.enter_context(files.local(tar)), stored_members(files.root, tar))
        resources.callback(self._tar.close)

    def inputs(self, row: int, epoch: int) -> npt.NDArray[np.generic]:
        """A random crop of the image in the shape of its bucket, (3, height, width) float32 in [-1, 1]."""
        image_id, shape = int(self.ids[row]), self._training_set.shapes[self.buckets[row]]
        image = decode_image(self._tar.read(image_id), f"{self._tar.name}: image {image_id}", shape)
        return random_crop(image, (self._seed, epoch, unsigned_id(image_id)), self._training_set.flip)


def _resources_of(shard: object) -> ExitStack:
    """A stack that closes when the shard is no longer used, or could not be opened."""
    resources = ExitStack()
    weakref.finalize(shard, resources.close)
    return resources


def _buckets_of(
    files: FileCache, training_set: TrainingSet, name: str, ids: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], list[npt.NDArray[np.int64]]]:
    """The aspect-ratio bucket of each row of a shard, and the training rows of each bucket."""
    buckets = read_buckets(files.root, name, ids, training_set.shapes)
    training = buckets[: training_set.rows[training_set.shards.index(name)]]
    return buckets, [np.flatnonzero(training == bucket) for bucket in range(len(training_set.shapes))]


def read_neighbors(
    files: FileCache, training_set: TrainingSet, name: str, resources: ExitStack
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float16]]:
    """Ids (rows,) int64 and neighbor embeddings (rows, k, dim) float16 of a shard, at the length that the model takes.

    resources: keeps a memory-mapped table on the disk while the shard is open.
    Raises UserError for another number of rows, or for lengths that the model takes and the table lacks.
    """
    file, layout = f"neighbors/{name}.parquet", schema.neighbors(training_set.k, training_set.dim)
    columns = [schema.IMAGE_ID, schema.NEIGHBOR_EMBEDDINGS, schema.NEIGHBOR_NORMS]
    table = resources.enter_context(files.table(file, layout, columns))
    number = training_set.shards.index(name)
    expected_rows = training_set.rows[number] + training_set.held_out[number]
    if len(table) != expected_rows:
        raise UserError(
            f"{files.root.at(file)} has {len(table)} rows, but its manifest says "
            f"{expected_rows}. Run 'make neighbors' again."
        )
    context = schema.vectors(table, schema.NEIGHBOR_EMBEDDINGS).reshape(-1, training_set.k, training_set.dim)
    if training_set.context_norm == "raw":
        norms = schema.vectors(table, schema.NEIGHBOR_NORMS)
        context = at_raw_norm(context, norms, files.root.at(file))
    return table[schema.IMAGE_ID].to_numpy(), context


def _rows_of(
    ids: npt.NDArray[np.int64], table_ids: npt.NDArray[np.int64], table: str, unreadable: int
) -> npt.NDArray[np.int64]:
    """The row of each id in a table that may have more rows; -1 for at most `unreadable` ids. table: its name."""
    row_of = {image_id: row for row, image_id in enumerate(table_ids.tolist())}
    rows = np.array([row_of.get(image_id, -1) for image_id in ids.tolist()], np.int64)
    missing = ids[rows < 0]
    if len(missing) > unreadable:
        raise UserError(
            f"{table} lacks {len(missing)} images of the neighbors table, the first is {missing[0]}: "
            f"the shards do not match. Run 'make latents' again."
        )
    return rows


class ShardCache:
    """The `capacity` most recently used shards, open. A dropped shard closes when no thread reads it any more."""

    def __init__(self, open_shard: Callable[[int], Shard], capacity: int) -> None:
        self._open, self._capacity = open_shard, capacity
        self._slots: OrderedDict[int, _Slot] = OrderedDict()
        self._lock = threading.Lock()
        self._needs_room = threading.RLock()
        """Held by a thread that closes shards to get room; the others wait for their next shard."""

    def get(self, number: int) -> Shard:
        """The shard with this index. The first thread opens it; others that need the same shard wait.

        Without room in the file cache, other shards are closed. Raises NoRoomError if this is not enough.
        """
        with suppress(NoRoomError):
            return self.open(number)
        deadline = time.monotonic() + ROOM_S
        with self._needs_room:
            while time.monotonic() < deadline:
                # A dropped shard makes room when no thread reads it any more. The store's client leaves exceptions in
                # reference cycles, and their frames refer to shards until the garbage collector runs.
                if not self._drop_oldest(number):
                    gc.collect()
                    time.sleep(PAUSE_S)
                with suppress(NoRoomError):
                    return self.open(number)
        return self.open(number)

    def open(self, number: int) -> Shard:
        """`get` that closes no other shard. Raises NoRoomError at once."""
        with self._needs_room, self._lock:
            slot = self._slots.setdefault(number, _Slot())
            self._slots.move_to_end(number)
            if len(self._slots) > self._capacity:
                self._slots.popitem(last=False)
        with slot.lock:
            if slot.shard is None:
                slot.shard = self._open(number)
            return slot.shard

    def _drop_oldest(self, kept: int) -> bool:
        """Drop the least recently used shard other than `kept`. False: there is none."""
        with self._lock:
            others = [number for number in self._slots if number != kept]
            return bool(others) and self._slots.pop(others[0]) is not None


class _Slot:
    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.shard: Shard | None = None
