"""The loss on held-out images, with fixed noise and timesteps.

Reads the held-out rows once and keeps their moments in memory; writes nothing. Each rank computes the losses
of its share; the mean over all samples does not depend on the number of ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import deepspeed.comm as dist
import numpy as np
import numpy.typing as npt
import torch

from trainer.data.loader import Loader, TrainingBatch
from trainer.data.plan import TrainingPlan, TrainingSet
from trainer.data.sample_order import VALIDATION
from trainer.engine.deepspeed_engine import Ranks
from trainer.model.autoencoder import Autoencoder
from trainer.tracking.training_log import Quartiles
from trainer.training.objective import QUARTILES, Objective, quartile_means


@dataclass(frozen=True)
class HeldOut:
    """Held-out images: ids (n,), moments (n, 2c, h, w) float16, contexts (n, tokens, dim) float16."""

    image_ids: npt.NDArray[np.int64]
    moments: torch.Tensor
    context: torch.Tensor

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(c, h, w) of a latent."""
        _, channels, height, width = self.moments.shape
        return channels // 2, height, width


def held_out_rows(training_set: TrainingSet) -> list[tuple[int, int]]:
    """Shard index and row of every held-out image, in order."""
    counts = zip(training_set.rows, training_set.held_out, strict=True)
    return [(shard, rows + i) for shard, (rows, count) in enumerate(counts) for i in range(count)]


def parts_of_one_shape(loader: Loader, rows: list[tuple[int, int]], size: int) -> list[list[int]]:
    """Indices of held-out rows in parts of at most `size` rows with the shape of one aspect-ratio bucket."""
    indices: dict[int, list[int]] = {}
    for index, (number, row) in enumerate(rows):
        indices.setdefault(int(loader.shard(number).buckets[row]), []).append(index)
    return [of_shape[first : first + size] for of_shape in indices.values() for first in range(0, len(of_shape), size)]


def read_held_out(
    plan: TrainingPlan, loader: Loader, rows: list[tuple[int, int]], autoencoder: Autoencoder | None
) -> HeldOut:
    """Read held-out rows of one shape as in epoch 0, with as many neighbors as in training.

    autoencoder: of images to latents; None reads latents. Other held-out rows take the place of those that
    cannot be read.
    """
    tokens, batch_size = plan.config.train.context_tokens, plan.config.train.micro_batch
    ids, contexts, moments = [], [], []
    for first in range(0, len(rows), batch_size):
        batch = []
        for number, held_out_row in rows[first : first + batch_size]:
            row, inputs = loader.held_out(number, held_out_row)
            shard = loader.shard(number)
            ids.append(shard.ids[row])
            contexts.append(shard.context[row][:tokens])
            batch.append(inputs)
        stacked = torch.from_numpy(np.stack(batch))
        moments.append(stacked if autoencoder is None else autoencoder.encode_moments(stacked).half().cpu())
    return HeldOut(np.array(ids), torch.cat(moments), torch.from_numpy(np.stack(contexts)))


class ValidationSet:
    """A rank's share of the held-out images with fixed noise, and the loss over all ranks.

    Image i (from 0) has a fixed timestep in quartile i % QUARTILES and fixed noise, equal for all runs on
    these images, so that their losses can be compared. All samples have their neighbors.
    """

    def __init__(self, plan: TrainingPlan, loader: Loader, autoencoder: Autoencoder | None, ranks: Ranks) -> None:
        self._ranks = ranks
        self._objective = Objective(plan.config.diffusion, None, ranks.device)
        rows = held_out_rows(plan.training_set)
        indices = list(range(ranks.rank, len(rows), ranks.world))
        self._counted = len(indices)
        # Under ZeRO 3 a forward pass is a collective, so the last image is repeated to make shares equal.
        indices += [len(rows) - 1] * (-(-len(rows) // ranks.world) - len(indices))
        # Parts have one shape: with aspect-ratio buckets they are single images, as many on every rank.
        size = plan.config.train.micro_batch if len(plan.training_set.shapes) == 1 else 1
        parts = [indices[first : first + size] for first in range(0, len(indices), size)]
        images = (read_held_out(plan, loader, [rows[index] for index in part], autoencoder) for part in parts)
        self._batches = [fixed_batch(held_out, part, plan) for held_out, part in zip(images, parts, strict=True)]

    @torch.no_grad()
    def loss(self, unet: torch.nn.Module, dtype: torch.dtype) -> tuple[float, Quartiles]:
        """Mean loss over all held-out images, in total and by quartile; equal on all ranks. A collective."""
        losses = [self._objective(unet, batch, dtype) for batch in self._batches]
        timesteps = torch.cat([batch.timesteps for batch in self._batches])[: self._counted]
        sums = self._objective.by_quartile(torch.cat(losses)[: self._counted], timesteps)
        dist.all_reduce(sums)
        sums = sums.cpu()
        return float(sums[:QUARTILES].sum() / sums[QUARTILES:].sum()), quartile_means(sums.numpy())


def fixed_batch(images: HeldOut, indices: Sequence[int], plan: TrainingPlan) -> TrainingBatch:
    """A batch of images. The index of an image determines its noise and its timestep, in quartile index % QUARTILES."""
    shape, steps = images.latent_shape, plan.config.diffusion.steps
    timesteps, posterior_noise, noise = [], [], []
    for index in indices:
        rng = np.random.default_rng([VALIDATION, index])
        quartile = index % QUARTILES
        # A timestep t belongs to quartile t * QUARTILES // steps.
        first, end = (-(-bound * steps // QUARTILES) for bound in (quartile, quartile + 1))
        timesteps.append(int(rng.integers(first, end)))
        draws = rng.standard_normal((2, *shape), dtype=np.float32)
        posterior_noise.append(torch.from_numpy(draws[0]))
        noise.append(torch.from_numpy(draws[1]))
    return TrainingBatch(
        image_ids=images.image_ids,
        inputs=images.moments,
        context=images.context,
        timesteps=torch.tensor(timesteps),
        posterior_noise=torch.stack(posterior_noise),
        noise=torch.stack(noise),
    )
