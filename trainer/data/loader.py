"""Loads training batches: each shard of images or latents is joined with the same shard of neighbors.

Reads `neighbors/<shard>.parquet` and `latents/<size>/<shard>.parquet` (or `download/train/<shard>.tar`); writes
nothing. Threads prepare batches ahead of the training step. The content of a batch depends only on the seed and the
step, so a run resumes from its step counter, and the number of ranks or threads has no effect.
"""

import threading
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from retrieval.errors import UserError
from retrieval.storage import schema
from retrieval.storage.manifest import shard_file
from retrieval.storage.root import Root
from trainer.data.images import ImageTar, decode_image, random_crop, unsigned_id
from trainer.data.plan import TrainingPlan, TrainingSet
from trainer.data.sample_order import NEIGHBORS, REPLACEMENTS, SAMPLE_NOISE, SampleOrder, rank_slots
from trainer.data.unreadable import Shard, UnreadableError, read_or_replace, retried
from trainer.model.context import at_raw_norm, unit_rows


@dataclass(frozen=True)
class TrainingBatch:
    """The n samples of a global batch that one rank trains on."""

    image_ids: npt.NDArray[np.int64]
    inputs: torch.Tensor
    """Mean and deviation of latents, (n, 2c, h, w) float16, or images, (n, 3, size, size) float32."""
    context: torch.Tensor
    """Neighbor embeddings, best first, (n, tokens, dim) float16; zeros for samples without neighbors."""
    timesteps: torch.Tensor
    """t, (n,) int64."""
    posterior_noise: torch.Tensor
    """Noise that draws the latent from its posterior: (n, c, h, w) float32, standard normal."""
    noise: torch.Tensor
    """eps: (n, c, h, w) float32, standard normal."""
    replaced: npt.NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, bool))
    """True for samples of a row that took the place of an unreadable one, (n,); may be empty for none."""

    def split(self, count: int) -> "Iterator[TrainingBatch]":
        """Parts of `count` samples, in order; the last may be smaller."""
        for first in range(0, len(self.image_ids), count):
            rows = slice(first, first + count)
            yield TrainingBatch(*(getattr(self, name)[rows] for name in self.__dataclass_fields__))


class LatentShard:
    """A shard of latents: moments (views, 2c, h, w) of each row; epoch e uses view e % views."""

    def __init__(self, root: Root, training_set: TrainingSet, name: str) -> None:
        self.ids, self.context = read_neighbors(root, training_set, name)
        channels, height, width = training_set.latent_shape
        layout = (training_set.views, 2 * channels, height, width)
        table_name = f"latents/{training_set.size}/{name}.parquet"
        table = schema.read_table(root, table_name, schema.latents(int(np.prod(layout))))
        unreadable = training_set.unreadable[training_set.shards.index(name)]
        self._rows = _rows_of(self.ids, table[schema.IMAGE_ID].to_numpy(), root.at(table_name), unreadable)
        self._moments = schema.vectors(table, schema.MOMENTS).reshape(-1, *layout)

    def inputs(self, row: int, epoch: int) -> npt.NDArray[np.generic]:
        """Mean and standard deviation, (2c, h, w) float16."""
        if self._rows[row] < 0:
            raise UnreadableError("it has no latents, because 'make latents' could not read it")
        return self._moments[self._rows[row], epoch % self._moments.shape[1]]


class ImageShard:
    """A shard of images in a tar: decoded on access, with a new random crop in every epoch."""

    def __init__(self, root: Root, training_set: TrainingSet, seed: int, name: str) -> None:
        self.ids, self.context = read_neighbors(root, training_set, name)
        self._training_set, self._seed = training_set, seed
        resources = ExitStack()
        tar = shard_file(root, "download", f"train/{name}", ".tar")
        self._tar = ImageTar(resources.enter_context(root.local(tar)))
        resources.callback(self._tar.close)
        weakref.finalize(self, resources.close)

    def inputs(self, row: int, epoch: int) -> npt.NDArray[np.generic]:
        """A random crop of the image, (3, size, size) float32 in [-1, 1]."""
        image_id, size = int(self.ids[row]), self._training_set.size
        image = decode_image(self._tar.read(image_id), f"{self._tar.name}: image {image_id}", size)
        return random_crop(image, (self._seed, epoch, unsigned_id(image_id)), self._training_set.flip)


def read_neighbors(
    root: Root, training_set: TrainingSet, name: str
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float16]]:
    """Ids (rows,) int64 and neighbor embeddings (rows, k, dim) float16 of a shard, at the length that the model takes.

    Raises UserError for another number of rows, or for lengths that the model takes and the table lacks.
    """
    columns = schema.neighbors(training_set.k, training_set.dim)
    table = schema.read_table(root, f"neighbors/{name}.parquet", columns)
    number = training_set.shards.index(name)
    expected_rows = training_set.rows[number] + training_set.held_out[number]
    if len(table) != expected_rows:
        raise UserError(
            f"{root.at(f'neighbors/{name}.parquet')} has {len(table)} rows, but its manifest says "
            f"{expected_rows}. Run 'make neighbors' again."
        )
    context = schema.vectors(table, schema.NEIGHBOR_EMBEDDINGS).reshape(-1, training_set.k, training_set.dim)
    if training_set.context_norm == "raw":
        norms = schema.vectors(table, schema.NEIGHBOR_NORMS)
        context = at_raw_norm(context, norms, root.at(f"neighbors/{name}.parquet"))
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

    def get(self, number: int) -> Shard:
        """The shard with this index. The first thread opens it; others that need the same shard wait."""
        with self._lock:
            slot = self._slots.setdefault(number, _Slot())
            self._slots.move_to_end(number)
            if len(self._slots) > self._capacity:
                self._slots.popitem(last=False)
        with slot.lock:
            if slot.shard is None:
                slot.shard = self._open(number)
            return slot.shard


