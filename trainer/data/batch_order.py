"""The order of global batches over aspect-ratio buckets, a pure function of the seed and the step.

The samples of a bucket form an endless sequence (`SampleOrder`), and batches of the bucket are consecutive parts of it.
Every epoch of a bucket has each of its images once. Images that do not fill a batch are in the first batch of the next
epoch. An epoch of the training mixes the batches of all buckets so that each bucket advances at an even rate, because
then all buckets read the same shards at a time. With one bucket the batches are those of its sequence.
"""

import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from retrieval.errors import UserError
from retrieval.storage import schema
from retrieval.storage.manifest import settings_fingerprint
from retrieval.storage.root import Root
from trainer.data.aspect import read_buckets
from trainer.data.plan import TrainingPlan, TrainingSet
from trainer.data.sample_order import BATCHES, SampleOrder

COUNTS = "buckets"
"""The folder of the numbers of rows by bucket, in the root."""
THREADS = 32
"""Tables that are read at once when images are counted."""

log = logging.getLogger("train")


@dataclass(frozen=True, eq=False)
class BatchOrder:
    """The endless sequence of global batches. orders: the samples of each bucket; batch: samples of a batch."""

    orders: tuple[SampleOrder, ...]
    batch: int
    seed: int
    shift: int = 0
    """Positions that batch s begins after s * batch. Only for one bucket."""

    def locate(self, step: int) -> tuple[int, int]:
        """The bucket of a batch, and the position of its first sample in the order of the bucket."""
        epoch = step * self.batch // sum(order.samples_per_epoch for order in self.orders)
        while self.first_step(epoch + 1) <= step:
            epoch += 1
        buckets, numbers = _mixed_batches(self, epoch)
        i = step - self.first_step(epoch)
        return int(buckets[i]), self.shift + int(numbers[i]) * self.batch

    def first_step(self, epoch: int) -> int:
        """The first batch of an epoch: each bucket has finished as many batches as its samples before fill."""
        return sum(self.finished(bucket, epoch) for bucket in range(len(self.orders)))

    def finished(self, bucket: int, epoch: int) -> int:
        """Number of batches of a bucket before an epoch."""
        return epoch * self.orders[bucket].samples_per_epoch // self.batch


@lru_cache(maxsize=4)
def _mixed_batches(order: BatchOrder, epoch: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Bucket and number of each batch of an epoch.

    Batch i of the m of a bucket has a random time between i / m and (i + 1) / m.
    """
    rng = np.random.default_rng([BATCHES, order.seed, epoch])
    buckets, numbers, times = [], [], []
    for bucket in range(len(order.orders)):
        batches = np.arange(order.finished(bucket, epoch), order.finished(bucket, epoch + 1))
        buckets.append(np.full(len(batches), bucket))
        numbers.append(batches)
        times.append((np.arange(len(batches)) + rng.random(len(batches))) / max(1, len(batches)))
    mixed = np.argsort(np.concatenate(times), kind="stable")
    return np.concatenate(buckets)[mixed], np.concatenate(numbers)[mixed]


def make_batch_order(plan: TrainingPlan, root: Root, shift: int) -> BatchOrder:
    """The order of a run. shift: of a batch that was changed. Raises UserError if there are buckets, too."""
    train = plan.config.train
    if shift and train.aspect_step:
        raise UserError(
            "train.global_batch was changed since the start of this run, which has aspect-ratio buckets: their batches "
            "have no position to go on from. Restore it, or choose another train.name."
        )
    counts = bucket_rows(plan, root)
    orders = tuple(SampleOrder(tuple(rows), train.seed, train.interleaved_shards) for rows in counts)
    return BatchOrder(orders, train.global_batch, train.seed, shift)


def bucket_rows(plan: TrainingPlan, root: Root) -> list[list[int]]:
    """Number of training rows of each bucket in each shard.

    With several buckets the first call for a training set reads two files of each shard and writes the numbers to
    `buckets/<fingerprint>.json`; later calls read only this file.
    """
    training_set = plan.training_set
    if len(training_set.shapes) == 1:
        return [list(training_set.rows)]
    settings = {"size": training_set.size, "aspect_step": training_set.aspect_step, "rows": training_set.rows}
    inputs = {name: plan.upstream[name] for name in ("neighbors", "embed")}
    name = f"{COUNTS}/{settings_fingerprint(COUNTS, schema.VERSION, settings, inputs)}.json"
    counts: list[list[int]] | None = root.find_json(name)
    if counts is None:
        shapes, shards = len(training_set.shapes), len(training_set.shards)
        log.info(f"counting the images of {shapes} aspect ratios in {shards:,} shards")
        counts = _count(root, training_set)
        root.write_json(name, counts)
    return counts


def _count(root: Root, training_set: TrainingSet) -> list[list[int]]:
    """Number of training rows of each bucket in each shard. Reads the ids and sizes of all images."""
    layout = schema.neighbors(training_set.k, training_set.dim)
    count = len(training_set.shapes)

    def rows_of(shard: str, rows: int) -> list[int]:
        table = schema.read_table(root, f"neighbors/{shard}.parquet", layout, [schema.IMAGE_ID])
        ids = table[schema.IMAGE_ID].to_numpy()[:rows]
        return np.bincount(read_buckets(root, shard, ids, training_set.shapes), minlength=count).tolist()

    with ThreadPoolExecutor(THREADS) as pool:
        counts = list(pool.map(rows_of, training_set.shards, training_set.rows))
    return [[shard[bucket] for shard in counts] for bucket in range(count)]
