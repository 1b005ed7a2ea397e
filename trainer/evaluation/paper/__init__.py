"""Experiments of the paper on a trained model: figures, controls, held-out loss, copies, retrieval time."""

from typing import TYPE_CHECKING

from retrieval.lazy import public_names
from trainer.evaluation.paper.recipe import PaperConfig

if TYPE_CHECKING:
    from trainer.evaluation.paper.experiments import ModelUnderTest

__getattr__ = public_names(__name__)
