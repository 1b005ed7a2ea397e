"""Sheets of samples during training: held-out images, below each what its neighbors call up, and prompts.

Takes the averaged weights; gives a picture. Contexts, seeds and settings never change, so that sheets of
one run differ by the weights alone.
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
from trainer.recipe import DiffusionConfig
from trainer.sampling.denoising import guided_sample, initial_noise, make_scheduler
from trainer.sampling.picture import PAPER, Grid, cell_edge, draw_grid, to_pictures
from trainer.training.validation import HeldOut

IMAGES, STEPS, GUIDANCE = 8, 20, 2.0
"""Columns of a sheet; steps of DPM-Solver++; scale of classifier-free guidance."""


@dataclass(frozen=True)
class Prompts:
    """Prompts and their contexts: (n, 1, dim) float32, the text's unit vector."""

    texts: tuple[str, ...]
    context: torch.Tensor


def encode_prompts(texts: Sequence[str], clip: ClipConfig, trained_on: dict[str, Any]) -> Prompts:
    """Raises UserError if CLIP is not the encoder of the neighbors that are trained on."""
    encoder = Encoder.load(clip)
    if encoder.identity != EncoderIdentity(**trained_on):
        raise UserError(
            f"neighbors are of encoder {trained_on['model']} ({trained_on['weights']}), [clip] is "
            f"{encoder.identity.model} ({encoder.identity.weights}). Set [clip] to the neighbors', or "
            f"train.preview_prompts to []."
        )
    return Prompts(tuple(texts), torch.from_numpy(encoder.encode_texts(texts))[:, None])


class Previews:
    """What stands on a sheet, for sampling on a device. Works on one rank alone."""

    def __init__(
        self,
        images: HeldOut,
        prompts: Prompts | None,
        autoencoder: Autoencoder,
        diffusion: DiffusionConfig,
        device: torch.device,
    ) -> None:
        self._autoencoder, self._diffusion, self._device = autoencoder, diffusion, device
        self._images, self._prompts = images, prompts
        means = images.moments.to(device).float().chunk(2, dim=1)[0]
        self._channels, self._height, self._width = means.shape[1:]
        self._originals = self._decode(means)

    @torch.no_grad()
    def draw(self, unet: torch.nn.Module, dtype: torch.dtype, step: int) -> Image.Image:
        """The sheet for a UNet that computes in `dtype`. step: for the title."""
        cell = cell_edge(self._originals[0])
        grid = Grid(
            cells=[self._originals, self._sample(unet, dtype, self._images.context)],
            rows=["held-out image, as the autoencoder shows it", "sample from its neighbors"],
            columns=[f"{image_id & (1 << 64) - 1:016x}" for image_id in self._images.image_ids.tolist()],
            title=f"step {step:,}, averaged weights, {STEPS} steps, guidance {GUIDANCE}",
            cell=cell,
        )
        if self._prompts is None:
            return draw_grid(grid)
        samples = self._sample(unet, dtype, self._prompts.context)
        below = Grid([samples], ["sample from the prompt"], self._prompts.texts, cell=cell)
        return _stack(draw_grid(grid), draw_grid(below))

    def _sample(self, unet: torch.nn.Module, dtype: torch.dtype, contexts: torch.Tensor) -> list[Image.Image]:
        """A sample for each context, row i from seed i. contexts: (n, tokens, dim)."""

        def denoise(latents: torch.Tensor, timestep: torch.Tensor, **named: Any) -> tuple[torch.Tensor, ...]:
            context = named["encoder_hidden_states"].to(dtype)
            return unet(latents.to(dtype), timestep, encoder_hidden_states=context, return_dict=False)

        shape = (self._channels, self._height, self._width)
        noise = initial_noise(range(len(contexts)), shape).to(self._device)
        guidance = torch.full((len(contexts),), GUIDANCE, device=self._device)
        scheduler = make_scheduler("dpm++", STEPS, self._diffusion)
        return self._decode(
            guided_sample(denoise, scheduler, noise, contexts.to(self._device).float(), guidance)
        )

    def _decode(self, latents: torch.Tensor) -> list[Image.Image]:
        return to_pictures(self._autoencoder.decode(latents).float().cpu().numpy())


def _stack(above: Image.Image, below: Image.Image) -> Image.Image:
    sheet = Image.new("RGB", (max(above.width, below.width), above.height + below.height), PAPER)
    sheet.paste(above, (0, 0))
    sheet.paste(below, (0, above.height))
    return sheet
