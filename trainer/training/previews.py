"""Samples during training: for held-out images, from their neighbors, and for prompts, on sheets.

Takes a UNet with the averaged weights and returns images. Contexts, seeds and settings are fixed, so that
the samples of one run differ only in the weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from retrieval.clip.encoder import Encoder
from retrieval.clip.identity import EncoderIdentity
from retrieval.errors import UserError
from retrieval.recipe import ClipConfig
from trainer.model.autoencoder import Autoencoder
from trainer.model.recipe import ContextNorm, DiffusionConfig
from trainer.model.schedulers import make_scheduler
from trainer.sampling.denoising import guided_sample, initial_noise
from trainer.sampling.picture import BACKGROUND, Grid, cell_edge, draw_grid, to_pictures
from trainer.training.validation import HeldOut

IMAGES, STEPS, GUIDANCE = 8, 20, 2.0
"""Columns of a sheet; steps of DPM-Solver++; scale of classifier-free guidance."""


@dataclass(frozen=True)
class Prompts:
    """Prompts and their contexts: (n, 1, dim) float32 CLIP vectors of the texts, at the length that the model takes."""

    texts: tuple[str, ...]
    context: torch.Tensor


def neighbors_encoder(clip: ClipConfig, neighbor_encoder: dict[str, Any], device: str = "cpu") -> Encoder:
    """The encoder of [clip]. Raises UserError if it is not that of the neighbors. neighbor_encoder: its identity."""
    encoder = Encoder(clip, device)
    if encoder.identity != EncoderIdentity(**neighbor_encoder):
        raise UserError(
            f"the neighbors have encoder {neighbor_encoder['model']} ({neighbor_encoder['weights']}), but "
            f"[clip] is {encoder.identity.model} ({encoder.identity.weights}). Set [clip] to the encoder of "
            f"the neighbors, or train.preview_prompts to [] and train.kid_every to 0."
        )
    return encoder


def encode_prompts(
    texts: Sequence[str], clip: ClipConfig, neighbor_encoder: dict[str, Any], norm: ContextNorm = "unit"
) -> Prompts:
    """Encode prompts with CLIP. norm: of the model. Raises UserError if it is not the encoder of the neighbors."""
    encoder = neighbors_encoder(clip, neighbor_encoder)
    return Prompts(tuple(texts), torch.from_numpy(encoder.encode_texts(texts, unit=norm == "unit"))[:, None])


class Drawer:
    """Draws held-out images and samples on a device."""

    def __init__(self, autoencoder: Autoencoder, diffusion: DiffusionConfig, device: torch.device) -> None:
        self._autoencoder, self._diffusion, self._device = autoencoder, diffusion, device

    def originals(self, images: HeldOut) -> list[Image.Image]:
        """The images as the autoencoder shows them."""
        return self._decode(images.moments.to(self._device).float().chunk(2, dim=1)[0])

    @torch.no_grad()
    def samples(
        self, unet: torch.nn.Module, contexts: torch.Tensor, seeds: Sequence[int], shape: tuple[int, int, int]
    ) -> list[Image.Image]:
        """A sample for each context and seed. contexts: (n, tokens, dim); shape: (c, h, w) of a latent."""
        dtype = next(unet.parameters()).dtype

        def denoise(latents: torch.Tensor, timestep: torch.Tensor, **inputs: Any) -> tuple[torch.Tensor, ...]:
            context = inputs["encoder_hidden_states"].to(dtype)
            return unet(latents.to(dtype), timestep, encoder_hidden_states=context, return_dict=False)

        noise = initial_noise(seeds, shape).to(self._device)
        guidance = torch.full((len(contexts),), GUIDANCE, device=self._device)
        scheduler = make_scheduler("dpm++", STEPS, self._diffusion)
        return self._decode(guided_sample(denoise, scheduler, noise, contexts.to(self._device).float(), guidance))

    def _decode(self, latents: torch.Tensor) -> list[Image.Image]:
        return to_pictures(self._autoencoder.decode(latents).float().cpu().numpy())


class Previews:
    """Draws preview sheets of held-out images and prompts. Used on rank 0 only."""

    def __init__(self, images: HeldOut, prompts: Prompts | None, drawer: Drawer) -> None:
        self._images, self._prompts, self._drawer = images, prompts, drawer
        self._originals = drawer.originals(images)

    def draw(self, unet: torch.nn.Module, step: int) -> Image.Image:
        """The sheet of a UNet. step: for the title."""
        cell = cell_edge(self._originals[0])
        grid = Grid(
            cells=[self._originals, self._samples(unet, self._images.context)],
            rows=["held-out image, as the autoencoder shows it", "sample from its neighbors"],
            columns=[f"{image_id & (1 << 64) - 1:016x}" for image_id in self._images.image_ids.tolist()],
            title=f"step {step:,}, averaged weights, {STEPS} steps, guidance {GUIDANCE}",
            cell=cell,
        )
        if self._prompts is None:
            return draw_grid(grid)
        samples = self._samples(unet, self._prompts.context)
        below = Grid([samples], ["sample from the prompt"], self._prompts.texts, cell=cell)
        return _stack(draw_grid(grid), draw_grid(below))

    def _samples(self, unet: torch.nn.Module, contexts: torch.Tensor) -> list[Image.Image]:
        """A sample for each context; sample i has seed i."""
        return self._drawer.samples(unet, contexts, range(len(contexts)), self._images.latent_shape)


def _stack(above: Image.Image, below: Image.Image) -> Image.Image:
    sheet = Image.new("RGB", (max(above.width, below.width), above.height + below.height), BACKGROUND)
    sheet.paste(above, (0, 0))
    sheet.paste(below, (0, above.height))
    return sheet
