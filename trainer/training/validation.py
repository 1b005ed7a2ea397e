"""The loss on images that training never sees, with noise and timesteps that never change.

Reads the held-out rows once and keeps their moments; writes nothing. Every rank computes its share, and
the sum over samples is the same for any number of ranks and whatever training did before.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import deepspeed.comm as dist
import numpy as np
import numpy.typing as npt
import torch

from trainer.data.loader import Batch, Loader
from trainer.data.plan import Plan, Samples
from trainer.data.sample_order import VALIDATION
from trainer.engine.deepspeed_engine import Ranks
from trainer.model.autoencoder import Autoencoder
from trainer.tracking.progress import Quartiles
from trainer.training.objective import QUARTILES, Objective, quartile_means


@dataclass(frozen=True)
class HeldOut:
    """Held-out images: id, moments (2c, h, w) float16 and context (k, dim) float16 of each."""

    image_ids: npt.NDArray[np.int64]
    moments: torch.Tensor
    context: torch.Tensor


def held_out_rows(samples: Samples) -> list[tuple[int, int]]:
    """Shard number and row of every held-out image, in order."""
    counts = zip(samples.rows, samples.held_out, strict=True)
    return [(shard, rows + i) for shard, (rows, count) in enumerate(counts) for i in range(count)]


def read_held_out(
    plan: Plan, loader: Loader, rows: list[tuple[int, int]], autoencoder: Autoencoder | None
) -> HeldOut:
    """Rows of a loader's shards as training sees them in epoch 0; an autoencoder encodes images.

    The context is the best of the neighbors, as many as training takes.
    """
    tokens, batch_size = plan.config.train.context_tokens, plan.config.train.micro_batch
    shards = {number: loader.shard(number) for number, _ in rows}
    inputs = (shards[number].inputs(row, 0) for number, row in rows)
    moments = []
    while batch := list(islice(inputs, batch_size)):
        stacked = torch.from_numpy(np.stack(batch))
        moments.append(stacked if autoencoder is None else autoencoder.encode_moments(stacked).half().cpu())
    return HeldOut(
        image_ids=np.array([shards[number].ids[row] for number, row in rows]),
        moments=torch.cat(moments),
        context=torch.from_numpy(np.stack([shards[number].context[row][:tokens] for number, row in rows])),
    )


class ValidationSet:
    """A rank's share of the held-out images with their draws, and the loss on all ranks' shares.

    Image i, from 0, has a timestep of quartile i % QUARTILES and draws of its own: the same for every run
    on these images, so that losses of runs compare. No neighbors are withheld.
    """

    def __init__(self, plan: Plan, loader: Loader, autoencoder: Autoencoder | None, ranks: Ranks) -> None:
        self._micro_batch, self._ranks = plan.config.train.micro_batch, ranks
        self._objective = Objective(plan.config.diffusion, None, ranks.device)
        rows = held_out_rows(plan.samples)
        own = range(ranks.rank, len(rows), ranks.world)
        self._counted = len(own)
        # Under ZeRO 3 a forward pass is a collective, so all ranks need as many: the last image is repeated.
        share = -(-len(rows) // ranks.world)
        places = (list(own) + [len(rows) - 1] * share)[:share]
        images = read_held_out(plan, loader, [rows[place] for place in places], autoencoder)
        self._batch = with_draws(images, places, plan)

    @torch.no_grad()
    def loss(self, unet: torch.nn.Module, dtype: torch.dtype) -> tuple[float, Quartiles]:
        """Mean loss over all held-out images, and by quartile; the same on all ranks, which all call it."""
        parts = [self._objective(unet, piece, dtype) for piece in self._batch.split(self._micro_batch)]
        losses = torch.cat(parts)[: self._counted]
        sums = self._objective.by_quartile(losses, self._batch.timesteps[: self._counted])
        dist.all_reduce(sums)
        sums = sums.cpu()
        return float(sums[:QUARTILES].sum() / sums[QUARTILES:].sum()), quartile_means(sums)


def with_draws(images: HeldOut, places: Sequence[int], plan: Plan) -> Batch:
    """A batch of these images; each has the timestep, of quartile place % QUARTILES, and the noise of its
    place. Places: as many as images."""
    shape, steps = plan.samples.latent_shape, plan.config.diffusion.steps
    timesteps, posterior_noise, noise = [], [], []
    for place in places:
        rng = np.random.default_rng([VALIDATION, place])
        quartile = place % QUARTILES
        # the timesteps t of a quartile are those with t * QUARTILES // steps equal to it
        first, end = (-(-one * steps // QUARTILES) for one in (quartile, quartile + 1))
        timesteps.append(int(rng.integers(first, end)))
        drawn = rng.standard_normal((2, *shape), dtype=np.float32)
        posterior_noise.append(torch.from_numpy(drawn[0]))
        noise.append(torch.from_numpy(drawn[1]))
    return Batch(
        image_ids=images.image_ids,
        inputs=images.moments,
        context=images.context,
        timesteps=torch.tensor(timesteps),
        posterior_noise=torch.stack(posterior_noise),
        noise=torch.stack(noise),
    )
