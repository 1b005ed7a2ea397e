"""Training, sampling and evaluation of the retrieval-augmented diffusion model; import of published checkpoints."""

from typing import TYPE_CHECKING

from retrieval.lazy import public_names

if TYPE_CHECKING:
    from trainer.sampling.sampler import Sampler

__getattr__ = public_names(__name__)
