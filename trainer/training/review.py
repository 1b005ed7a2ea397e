"""Looking at the model while it is trained: when, with which weights, on which ranks.

Every `validate_every` steps the loss on held-out images, every `preview_every` a sheet of samples; gives
them to the progress of rank 0. The averaged weights become a whole network for this, on each rank that
needs one, so that it works however DeepSpeed splits the weights.
"""

import deepspeed
import torch

from trainer.data.loader import Loader
from trainer.data.plan import Plan
from trainer.engine.deepspeed_engine import Ranks
from trainer.engine.ema import Average
from trainer.model.autoencoder import Autoencoder
from trainer.model.unet import build_unet
from trainer.recipe import ModelConfig
from trainer.tracking.progress import Progress, Validation
from trainer.training.previews import IMAGES, Previews, encode_prompts
from trainer.training.validation import ValidationSet, held_out_rows, read_held_out


class Review:
    """What is looked at. All ranks hold one and call it at the same steps."""

    def __init__(self, plan: Plan, loader: Loader, ranks: Ranks, progress: Progress | None) -> None:
        self._model, self._train = plan.config.model, plan.config.train
        self._ranks, self._progress = ranks, progress
        autoencoder = Autoencoder.load(plan.config.autoencoder, str(ranks.device))
        encoder = autoencoder if plan.samples.source == "images" else None
        self._validation = self._previews = prompts = None
        if self._train.validate_every:
            self._validation = ValidationSet(plan, loader, encoder, ranks)
        if self._train.preview_every and ranks.is_first:
            rows = held_out_rows(plan.samples)[:IMAGES]
            images = read_held_out(plan, loader, rows, encoder)
            if plan.config.clip:
                prompts = encode_prompts(self._train.preview_prompts, plan.config.clip, plan.encoder)
            self._previews = Previews(images, prompts, autoencoder, plan.config.diffusion, ranks.device)

    def is_due(self, step: int) -> bool:
        """True if something is looked at after `step` steps."""
        return self._validates(step) or self._draws(step)

    def run(self, engine: deepspeed.DeepSpeedEngine, average: Average, step: int) -> None:
        """Look at the model after `step` steps. All ranks call it."""
        dtype = next(engine.module.parameters()).dtype
        unet = averaged_unet(self._model, average, self._ranks.device, dtype)
        if self._validation and self._validates(step):
            engine.eval()
            found = Validation(
                step, *self._validation.loss(engine, dtype), *self._validation.loss(unet, dtype)
            )
            engine.train()
            if self._progress:
                self._progress.add_validation(found)
        if self._previews and self._progress and self._draws(step):
            self._progress.add_preview(self._previews.draw(unet, dtype, step), step)

    def _validates(self, step: int) -> bool:
        return bool(self._train.validate_every) and step % self._train.validate_every == 0

    def _draws(self, step: int) -> bool:
        return bool(self._train.preview_every) and step % self._train.preview_every == 0


def averaged_unet(
    config: ModelConfig, average: Average, device: torch.device, dtype: torch.dtype
) -> torch.nn.Module:
    """A UNet of its own with the averaged weights, for evaluation. All ranks call it."""
    with torch.device("meta"):
        unet = build_unet(config)
    unet = unet.type(dtype).to_empty(device=device).eval().requires_grad_(False)
    weights = dict(unet.named_parameters())
    shapes = {name: weight.shape for name, weight in weights.items()}
    for name, values in average.gather(shapes):
        weights[name].copy_(values)
    return unet
