"""Loads training batches: each shard of images or latents is joined with the same shard of neighbors.

Threads prepare batches ahead of the training step, and one thread opens shards of an object store ahead of their need.
They are no processes, because decoding releases Python's lock. On a GPU batches are in pinned memory, from which copies
are asynchronous; a stream of their own would save 2.4 % of a step for images and 0.2 % for latents
(docs/loader.md).
The content of a batch depends only on the seed and the step, so a run resumes from its step counter, and the number of
ranks or threads has no effect.
"""

import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from retrieval.errors import UserError
from retrieval.file_cache import FileCache
from retrieval.storage.root import Root
from trainer.data.batch_order import make_batch_order
from trainer.data.plan import TrainingPlan, check_table
from trainer.data.sample_order import NEIGHBORS, REPLACEMENTS, SAMPLE_NOISE, SampleLocation, rank_slots
from trainer.data.shards import ImageShard, LatentShard, ShardCache
from trainer.data.timesteps import draw_timestep, timestep_distribution
from trainer.data.unreadable import Shard, read_or_replace, retried
from trainer.model.context import unit_rows

WAIT_S = 0.1
"""Pause of the thread that opens shards ahead, while enough are open or the cache has no room."""


@dataclass(frozen=True)
class TrainingBatch:
    """The n samples of a global batch that one rank trains on."""

    image_ids: npt.NDArray[np.int64]
    inputs: torch.Tensor
    """Mean and deviation of latents, (n, 2c, h, w) float16, or images, (n, 3, height, width) float32."""
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

    def pinned(self) -> "TrainingBatch":
        """The same batch in pinned memory, from which a copy to a GPU does not wait for the GPU."""
        tensors: dict[str, Any] = {
            name: value.pin_memory() for name, value in vars(self).items() if isinstance(value, torch.Tensor)
        }
        return replace(self, **tensors)

    def split(self, count: int) -> "Iterator[TrainingBatch]":
        """Parts of `count` samples, in order; the last may be smaller."""
        for first in range(0, len(self.image_ids), count):
            rows = slice(first, first + count)
            yield TrainingBatch(*(getattr(self, name)[rows] for name in self.__dataclass_fields__))


