"""Settings of the paper's experiments: section `paper` of a recipe."""

from typing import Annotated

from pydantic import Field

from retrieval.config import Config, added_setting
from trainer.sampling.request import FULL


class PaperConfig(Config):
    """Section `paper` of a recipe. Styles, prompts, k, guidance and steps are those of `evaluate`."""

    prompts: tuple[str, ...] = Field(default=(), strict=False)
    """Prompts of the figures; empty: the first four of evaluate.prompts_file."""
    swapped_databases: tuple[str, ...] = Field(default=(), strict=False, max_length=2)
    """The two style databases of Fig. 2; empty: the first two of evaluate."""
    pictures_per_prompt: int = Field(default=4, ge=1)
    """Samples per prompt in Fig. 1 and 5."""
    retrieval_k: int = Field(default=20, ge=1)
    """Neighbors per query in the measurement of retrieval time."""
    retrieval_queries: int = Field(default=200, ge=2)
    """Queries per database in the measurement of retrieval time; each is searched alone."""
    timesteps_per_image: int = Field(default=8, ge=4, multiple_of=4)
    """Timesteps, each with its noise, per held-out image; the same number in each quartile."""
    max_training_images: int = Field(default=10_000, ge=2)
    """Maximum number of training images that samples are compared with, drawn at random."""
    style_pictures_folder: str = ""
    """Folder with the pictures of the style databases, one subfolder per style, named as the database or in
    words. Empty: samples are compared with these pictures by CLIP only."""
    closest_pairs: int = Field(default=8, ge=1)
    """Pairs of sample and nearest real image on a contact sheet."""
    bootstrap_draws: int = Field(default=500, ge=100)
    """Resamples per confidence interval."""
    tradeoff_guidance: tuple[float, ...] = added_setting((), strict=False)
    """Scales of guidance at which style is measured against content; empty: it is not measured."""
    tradeoff_k: tuple[int, ...] = added_setting((), strict=False)
    """Numbers of neighbors at which it is measured; empty: that of evaluate."""
    tradeoff_intervals: tuple[Annotated[tuple[float, float], Field(strict=False)], ...] = added_setting(
        (FULL,), strict=False, min_length=1
    )
    """Intervals of guidance at which it is measured, as `evaluate.guidance_interval`."""
    tradeoff_neighbor_weights: tuple[Annotated[float, Field(gt=0)], ...] = added_setting(
        (1.0,), strict=False, min_length=1
    )
    """Weights of the neighbors in attention at which it is measured, as `evaluate.neighbor_weight`."""
    tradeoff_samples: int = added_setting(10, ge=1)
    """Samples of each style at each of these settings, at most those of evaluate: the first of them."""
    unknown_styles: tuple[str, ...] = added_setting((), strict=False)
    """Style databases that no caption of the training set names and that are not in evaluate.styles. Their samples have
    the modes of the evaluation; empty: they are not measured."""
    unknown_judge_pictures: str = added_setting("")
    """Table as `evaluate.judge_pictures`, with pictures of these styles too; empty: there is no judge on pixels."""
    seed: int = Field(default=0, ge=0)
    """Seed of controls and resampling; samples have the seeds of evaluate."""
