"""The kernel distance (KID) of samples for held-out images from these images, in the space of CLIP.

Each rank keeps the neighbors of its share of the images in memory, draws a sample for each, and encodes it. Images and
samples are compared as the autoencoder shows them, so that the distance measures the network alone. Writes nothing.
"""

from collections.abc import Iterator
from functools import cached_property

import deepspeed.comm as dist
import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from trainer.data.loader import Loader
from trainer.data.plan import TrainingPlan
from trainer.engine.deepspeed_engine import Ranks
from trainer.evaluation.metrics import KernelDistance
from trainer.model.autoencoder import Autoencoder
from trainer.training.previews import IMAGES, Drawer, neighbors_encoder
from trainer.training.validation import HeldOut, held_out_rows, parts_of_one_shape, read_held_out


class SampleDistance:
    """The first `train.kid_images` held-out images and their distance from samples. The sample of image i has seed i.

    The distance does not depend on the number of ranks, up to rounding.
    """

    def __init__(
        self, plan: TrainingPlan, loader: Loader, drawer: Drawer, encoder: Autoencoder | None, ranks: Ranks
    ) -> None:
        """encoder: None reads latents. Raises UserError if [clip] is not the encoder of the neighbors."""
        assert plan.config.clip
        self._clip = neighbors_encoder(plan.config.clip, plan.encoder, str(ranks.device))
        self._drawer, self._ranks = drawer, ranks
        rows = held_out_rows(plan.training_set)[: plan.config.train.kid_images]
        self.images = len(rows)
        own = range(ranks.rank, len(rows), ranks.world)
        parts = parts_of_one_shape(loader, [rows[index] for index in own], IMAGES)
        self._parts: list[tuple[list[int], HeldOut]] = []
        for part in parts:
            images = read_held_out(plan, loader, [rows[own[i]] for i in part], encoder)
            self._parts.append(([own[i] for i in part], images))

    @cached_property
    def _reference(self) -> npt.NDArray[np.float32]:
        """Features of the held-out images. A collective, so not part of the constructor, in which one rank may fail."""
        return self._features((part, self._drawer.originals(images)) for part, images in self._parts)

    def of(self, unet: torch.nn.Module) -> float:
        """The distance of samples of a complete UNet, without bias. A collective."""
        samples = self._features((part, self._draw(unet, part, images)) for part, images in self._parts)
        return KernelDistance.of(samples, self._reference).value()

    def _draw(self, unet: torch.nn.Module, seeds: list[int], images: HeldOut) -> list[Image.Image]:
        return self._drawer.samples(unet, images.context, seeds, images.latent_shape)

    def _features(self, drawn: Iterator[tuple[list[int], list[Image.Image]]]) -> npt.NDArray[np.float32]:
        """CLIP vectors (images, dim) of the pictures of all ranks, with length sqrt(dim). drawn: with their indices.

        Then x y / dim, which the kernel takes, is the cosine. A collective.
        """
        dim = self._clip.identity.dim
        features = torch.zeros(self.images, dim, device=self._ranks.device)
        for indices, pictures in drawn:
            vectors = torch.from_numpy(self._clip.encode_images(pictures)).to(features.device)
            features[indices] = dim**0.5 * vectors
        dist.all_reduce(features)
        return np.asarray(features.cpu().numpy())
