"""Evaluation of styles: the stage `evaluate`, its style classifier and metrics, and the paper's experiments."""

from typing import TYPE_CHECKING

from retrieval.lazy import public_names

if TYPE_CHECKING:
    from trainer.evaluation.classifier import StyleClassifier, TrainedClassifier
    from trainer.evaluation.recipe import ClassifierConfig, EvaluateConfig

__getattr__ = public_names(__name__)
