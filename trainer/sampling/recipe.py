"""The settings of all that samples: sections `sample` and `evaluate` of a recipe, and what they share.

Nothing that computes is imported here: who reads or checks settings need not wait for torch.
"""

from dataclasses import replace
from typing import Literal

from pydantic import Field, model_validator

from retrieval.config import Config, speed
from retrieval.errors import UserError
from trainer.model.context import Mode
from trainer.recipe import SchedulerName
from trainer.sampling.request import TRAINING_DATABASE, Request, read_prompts


class Compute(Config):
    """Where and how samples are computed."""

    device: str = speed("auto")
    """`cpu`, `cuda`, `cuda:1`; `auto` takes a GPU if there is one."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Number format inside the UNet; the latents are fp32 in both."""
    compile: bool = speed(False)
    """Compile the UNet before its first call: a minute or more, worth it for many samples on a GPU."""
    batch_size: int = speed(16, ge=1)
    """Samples in one UNet call (twice as many rows with guidance)."""
    workers: int = speed(0, ge=0)
    """Batches computed side by side, each in a thread; 0 for one per CPU up to 4, or one on a GPU."""
    threads: int = speed(0, ge=0)
    """CPU threads of each worker inside torch; 0 shares the CPUs out among the workers."""


class SamplingConfig(Compute):
    """What a stage that samples needs to know."""

    prompts_file: str = ""
    """UTF-8 text, one prompt a line; empty lines and lines that start with # are left out."""
    k: int = Field(default=19, ge=1)
    """Neighbors that condition a sample; need not be the k of training."""
    guidance: float = Field(default=5.0, ge=0)
    """Scale s of classifier-free guidance; 1 is none."""
    steps: int = Field(default=50, ge=1)
    """Denoising steps."""
    scheduler: SchedulerName = "ddim"
    """`ddim`, `plms` or `dpm++`."""
    height: int = Field(default=0, ge=0)
    """Of a picture in pixels: a multiple of the autoencoder's factor times the UNet's downsampling; 0 for
    the size of training."""
    width: int = Field(default=0, ge=0)
    """As `height`."""
    seed: int = Field(default=0, ge=0)
    """Where all seeds of the stage come from."""

    def request(self, prompt: str, seed: int, mode: Mode, database: str) -> Request:
        """A request with this stage's k, guidance, steps, scheduler and size."""
        return Request(
            prompt=prompt,
            seed=seed,
            mode=mode,
            database="" if mode == "text" else database,
            k=self.k,
            guidance=self.guidance,
            steps=self.steps,
            scheduler=self.scheduler,
            height=self.height,
            width=self.width,
        )


class SampleConfig(SamplingConfig):
    """What to sample (section `sample` of a recipe)."""

    prompts: tuple[str, ...] = Field(default=(), strict=False)
    """Prompts, before those of `prompts_file`."""
    databases: tuple[str, ...] = Field(default=(TRAINING_DATABASE,), strict=False, min_length=1)
    """Names below `databases/`, each a column of the grid; `index` is the training database."""
    mode: Mode = "text_and_neighbors"
    """What conditions a picture: the prompt and its neighbors, the neighbors alone, the prompt alone, or the
    neighbors of an image drawn from the training database (`unconditional`)."""
    mix: dict[str, float] = Field(default={})
    """Databases with weights above 0: one column in place of those of `databases`, of neighbors from each."""
    images: tuple[str, ...] = Field(default=(), strict=False)
    """Files of pictures that condition every sample beside its prompt, or without one."""
    exclude: tuple[int, ...] = Field(default=(), strict=False)
    """Image ids that are no neighbors; the next best come in their place."""
    weights: dict[int, float] = Field(default={})
    """Image ids with factors on what they weigh as neighbors; 0 leaves one out."""
    top_m: float = Field(default=1.0, gt=0, le=1)
    """Mode `unconditional`: share of the most retrieved images to draw from."""
    images_per_prompt: int = Field(default=1, ge=1)
    """Pictures of each prompt and database; number n has seed + n, the same for all prompts and databases."""

    def all_prompts(self) -> tuple[str, ...]:
        """The prompts of the recipe, then those of the file. Raises UserError if there must be one."""
        prompts = self.prompts + (read_prompts(self.prompts_file) if self.prompts_file else ())
        if not prompts and not self.images and self.mode != "unconditional":
            raise UserError("[sample] has no prompt: set prompts or prompts_file.")
        return prompts or ("",)

    def columns(self) -> tuple[str, ...]:
        """Folders of the pictures: the databases, `mix`, or `text` where no database is asked."""
        if self.mode == "text":
            return ("text",)
        return ("mix",) if self.mix else tuple(dict.fromkeys(self.databases))

    def searched(self) -> tuple[str, ...]:
        """The databases that are asked for neighbors."""
        if self.mode == "text":
            return ()
        return tuple(self.mix) or self.columns()

    def wanted(self, prompt: str, seed: int, column: str) -> Request:
        """The request for a picture of a column, without the images."""
        return replace(
            self.request(prompt, seed, self.mode, "" if self.mix else column),
            mix=() if self.mode == "text" else tuple(self.mix.items()),
            exclude=self.exclude,
            weights=tuple(self.weights.items()),
            top_m=self.top_m,
        )


class ClassifierConfig(Config):
    """The perceptron and its training."""

    hidden: int = Field(default=256, ge=1)
    """Width of the hidden layer."""
    epochs: int = Field(default=30, ge=1)
    """Passes over the training rows."""
    batch_size: int = Field(default=128, ge=1)
    """Rows a step."""
    learning_rate: float = Field(default=1e-3, gt=0)
    """AdamW's peak rate; it falls to zero along a cosine."""
    weight_decay: float = Field(default=0.01, ge=0)
    """AdamW's decoupled weight decay."""
    dropout: float = Field(default=0.2, ge=0, lt=1)
    """Share of hidden units dropped in training."""
    held_out_fraction: float = Field(default=0.2, gt=0, lt=1)
    """Share of each style's rows that are kept for the accuracy."""


class EvaluateConfig(SamplingConfig):
    """How the styles are measured (section `evaluate` of a recipe)."""

    styles: tuple[str, ...] = Field(default=(), strict=False)
    """Databases below `databases/` that are styles; empty takes all."""
    samples_per_style: int = Field(default=70, ge=2)
    """Samples of each style in each mode."""
    classifier: ClassifierConfig = ClassifierConfig()
    """The judge."""
    reference_rows: int = Field(default=2000, ge=4)
    """Most pictures of a database that train the judge and stand for the style in the distances."""
    precision_recall_neighbors: int = Field(default=3, ge=1)
    """Which neighbor the balls of precision and recall reach to."""

    @model_validator(mode="after")
    def _enough(self) -> "EvaluateConfig":
        if self.precision_recall_neighbors >= self.samples_per_style:
            raise ValueError(
                f"precision_recall_neighbors must be less than samples_per_style {self.samples_per_style}, "
                f"got {self.precision_recall_neighbors}"
            )
        return self
