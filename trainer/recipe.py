"""The settings of a training run: everything that `make latents` and `make train` read from a recipe.

The DeepSpeed settings are derived from these in `trainer/engine/deepspeed_engine.py`; nobody writes them twice. Nothing that
computes is imported here: who reads or checks settings need not wait for torch.
"""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from retrieval.config import Config, WorkersConfig, speed
from retrieval.recipe import ClipConfig

AutoencoderKind = Literal["kl", "vq", "patch"]
Prediction = Literal["epsilon", "v_prediction"]
SchedulerName = Literal["ddim", "plms", "dpm++"]
Integers = Annotated[tuple[PositiveInt, ...], Field(strict=False)]


class AutoencoderConfig(Config):
    """Which autoencoder (section `autoencoder` of a recipe)."""

    kind: AutoencoderKind
    """Variational (diffusers' AutoencoderKL), quantized (VQModel) or the demo's own."""
    path: str
    """Folder of config.json and the weights as safetensors."""
    scale: PositiveFloat = 1.0
    """Latents are multiplied by it, so that their variance is about 1."""


class LatentsConfig(WorkersConfig):
    """What is encoded (section `latents` of a recipe)."""

    size: PositiveInt
    """Edge of a view in pixels: the shorter edge of the image is resized to it, then a square is cut."""
    views: PositiveInt = 1
    """Views of each image; epoch e of training sees view e % views."""
    flip: bool = True
    """Mirror half of the views, never view 0."""
    seed: NonNegativeInt = 0
    """Seed of the cuts."""
    batch_size: PositiveInt = speed(32)
    """Views encoded at once."""
    gpus_per_worker: float = speed(0.0, ge=0)
    """GPUs each encoder takes; 0 encodes on the CPU."""


class ModelConfig(Config):
    """Shape of the UNet (section `model` of a recipe)."""

    latent_channels: PositiveInt
    """Channels of a latent, in and out."""
    context_dim: PositiveInt
    """Length of a neighbor embedding: the dimension of the CLIP encoder."""
    channels: Integers
    """Channels at each resolution, finest first; each resolution halves the one before."""
    attention: Integers
    """Downsampling factors (1, 2, 4, ...) at which blocks attend to the context. The middle always does."""
    layers: PositiveInt = 2
    """Residual blocks at each resolution."""
    channels_per_head: PositiveInt = 32
    """Channels of one attention head."""
    norm_groups: PositiveInt = 32
    """Groups of the group normalizations; divides every entry of `channels`."""
    context_gain: PositiveFloat = 1.0
    """Factor on the initial weights that read the context. 1 as in the paper; more lets a short training
    heed its neighbors sooner, because the entries of a unit vector are small."""

    @model_validator(mode="after")
    def _fits(self) -> "ModelConfig":
        factors = [2**level for level in range(len(self.channels))]
        if not set(self.attention) <= set(factors):
            raise ValueError(f"attention must be among {factors}, got {list(self.attention)}")
        for divisor in (self.norm_groups, self.channels_per_head):
            if any(width % divisor for width in self.channels):
                raise ValueError(f"channels {list(self.channels)} must be divisible by {divisor}")
        return self


class DiffusionConfig(Config):
    """The noise schedule and what the network predicts (section `diffusion` of a recipe)."""

    steps: PositiveInt = 1000
    """T, the number of timesteps."""
    beta_start: float = Field(0.0015, gt=0, lt=1)
    """beta at t = 0."""
    beta_end: float = Field(0.015, gt=0, lt=1)
    """beta at t = T - 1; the square root of beta is linear in t."""
    prediction: Prediction = "epsilon"
    """epsilon as in the paper, or v = sqrt(abar_t) eps - sqrt(1 - abar_t) x_0."""

    @model_validator(mode="after")
    def _grows(self) -> "DiffusionConfig":
        if self.beta_end < self.beta_start:
            raise ValueError(f"beta_end must be at least beta_start {self.beta_start}, got {self.beta_end}")
        return self


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
    """Neighbors of each image in the neighbors table; all of them are the context, or `neighbors_used`."""
    neighbors_used: NonNegativeInt = 0
    """How many of the k, drawn anew at each step and kept best first, are the context; 0: all."""
    neighbor_noise: NonNegativeFloat = 0.0
    """Standard deviation of the noise added to each entry of a neighbor's unit vector, which is then scaled
    back to length 1: for 768 dimensions 0.02 turns it by about 30 degrees. 0: none."""
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
    zero_stage: int = speed(1, ge=0, le=3)
    """What DeepSpeed splits over ranks: 0 nothing, 1 optimizer states, 2 also gradients, 3 also weights.

    One rank has nothing to split: in fp32 take 0 there, which is a few percent quicker.
    """
    activation_checkpointing: bool = speed(False)
    """Recompute activations in the backward pass: less memory, a third more work."""
    checkpoint_every: PositiveInt = speed(1000)
    """Steps between checkpoints."""
    keep_checkpoints: PositiveInt = speed(2)
    """Checkpoints kept, newest first."""
    keep_every: NonNegativeInt = speed(0)
    """Checkpoints of multiples of this many steps are kept for good; 0: none."""
    log_every: PositiveInt = speed(10)
    """Steps between lines of the log and of the metrics."""
    validation_images: NonNegativeInt = 0
    """Images that training never sees: the last rows of the shards, in order of their names."""
    validate_every: NonNegativeInt = speed(0)
    """Steps between losses on the held-out images, by the weights and by their average; 0: never."""
    preview_every: NonNegativeInt = speed(0)
    """Steps between sheets of samples by the averaged weights for held-out images; 0: never."""
    preview_prompts: tuple[str, ...] = speed((), strict=False)
    """Prompts, each a context by itself, whose samples stand below those for held-out images."""
    wandb: bool = speed(False)
    """Send what is logged to Weights & Biases too; its own environment (WANDB_MODE, ...) holds."""
    wandb_project: str = speed("")
    """The project there."""
    ranks: NonNegativeInt = speed(0)
    """Processes that `make train` starts on this machine, or workers on Ray; 0: one for each GPU, or one."""
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
        if (self.validate_every or self.preview_every) and not self.validation_images:
            raise ValueError("validate_every and preview_every need validation_images of at least 1")
        if self.wandb and not self.wandb_project:
            raise ValueError("wandb = true needs the name of a wandb_project")
        if self.keep_every % self.checkpoint_every:
            raise ValueError(f"keep_every must be a multiple of checkpoint_every, got {self.keep_every}")
        if self.neighbors_used > self.k:
            raise ValueError(f"neighbors_used must be at most k {self.k}, got {self.neighbors_used}")
        if self.global_batch % self.micro_batch:
            raise ValueError(f"global_batch must be a multiple of micro_batch, got {self.global_batch}")
        return self

    @property
    def context_tokens(self) -> int:
        """Neighbors in the context of a sample."""
        return self.neighbors_used or self.k

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
    clip: ClipConfig | None = speed(None)
    """The encoder of train.preview_prompts; None where there are none."""

    @model_validator(mode="after")
    def _reads_prompts(self) -> "Training":
        if self.train.preview_prompts and not self.clip:
            raise ValueError("train.preview_prompts need a section clip")
        return self