class _Slot:
    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.shard: Shard | None = None


class Loader:
    """The training batches of one rank, prepared by threads and returned in order of steps."""

    def __init__(self, plan: TrainingPlan, root: Root, rank: int, world: int, shift: int = 0) -> None:
        """shift: positions that global batch s begins after s * global_batch, if the batch was changed earlier."""
        self._shift = shift
        self._train, self._training_set = plan.config.train, plan.training_set
        self._timesteps = plan.config.diffusion.steps
        self._rank, self._world = rank, world
        self.order = SampleOrder(plan.training_set.rows, self._train.seed, self._train.interleaved_shards)
        # Two per lane: a thread may open the next shard of a lane while another still reads the previous one.
        capacity = 2 * (self._train.interleaved_shards // world + 1) + self._train.workers
        self._shards = ShardCache(self._opener(root), capacity)

    def _opener(self, root: Root) -> Callable[[int], Shard]:
        training_set, seed = self._training_set, self._train.seed
        if training_set.source == "latents":
            return lambda number: LatentShard(root, training_set, training_set.shards[number])
        return lambda number: ImageShard(root, training_set, seed, training_set.shards[number])

    def shard(self, number: int) -> Shard:
        """The shard with this index in the training set, including its held-out rows."""
        return retried(lambda: self._shards.get(number))

    def held_out(self, number: int, row: int) -> tuple[int, npt.NDArray[np.generic]]:
        """A held-out row of a shard and its inputs as in epoch 0; an unreadable row is replaced by another one."""
        first = self._training_set.rows[number]
        rows = range(first, first + self._training_set.held_out[number])
        return read_or_replace(self.shard(number), row, 0, rows, (REPLACEMENTS, self._train.seed, number, row))

    def batches(self, first_step: int, last_step: int) -> Generator[TrainingBatch]:
        """Batches of steps first_step .. last_step - 1 (from 0)."""
        with ThreadPoolExecutor(self._train.workers, thread_name_prefix="loader") as pool:
            steps = iter(range(first_step, last_step))
            first = islice(steps, self._train.prefetch_batches)
            ahead = deque(pool.submit(self.batch, step) for step in first)
            try:
                while ahead:
                    batch = ahead.popleft().result()
                    ahead.extend(pool.submit(self.batch, step) for step in islice(steps, 1))
                    yield batch
            finally:
                pool.shutdown(cancel_futures=True)

    def batch(self, step: int) -> TrainingBatch:
        """This rank's samples of global batch `step` (from 0); independent of earlier calls."""
        count = self._train.global_batch
        first = self._shift + step * count
        slots = rank_slots(self.order, first, count, self._rank, self._world)
        samples = [self._sample(step, int(slot), first + int(slot)) for slot in slots]
        ids, inputs, context, timesteps, posterior_noise, noise, replaced = zip(*samples, strict=True)
        return TrainingBatch(
            image_ids=np.array(ids),
            inputs=torch.from_numpy(np.stack(inputs)),
            context=torch.from_numpy(np.stack(context)),
            timesteps=torch.tensor(timesteps),
            posterior_noise=torch.from_numpy(np.stack(posterior_noise)),
            noise=torch.from_numpy(np.stack(noise)),
            replaced=np.array(replaced),
        )

    def _sample(self, step: int, slot: int, position: int) -> tuple[Any, ...]:
        location = self.order.locate(position)
        shard, rows = self.shard(location.shard), range(self._training_set.rows[location.shard])
        rng = np.random.default_rng([SAMPLE_NOISE, self._train.seed, step, slot])
        timestep = int(rng.integers(self._timesteps))
        has_context = np.float16(rng.random() >= self._train.p_uncond)
        posterior_noise, noise = rng.standard_normal((2, *self._training_set.latent_shape), dtype=np.float32)
        # A sample without neighbors has a context of zeros. Any number of zero tokens equals one: their keys
        # and values are zero because the projections have no bias.
        seeds = (REPLACEMENTS, self._train.seed, step, slot)
        row, inputs = read_or_replace(shard, location.row, location.epoch, rows, seeds)
        context = self._context(shard.context[row], step, slot) * has_context
        return int(shard.ids[row]), inputs, context, timestep, posterior_noise, noise, row != location.row

    def _context(self, neighbors: npt.NDArray[np.float16], step: int, slot: int) -> npt.NDArray[np.float16]:
        """A row's neighbors (k, dim) after `neighbors_used` and `neighbor_noise`: (tokens, dim)."""
        tokens, deviation = self._train.neighbors_used or len(neighbors), self._train.neighbor_noise
        if tokens == len(neighbors) and not deviation:
            return neighbors
        # A separate random stream: these settings do not change the noise or timestep of a sample.
        rng = np.random.default_rng([NEIGHBORS, self._train.seed, step, slot])
        chosen = np.sort(rng.permutation(len(neighbors))[:tokens])
        if not deviation:
            return neighbors[chosen]
        noise = rng.standard_normal((len(chosen), neighbors.shape[1]), dtype=np.float32)
        rows, is_raw = neighbors[chosen].astype(np.float32), self._training_set.context_norm == "raw"
        lengths = np.linalg.norm(rows, axis=1, keepdims=True) if is_raw else np.float32(1)
        return (lengths * unit_rows(rows + deviation * lengths * noise)).astype(np.float16)