class Loader:
    """The training batches of one rank, prepared by threads and returned in order of steps."""

    def __init__(self, plan: TrainingPlan, root: Root, rank: int, world: int, shift: int = 0) -> None:
        """shift: positions that global batch s begins after s * global_batch, if the batch was changed earlier."""
        self._train, self._training_set = plan.config.train, plan.training_set
        self._timesteps = plan.config.diffusion.steps
        self._distribution = timestep_distribution(self._train, self._timesteps)
        self._rank, self._world = rank, world
        self.order = make_batch_order(plan, root, shift)
        files = FileCache(root, self._train.cache_folder, self._train.cache_gb)
        self._lanes = self._train.interleaved_shards // world + 1
        if len(self.order.orders) > 1:
            self._lanes *= 2  # buckets are nearly, but not exactly, equally far in the shards
        self._ahead = 0 if root.is_local else self._lanes
        """Number of shards that are opened before the step that needs them."""
        self._step = 0
        """The last step whose batch was begun."""
        # Two per lane: a thread may open the next shard of a lane while another still reads the previous one.
        self._shards = ShardCache(self._opener(plan, files), 2 * self._lanes + self._ahead + self._train.workers)

    def _opener(self, plan: TrainingPlan, files: FileCache) -> Callable[[int], Shard]:
        training_set, seed = self._training_set, self._train.seed

        def open_shard(number: int) -> Shard:
            name = training_set.shards[number]
            try:
                if training_set.source == "latents":
                    return LatentShard(files, training_set, name)
                return ImageShard(files, training_set, seed, name)
            finally:
                check_table(plan, files.root, number)  # its error explains any other error of a changed shard

        return open_shard

    def shard(self, number: int) -> Shard:
        """The shard with this index in the training set, including its held-out rows."""
        return retried(lambda: self._shards.get(number))

    def held_out(self, number: int, row: int) -> tuple[int, npt.NDArray[np.generic]]:
        """A held-out row of a shard and its inputs as in epoch 0; an unreadable row is replaced by another one."""
        shard, first = self.shard(number), self._training_set.rows[number]
        rows = first + np.flatnonzero(shard.buckets[first:] == shard.buckets[row])
        return read_or_replace(shard, row, 0, rows, (REPLACEMENTS, self._train.seed, number, row))

    def batches(self, first_step: int, last_step: int) -> Generator[TrainingBatch]:
        """Batches of steps first_step .. last_step - 1 (from 0)."""
        ended = threading.Event()
        # With an object store one more thread, which opens shards.
        with ThreadPoolExecutor(self._train.workers + bool(self._ahead), thread_name_prefix="loader") as pool:
            self._step = first_step
            if self._ahead:
                pool.submit(self._open_ahead, first_step, last_step, ended)
            steps = iter(range(first_step, last_step))
            first = islice(steps, self._train.prefetch_batches)
            ahead = deque(pool.submit(self.batch, step) for step in first)
            try:
                while ahead:
                    batch = ahead.popleft().result()
                    ahead.extend(pool.submit(self.batch, step) for step in islice(steps, 1))
                    yield batch
            finally:
                ended.set()
                pool.shutdown(cancel_futures=True)

    def _open_ahead(self, first_step: int, last_step: int, ended: threading.Event) -> None:
        """Open this rank's shards in the order of need, at most `_ahead` of them before the step that needs them."""
        opened: deque[int] = deque()
        for step, number in self.openings(first_step, last_step):
            opened.append(step)
            while not ended.is_set() and step > self._step:
                while opened and opened[0] <= self._step:
                    opened.popleft()
                # Errors are raised by the thread that needs the shard; without room in the cache it closes others.
                with suppress(OSError, UserError):
                    if len(opened) <= self._ahead:
                        self._shards.open(number)
                        break
                ended.wait(WAIT_S)
            if ended.is_set():
                return

    def openings(self, first_step: int, last_step: int) -> Iterator[tuple[int, int]]:
        """The shards that this rank opens and the steps that need them, in order. A shard may come several times."""
        recent: OrderedDict[int, None] = OrderedDict()
        count = self._train.global_batch
        for step in range(first_step, last_step):
            bucket, first = self.order.locate(step)
            order = self.order.orders[bucket]
            for slot in rank_slots(order, first, count, self._rank, self._world):
                number = order.shard_at(first + int(slot))
                if number not in recent:
                    yield step, number
                recent[number] = None
                recent.move_to_end(number)
                if len(recent) > self._lanes + 1:
                    recent.popitem(last=False)

    def batch(self, step: int) -> TrainingBatch:
        """This rank's samples of global batch `step` (from 0); independent of earlier calls."""
        self._step = max(self._step, step)
        bucket, first = self.order.locate(step)
        order, count = self.order.orders[bucket], self._train.global_batch
        slots = rank_slots(order, first, count, self._rank, self._world)
        samples = [self._sample(step, int(slot), bucket, order.locate(first + int(slot))) for slot in slots]
        ids, inputs, context, timesteps, posterior_noise, noise, replaced = zip(*samples, strict=True)
        batch = TrainingBatch(
            image_ids=np.array(ids),
            inputs=torch.from_numpy(np.stack(inputs)),
            context=torch.from_numpy(np.stack(context)),
            timesteps=torch.tensor(timesteps),
            posterior_noise=torch.from_numpy(np.stack(posterior_noise)),
            noise=torch.from_numpy(np.stack(noise)),
            replaced=np.array(replaced),
        )
        return batch.pinned() if torch.cuda.is_initialized() else batch

    def _sample(self, step: int, slot: int, bucket: int, location: SampleLocation) -> tuple[Any, ...]:
        """location: of the sample among the rows of its bucket."""
        shard = self.shard(location.shard)
        rows = shard.bucket_rows[bucket]
        wanted = int(rows[location.row])
        rng = np.random.default_rng([SAMPLE_NOISE, self._train.seed, step, slot])
        timestep = draw_timestep(rng, self._timesteps, self._distribution)
        has_context = np.float16(rng.random() >= self._train.p_uncond)
        posterior_noise, noise = rng.standard_normal((2, *self._training_set.latent_shapes[bucket]), dtype=np.float32)
        # A sample without neighbors has a context of zeros. Any number of zero tokens equals one: their keys
        # and values are zero because the projections have no bias.
        seeds = (REPLACEMENTS, self._train.seed, step, slot)
        row, inputs = read_or_replace(shard, wanted, location.epoch, rows, seeds)
        context = self._context(shard.context[row], step, slot) * has_context
        return int(shard.ids[row]), inputs, context, timestep, posterior_noise, noise, row != wanted

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
