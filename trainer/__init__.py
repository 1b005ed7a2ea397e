"""Training, sampling and evaluation of the retrieval-augmented diffusion model.

Training uses `data`, `model`, `engine`, `training`, `checkpoint` and `tracking`. `released` imports
published checkpoints, `recipe` has the settings of training.
"""

from typing import TYPE_CHECKING

from retrieval.lazy import public_names

if TYPE_CHECKING:
    from trainer.sampling.sampler import Sampler

__getattr__ = public_names(__name__, {"sampling.sampler": "Sampler"})
