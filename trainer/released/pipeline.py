"""The diffusers pipeline of a retrieval-augmented model: prompts and their neighbors in, pictures out.

Opens a folder that `laion-rdm convert --to` wrote. It imports nothing of this project, because the folder contains a
copy of this file, with which diffusers opens the folder where this project is not installed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image

Vectors = npt.NDArray[np.float32]


class Retriever:
    """CLIP vectors of prompts and of their most similar pictures."""

    def __init__(self, encoder: Any, source: Any, recall: float = 0.95) -> None:
        """encoder: with the methods of `retrieval.clip.encoder.Encoder`, of the model that the card names.

        source: a `retrieval.Database`, or a sequence of PIL pictures. recall: of the searches in a database.
        """
        self._encoder, self._database, self._recall = encoder, source, recall
        if isinstance(source, Sequence):
            self._database = None
            self._pictures: Vectors = encoder.encode_images(list(source), unit=False)

    def context(self, prompts: Sequence[str], k: int, context_norm: str) -> Vectors:
        """(n, 1 + k, dim) float32: the vector of each prompt, then those of its k neighbors, best first.

        With fewer than k pictures, all of them. context_norm: `unit` for vectors of length 1, `raw` for CLIP's. Raises
        ValueError if the database does not know them.
        """
        texts: Vectors = self._encoder.encode_texts(list(prompts), unit=False)
        search = self._from_pictures if self._database is None else self._from_database
        context = np.concatenate([texts[:, None], search(_unit_rows(texts), k, context_norm)], axis=1)
        return _unit_rows(context) if context_norm == "unit" else context

    def _from_pictures(self, queries: Vectors, k: int, context_norm: str) -> Vectors:
        best = np.argsort(-queries @ _unit_rows(self._pictures).T, axis=1, kind="stable")[:, :k]
        return self._pictures[best]

    def _from_database(self, queries: Vectors, k: int, context_norm: str) -> Vectors:
        results = self._database.search(queries, k, recall=self._recall, like="texts")
        units = np.asarray(results.embeddings, np.float32)
        if context_norm == "unit":
            return units
        if np.isnan(results.norms).any():
            raise ValueError("the database does not know the lengths of its vectors, which this model needs")
        return units * results.norms[..., None]


@dataclass(frozen=True)
class Settings:
    """Keywords of a call of the pipeline, with diffusers' names."""

    k: int = 19
    """Neighbors of each prompt."""
    guidance_scale: float = 5.0
    """Scale s of classifier-free guidance; 1 is no guidance."""
    num_inference_steps: int = 50
    height: int = 0
    """Height of a picture in pixels; 0 for the training size."""
    width: int = 0
    """Width of a picture in pixels; 0 for the training size."""
    generator: torch.Generator | list[torch.Generator] | None = None
    """Draws the noise; a list has one for each prompt."""
    output_type: Literal["pil", "np", "latent"] = "pil"
    """`np`: (n, height, width, 3) float32 in 0..1; `latent`: a tensor (n, c, h, w)."""


class RetrievalDiffusionPipeline(DiffusionPipeline):
    """Samples pictures of prompts with neighbors from a database or from pictures (Blattmann et al. 2022)."""

    _optional_components: ClassVar[list[str]] = ["vae"]
    model_cpu_offload_seq = "unet->vae"
    unet: Any
    vae: Any
    scheduler: Any

    def __init__(
        self, unet: Any, vae: Any, scheduler: Any, context_norm: str = "unit", latent_size: Sequence[int] = (0, 0)
    ) -> None:
        """vae: None gives latents only. context_norm: length of CLIP vectors; latent_size: height, width."""
        super().__init__()
        self.register_modules(unet=unet, vae=vae, scheduler=scheduler)
        self.register_to_config(context_norm=context_norm, latent_size=list(latent_size))

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] = (),
        retriever: Retriever | None = None,
        context: torch.Tensor | None = None,
        **settings: Any,
    ) -> Any:
        """Pictures as `.images`, one for each prompt.

        context: (n, tokens, dim) CLIP vectors of text and neighbors in the place of prompt and retriever; settings: see
        `Settings`. Raises ValueError without either, and TypeError for unknown settings.
        """
        options = Settings(**settings)
        if context is None:
            if retriever is None or not prompt:
                raise ValueError("set prompt and retriever, or context")
            prompts = [prompt] if isinstance(prompt, str) else list(prompt)
            context = torch.from_numpy(retriever.context(prompts, options.k, self.config.context_norm))
        latents = self._denoise(context.to(self._execution_device, self.unet.dtype), options)
        if options.output_type == "latent":
            return ImagePipelineOutput(images=latents)
        if self.vae is None:
            raise ValueError("this folder has no vae/: set output_type='latent'")
        decoded = self.vae.decode(latents / self.vae.config.scaling_factor).sample.clamp(-1, 1)
        pixels = (decoded / 2 + 0.5).float().cpu().permute(0, 2, 3, 1).numpy()
        return ImagePipelineOutput(images=pixels if options.output_type == "np" else _pictures(pixels))

    def _denoise(self, context: torch.Tensor, options: Settings) -> torch.Tensor:
        """Latents (n, c, h, w); context: (n, tokens, dim)."""
        shape = (len(context), self.unet.config.in_channels, *self._latent_size(options))
        noise = randn_tensor(shape, generator=options.generator, device=context.device, dtype=context.dtype)
        self.scheduler.set_timesteps(options.num_inference_steps, device=context.device)
        latents = noise * self.scheduler.init_noise_sigma
        # Zero tokens add nothing to attention: the null context can have the same length.
        both, scale = torch.cat([torch.zeros_like(context), context]), options.guidance_scale
        for t in self.progress_bar(self.scheduler.timesteps):
            inputs = self.scheduler.scale_model_input(torch.cat([latents, latents]), t)
            without, with_ = self.unet(inputs, t, encoder_hidden_states=both, return_dict=False)[0].chunk(2)
            latents = self.scheduler.step(without + scale * (with_ - without), t, latents, return_dict=False)[0]
        return latents

    def _latent_size(self, options: Settings) -> tuple[int, int]:
        """Height and width of a latent. Raises ValueError for a size in pixels that is not a multiple."""
        height, width = self.config.latent_size
        factor = 1 if self.vae is None else 2 ** (len(self.vae.config.block_out_channels) - 1)
        multiple = factor * 2 ** (len(self.unet.config.block_out_channels) - 1)
        if options.height % multiple or options.width % multiple:
            raise ValueError(f"height and width must be multiples of {multiple}, got {options.height}, {options.width}")
        return options.height // factor or height, options.width // factor or width


def _unit_rows(vectors: Vectors) -> Vectors:
    return np.asarray(vectors / np.linalg.norm(vectors, axis=-1, keepdims=True), np.float32)


def _pictures(pixels: Vectors) -> list[Image.Image]:
    return [Image.fromarray(picture) for picture in np.rint(pixels * 255).astype(np.uint8)]
