"""Validation, samples and their distance from held-out images during training.

Computes the loss on held-out images every `validate_every` steps, a sheet of samples every `preview_every` steps and
the kernel distance of samples every `kid_every` steps.
For this the averaged weights are gathered into a complete UNet, for every ZeRO stage.
"""

import deepspeed
import torch

from trainer.data.loader import Loader
from trainer.data.plan import TrainingPlan
from trainer.engine.deepspeed_engine import Ranks
from trainer.engine.ema import MovingAverage
from trainer.model.autoencoder import Autoencoder
from trainer.model.lora import build_trained
from trainer.recipe import TrainingRecipe
from trainer.tracking.training_log import KidMetrics, TrainingLog, ValidationMetrics
from trainer.training.kernel_distance import SampleDistance
from trainer.training.previews import IMAGES, Drawer, Previews, encode_prompts
from trainer.training.validation import ValidationSet, held_out_rows, parts_of_one_shape, read_held_out


class ModelMonitor:
    """Validation set, previews and distance of samples of a run. All ranks have one and call it at the same steps."""

    def __init__(
        self,
        plan: TrainingPlan,
        loader: Loader,
        ranks: Ranks,
        training_log: TrainingLog | None,
        encoder: Autoencoder | None,
    ) -> None:
        """encoder: the autoencoder that encodes the training images; None: the run reads latents."""
        self._config, self._train = plan.config, plan.config.train
        self._ranks, self._training_log = ranks, training_log
        autoencoder = encoder or Autoencoder.load(plan.config.autoencoder, str(ranks.device))
        drawer = Drawer(autoencoder, plan.config.diffusion, ranks.device)
        self._validation = self._previews = self._distance = prompts = None
        if self._train.validate_every:
            self._validation = ValidationSet(plan, loader, encoder, ranks)
        if self._train.preview_every and ranks.is_first:
            rows = held_out_rows(plan.training_set)
            first, *_ = parts_of_one_shape(loader, rows, IMAGES)
            images = read_held_out(plan, loader, [rows[index] for index in first], encoder)
            if plan.config.clip and self._train.preview_prompts:
                texts, norm = self._train.preview_prompts, plan.config.model.context_norm
                prompts = encode_prompts(texts, plan.config.clip, plan.encoder, norm)
            self._previews = Previews(images, prompts, drawer)
        if self._train.kid_every:
            self._distance = SampleDistance(plan, loader, drawer, encoder, ranks)

    def is_due(self, step: int) -> bool:
        """True if validation, a preview or the distance of samples is due after `step` steps."""
        intervals = (self._train.validate_every, self._train.preview_every, self._train.kid_every)
        return any(_is_due(every, step) for every in intervals)

    def run(self, engine: deepspeed.DeepSpeedEngine, average: MovingAverage, step: int) -> None:
        """Run what is due after `step` steps. A collective."""
        dtype = next(engine.module.parameters()).dtype
        unet = averaged_unet(self._config, average, engine.module)
        if self._validation and _is_due(self._train.validate_every, step):
            engine.eval()
            losses = (*self._validation.loss(engine, dtype), *self._validation.loss(unet, dtype))
            engine.train()
            if self._training_log:
                self._training_log.add_validation(ValidationMetrics(step, *losses))
        if self._previews and self._training_log and _is_due(self._train.preview_every, step):
            self._training_log.add_preview(self._previews.draw(unet, step), step)
        if self._distance and _is_due(self._train.kid_every, step):
            distance = self._distance.of(unet)
            if self._training_log:
                self._training_log.add_kid(KidMetrics(step, distance, self._distance.images))


def _is_due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0


def averaged_unet(config: TrainingRecipe, average: MovingAverage, trained: torch.nn.Module) -> torch.nn.Module:
    """A new UNet like the trained one with the averaged weights, in evaluation mode. A collective."""
    with torch.device("meta"):
        unet = build_trained(config.model, config.train.lora)
    first = next(trained.parameters())
    unet = unet.type(first.dtype).to_empty(device=first.device).eval().requires_grad_(False)
    weights = dict(unet.named_parameters())
    for name, weight in trained.named_parameters():
        if not weight.requires_grad:
            weights[name].copy_(weight)
    shapes = {name: weights[name].shape for name, weight in trained.named_parameters() if weight.requires_grad}
    for name, values in average.gather(shapes):
        weights[name].copy_(values)
    return unet
