"""The settings of a training run: everything that `make train` reads from a recipe.

The DeepSpeed settings are derived from these in `trainer/engine.py`; nobody writes them twice.
"""

from typing import Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from retrieval.config import Config, speed
from trainer.autoencoder import AutoencoderConfig
from trainer.diffusion import DiffusionConfig
from trainer.model import ModelConfig


class TrainConfig(Config):
    """How the network is trained (section `train` of a recipe)."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """The run's folder below `runs/`."""
    start_from: str = ""
    """Name of a finished run whose exported weights this one starts from; empty: fresh weights."""
    source: Literal["latents", "images"]
    """What a sample is read from: `latents/<size>`, or the tars of `download/train`, encoded on the way."""
    size: PositiveInt
    """Edge of a training image in pixels."""
    k: PositiveInt
    """Neighbors of each image in the neighbors table; all of them are the context."""
    flip: bool = True
    """Mirror half of the images. For latents this was decided when they were made."""
    global_batch: PositiveInt
    """Samples in one optimizer step, over all ranks."""
    micro_batch: PositiveInt = speed(...)
    """Samples a rank puts through the network at once; the rest of its share is accumulated."""
    lanes: PositiveInt = 16
    """Shards read side by side. Where ranks divide lanes and lanes divide global_batch, a rank opens only
    the shards of its own lanes."""
    steps: PositiveInt
    """Optimizer steps. Raising it continues a finished run."""
    learning_rate: PositiveFloat = 1e-4
    """Step size of AdamW after the warm-up; constant."""
    warmup_steps: NonNegativeInt = 10_000
    """Steps in which the learning rate grows linearly from 0."""
    weight_decay: NonNegativeFloat = 0.01
    """Decoupled weight decay of AdamW."""
    clip_norm: NonNegativeFloat = 1.0
    """Largest norm of a gradient; 0 does not clip."""
    p_uncond: float = Field(0.1, ge=0, le=1)
    """Probability that all neighbors of a sample are withheld."""
    ema_decay: float = Field(0.9999, ge=0, lt=1)
    """Decay of the averaged weights, which are what is exported."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Number format of the network; master weights, their average and the loss are fp32 in both."""
    zero_stage: int = Field(1, ge=0, le=3)
    """What DeepSpeed splits over ranks: 0 nothing, 1 optimizer states, 2 also gradients, 3 also weights."""
    activation_checkpointing: bool = speed(False)
    """Recompute activations in the backward pass: less memory, a third more work."""
    checkpoint_every: PositiveInt = speed(1000)
    """Steps between checkpoints."""
    keep_checkpoints: PositiveInt = speed(2)
    """Checkpoints kept, newest first."""
    log_every: PositiveInt = speed(10)
    """Steps between lines of the log and of the metrics."""
    ranks: NonNegativeInt = speed(0)
    """Processes that `make train` starts on this machine; 0: one for each GPU, or one."""
    workers: PositiveInt = speed(2)
    """Threads of each rank that read, decode and cut samples."""
    prefetch_batches: PositiveInt = speed(4)
    """Batches prepared ahead of the step."""
    restart: bool = speed(False)
    """Start over, deleting the folder's content, where it holds a run with other settings or of more steps;
    else refuse."""
    seed: NonNegativeInt = 0
    """Seed of the initial weights, the order of samples and all noise."""

    @model_validator(mode="after")
    def _fits(self) -> "TrainConfig":
        if self.zero_stage == 0 and self.precision != "fp32":
            raise ValueError("zero_stage 0 has no fp32 master weights: use precision fp32, or zero_stage 1")
        if self.global_batch % self.micro_batch:
            raise ValueError(f"global_batch must be a multiple of micro_batch, got {self.global_batch}")
        return self

    @property
    def folder(self) -> str:
        """The run's folder relative to the root; also the name of its manifest's stage."""
        return f"runs/{self.name}/train"


class Training(Config):
    """The sections of a recipe that training reads."""

    model: ModelConfig
    diffusion: DiffusionConfig
    autoencoder: AutoencoderConfig
    train: TrainConfig
