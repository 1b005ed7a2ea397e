"""The stage `train`: checks, launching of ranks, the training loop, its loss, validation and previews."""

from typing import TYPE_CHECKING

from retrieval.lazy import public_names

if TYPE_CHECKING:
    from trainer.training.train import prepare, run

__getattr__ = public_names(__name__)
