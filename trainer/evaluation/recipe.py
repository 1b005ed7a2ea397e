"""Settings of the evaluation: section `evaluate` of a recipe.

Imports no torch, so that recipes are read and checked quickly.
"""

from pydantic import Field, model_validator

from retrieval.config import Config, added_setting
from trainer.sampling.recipe import SamplingConfig


class TrainingConfig(Config):
    """Training of a judge of styles."""

    epochs: int = Field(default=30, ge=1)
    """Passes over the training rows."""
    batch_size: int = Field(default=128, ge=1)
    """Rows per step."""
    learning_rate: float = Field(default=1e-3, gt=0)
    """Peak learning rate of AdamW; decays to zero along a cosine."""
    weight_decay: float = Field(default=0.01, ge=0)
    """Decoupled weight decay of AdamW."""
    dropout: float = Field(default=0.2, ge=0, lt=1)
    """Dropout probability of hidden units."""


class ClassifierTrainingConfig(TrainingConfig):
    """Training and test of a style classifier."""

    held_out_fraction: float = Field(default=0.2, gt=0, lt=1)
    """Share of each style's rows that is held out to measure the accuracy."""


class ClassifierConfig(ClassifierTrainingConfig):
    """The paper's style classifier, a two-layer perceptron on CLIP features, and its training."""

    hidden: int = Field(default=256, ge=1)
    """Width of the hidden layer."""


class PixelClassifierConfig(ClassifierTrainingConfig):
    """Training of the style classifier on pixels."""

    epochs: int = Field(default=12, ge=1)
    """Passes over the training pictures."""
    batch_size: int = Field(default=32, ge=2)
    """Pictures per step."""
    learning_rate: float = Field(default=3e-3, gt=0)
    """Peak learning rate of AdamW; decays to zero along a cosine."""


class StyleDescriptorConfig(TrainingConfig):
    """Training of the style descriptor, on the pictures of the style classifier on pixels."""

    epochs: int = Field(default=12, ge=1)
    """Passes over the training pictures."""
    batch_size: int = Field(default=64, ge=2)
    """Pictures per step."""
    learning_rate: float = Field(default=3e-3, gt=0)
    """Peak learning rate of AdamW; decays to zero along a cosine."""


class EvaluateConfig(SamplingConfig):
    """Section `evaluate` of a recipe."""

    styles: tuple[str, ...] = Field(default=(), strict=False)
    """Style databases, by name below `databases/`; empty for all."""
    samples_per_style: int = Field(default=70, ge=2)
    """Samples of each style in each mode."""
    prompts_per_style: int = added_setting(0, ge=0)
    """Prompts of each style that no other style has. With as many as `samples_per_style`, no two samples of a mode
    share a prompt, so that their intervals are the narrowest. 0: every style draws from all prompts."""
    classifier: ClassifierConfig = ClassifierConfig()
    """The paper's style classifier. It sees the CLIP features that also condition the samples."""
    judge_pictures: str = ""
    """Parquet table with columns `path` (from its folder) and `style` (as the database or in words): pictures that are
    in no database and no training set. They train and test a second judge, on pixels, and are the reference of a second
    kernel distance; empty: there is none."""
    pixel_classifier: PixelClassifierConfig = PixelClassifierConfig()
    """The style classifier on pixels. Its `held_out_fraction` is also that of the style descriptor, which compares
    samples with these held-out pictures."""
    style_descriptor: StyleDescriptorConfig = added_setting(StyleDescriptorConfig())
    """The style descriptor, trained on `judge_pictures`. The style of a sample is that of its nearest held-out
    picture."""
    reference_rows_per_style: int = Field(default=2000, ge=4)
    """Maximum number of pictures of a style that train the classifier and are the reference of the distances."""
    precision_recall_neighbors: int = Field(default=3, ge=1)
    """Nearest neighbor that sets the radius of the manifolds of precision and recall."""

    @model_validator(mode="after")
    def _check_neighbors(self) -> "EvaluateConfig":
        if self.precision_recall_neighbors >= self.samples_per_style:
            raise ValueError(
                f"precision_recall_neighbors must be less than samples_per_style {self.samples_per_style}, "
                f"got {self.precision_recall_neighbors}"
            )
        return self
