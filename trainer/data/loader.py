"""The training set as a stream of batches: shard n of images or latents joined with shard n of neighbors.

Reads `neighbors/<shard>.parquet` and `latents/<size>/<shard>.parquet` (or `download/train/<shard>.tar`);
writes nothing. Batches are built ahead by threads; what is in one depends on the seed and the step
alone, so a run resumes from its step counter and any number of ranks and threads sees the same.
"""

import threading
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from retrieval.errors import UserError
from retrieval.storage import schema
from retrieval.storage.root import Root
from trainer.data.images import ImageTar, decode, random_crop, unsigned
from trainer.data.plan import Plan, Samples
from trainer.data.sample_order import DRAWS, NEIGHBORS, Order, rank_slots
from trainer.model.context import unit_rows


@dataclass(frozen=True)
class Batch:
    """A rank's share of a global batch, n samples."""

    image_ids: npt.NDArray[np.int64]
    inputs: torch.Tensor
    """(n, 2c, h, w) float16 mean and standard deviation of latents, or (n, 3, size, size) float32 images."""
    context: torch.Tensor
    """(n, tokens, dim) float16 neighbor embeddings, best first; all zero where they are withheld."""
    timesteps: torch.Tensor
    """(n,) int64."""
    posterior_noise: torch.Tensor
    """(n, c, h, w) float32, standard normal: which latent is drawn."""
    noise: torch.Tensor
    """(n, c, h, w) float32, standard normal: eps."""

    def split(self, count: int) -> "Iterator[Batch]":
        """Pieces of `count` samples, in order."""
        for first in range(0, len(self.image_ids), count):
            piece = slice(first, first + count)
            yield Batch(*(getattr(self, name)[piece] for name in self.__dataclass_fields__))


class Shard(Protocol):
    """One shard, open: its neighbor embeddings in memory, its images or latents at hand."""

    ids: npt.NDArray[np.int64]
    context: npt.NDArray[np.float16]

    def inputs(self, row: int, epoch: int) -> npt.NDArray[np.generic]:
        """The image or the moments of a row, as an epoch sees them."""


class LatentShard:
    """Moments of several views of each image, (views, 2c, h, w) a row; epoch e sees view e % views."""

    def __init__(self, root: Root, samples: Samples, name: str) -> None:
        self.ids, self.context = read_neighbors(root, samples, name)
        channels, height, width = samples.latent_shape
        layout = (samples.views, 2 * channels, height, width)
        table_name = f"latents/{samples.size}/{name}.parquet"
        table = schema.read_table(root, table_name, schema.latents(int(np.prod(layout))))
        rows = _rows_of(self.ids, table[schema.IMAGE_ID].to_numpy(), root.at(table_name))
        self._moments = schema.vectors(table.take(pa.array(rows)), schema.MOMENTS).reshape(-1, *layout)

    def inputs(self, row: int, epoch: int) -> npt.NDArray[np.generic]:
        """Mean and standard deviation, (2c, h, w) float16."""
        return self._moments[row, epoch % self._moments.shape[1]]


class ImageShard:
    """Images of a tar, decoded when asked for and cut anew in every epoch."""

    def __init__(self, root: Root, samples: Samples, seed: int, name: str) -> None:
        self.ids, self.context = read_neighbors(root, samples, name)
        self._samples, self._seed = samples, seed
        fetched = ExitStack()
        self._tar = ImageTar(fetched.enter_context(root.local(f"download/train/{name}.tar")))
        fetched.callback(self._tar.close)
        weakref.finalize(self, fetched.close)

    def inputs(self, row: int, epoch: int) -> npt.NDArray[np.generic]:
        """A random square of the image, (3, size, size) float32 in [-1, 1]."""
        image_id = int(self.ids[row])
        image = decode(self._tar.read(image_id), f"{self._tar.where}: image {image_id}", self._samples.size)
        seeds = (self._seed, epoch, unsigned(image_id))
        return random_crop(image, seeds, self._samples.flip)


def read_neighbors(
    root: Root, samples: Samples, name: str
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float16]]:
    """Ids (rows,) and neighbor embeddings (rows, k, dim) of a shard, checked against the plan."""
    table = schema.read_table(root, f"neighbors/{name}.parquet", schema.neighbors(samples.k, samples.dim))
    number = samples.shards.index(name)
    wanted = samples.rows[number] + samples.held_out[number]
    if len(table) != wanted:
        where = root.at(f"neighbors/{name}.parquet")
        raise UserError(
            f"{where} has {len(table)} rows, its manifest says {wanted}. Run 'make neighbors' again."
        )
    context = schema.vectors(table, schema.NEIGHBOR_EMBEDDINGS)
    return table[schema.IMAGE_ID].to_numpy(), context.reshape(-1, samples.k, samples.dim)


