"""Effect of neighbors on the loss of held-out images: own neighbors, another image's, and none.

All contexts share noise and timesteps, so differences are paired.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from trainer.data.loader import Loader
from trainer.data.plan import TrainingPlan
from trainer.evaluation.intervals import Bootstrap
from trainer.evaluation.paper.controls import derangement
from trainer.model.autoencoder import Autoencoder
from trainer.training.objective import QUARTILES, Objective
from trainer.training.validation import HeldOut, fixed_batch, held_out_rows, parts_of_one_shape, read_held_out

TRUE, SHUFFLED, NONE = "true", "shuffled", "none"
Losses = Mapping[str, npt.NDArray[np.float64]]
"""(images, draws) by context."""


@torch.no_grad()
def held_out_losses(
    unet: torch.nn.Module, plan: TrainingPlan, loader: Loader, autoencoder: Autoencoder, draws: int
) -> Losses:
    """Loss (eq. 1) of each held-out image with its neighbors, with another image's, and with none.

    draws: timesteps per image; draw j is in quartile j % QUARTILES.
    """
    encoder = autoencoder if plan.training_set.source == "images" else None
    rows = held_out_rows(plan.training_set)
    count = len(rows)
    parts = parts_of_one_shape(loader, rows, count)
    images = [read_held_out(plan, loader, [rows[index] for index in part], encoder) for part in parts]
    own = torch.cat([part.context for part in images])[np.argsort(np.concatenate(parts))]
    donors = derangement(count, np.random.default_rng([plan.config.train.seed, count]))
    contexts = {TRUE: own, SHUFFLED: own[torch.from_numpy(donors)], NONE: torch.zeros_like(own[:, :1])}
    objective = Objective(plan.config.diffusion, None, next(unet.parameters()).device)
    losses = {name: np.empty((count, draws)) for name in contexts}
    for part, of_shape in zip(parts, images, strict=True):
        indices = [index * draws + draw for index in part for draw in range(draws)]
        batch = fixed_batch(_repeated(of_shape, draws), indices, plan)
        for name, context in contexts.items():
            conditioned = replace(batch, context=context[part].repeat_interleave(draws, dim=0))
            pieces = conditioned.split(plan.config.train.micro_batch)
            values = [objective(unet, piece, torch.float32).cpu() for piece in pieces]
            losses[name][part] = torch.cat(values).double().numpy().reshape(len(part), draws)
    return losses


def summary(losses: Losses, bootstrap: Bootstrap) -> dict[str, Any]:
    """Mean losses, and the increase with other and with no neighbors, with intervals over images."""
    by_image = {name: values.mean(axis=1) for name, values in losses.items()}
    images, draws = losses[TRUE].shape
    return {
        "images": images,
        "draws": draws,
        "loss": {name: bootstrap.mean(values) for name, values in by_image.items()},
        "added": {name: bootstrap.mean(by_image[name] - by_image[TRUE]) for name in (SHUFFLED, NONE)},
        "added_by_quartile": {
            name: [
                bootstrap.mean((losses[name] - losses[TRUE])[:, quartile::QUARTILES].mean(axis=1))
                for quartile in range(QUARTILES)
            ]
            for name in (SHUFFLED, NONE)
        },
    }


def _repeated(images: HeldOut, times: int) -> HeldOut:
    return HeldOut(
        image_ids=images.image_ids.repeat(times),
        moments=images.moments.repeat_interleave(times, dim=0),
        context=images.context.repeat_interleave(times, dim=0),
    )