def _rows_of(ids: npt.NDArray[np.int64], among: npt.NDArray[np.int64], where: str) -> npt.NDArray[np.int64]:
    """The row of each id in a table that keeps the same order but may have more rows."""
    order = np.argsort(among, kind="stable")
    rows = order[np.minimum(np.searchsorted(among, ids, sorter=order), len(among) - 1)]
    missing = ids[among[rows] != ids]
    if len(missing):
        raise UserError(
            f"{where} lacks {len(missing)} images of the neighbors table, the first is {missing[0]}: "
            f"the shards do not line up. Run 'make latents' again."
        )
    return rows


class ShardCache:
    """The shards in use, each opened once; the least recently used is let go when there are too many.

    A shard closes when nobody refers to it, so one that a thread still reads stays open.
    """

    def __init__(self, open_shard: Callable[[int], Shard], capacity: int) -> None:
        self._open, self._capacity = open_shard, capacity
        self._slots: OrderedDict[int, _Slot] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, number: int) -> Shard:
        """Shard `number`, opened by the first thread that asks while others of that shard wait."""
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
    """Batches of one rank from step `first_step` on, built ahead by threads and handed out in order."""

    def __init__(self, plan: Plan, root: Root, rank: int, world: int) -> None:
        self._train, self._samples = plan.config.train, plan.samples
        self._timesteps = plan.config.diffusion.steps
        self._rank, self._world = rank, world
        self.order = Order(plan.samples.rows, self._train.seed, self._train.lanes)
        # Two a lane: threads ahead may open the next shard of a lane while the last is still read.
        capacity = 2 * (self._train.lanes // world + 1) + self._train.workers
        self._shards = ShardCache(self._opener(root), capacity)

    def _opener(self, root: Root) -> Callable[[int], Shard]:
        samples, seed = self._samples, self._train.seed
        if samples.source == "latents":
            return lambda number: LatentShard(root, samples, samples.shards[number])
        return lambda number: ImageShard(root, samples, seed, samples.shards[number])

    def shard(self, number: int) -> Shard:
        """Shard `number` of the plan, held-out rows included."""
        return self._shards.get(number)

    def batches(self, first_step: int, last_step: int) -> Generator[Batch]:
        """Batches of steps first_step .. last_step - 1 (0-based)."""
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

    def batch(self, step: int) -> Batch:
        """This rank's share of global batch `step`, whatever was asked before."""
        count = self._train.global_batch
        slots = rank_slots(self.order, step, count, self._rank, self._world)
        samples = [self._sample(step, int(slot), step * count + int(slot)) for slot in slots]
        ids, inputs, context, timesteps, posterior_noise, noise = zip(*samples, strict=True)
        return Batch(
            image_ids=np.array(ids),
            inputs=torch.from_numpy(np.stack(inputs)),
            context=torch.from_numpy(np.stack(context)),
            timesteps=torch.tensor(timesteps),
            posterior_noise=torch.from_numpy(np.stack(posterior_noise)),
            noise=torch.from_numpy(np.stack(noise)),
        )

    def _sample(self, step: int, slot: int, position: int) -> tuple[Any, ...]:
        place = self.order.place(position)
        shard = self._shards.get(place.shard)
        rng = np.random.default_rng([DRAWS, self._train.seed, step, slot])
        timestep = int(rng.integers(self._timesteps))
        kept = np.float16(rng.random() >= self._train.p_uncond)
        posterior_noise, noise = rng.standard_normal((2, *self._samples.latent_shape), dtype=np.float32)
        # Withholding all k makes the context zero. That equals one zero token: keys and values of a zero
        # token are zero, as their projections have no bias, so attention gives the same for any number.
        context = self._context(shard.context[place.row], step, slot) * kept
        inputs = shard.inputs(place.row, place.epoch)
        return int(shard.ids[place.row]), inputs, context, timestep, posterior_noise, noise

    def _context(self, neighbors: npt.NDArray[np.float16], step: int, slot: int) -> npt.NDArray[np.float16]:
        """Some of a row's neighbors (k, dim), turned by noise, as the recipe asks; else all, as they are."""
        used, deviation = self._train.neighbors_used or len(neighbors), self._train.neighbor_noise
        if used == len(neighbors) and not deviation:
            return neighbors
        # A stream of its own: what else is drawn for a sample does not change with these settings.
        rng = np.random.default_rng([NEIGHBORS, self._train.seed, step, slot])
        chosen = np.sort(rng.permutation(len(neighbors))[:used])
        if not deviation:
            return neighbors[chosen]
        noise = rng.standard_normal((len(chosen), neighbors.shape[1]), dtype=np.float32)
        return unit_rows(neighbors[chosen] + deviation * noise).astype(np.float16)
