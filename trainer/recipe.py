"""The recipe sections `latents` and `train`; those of the networks are in `trainer/model/recipe.py`.

DeepSpeed's settings are derived from them. This module imports neither torch nor DeepSpeed, so that reading and
checking settings is fast.
"""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from retrieval.config import ADDED, Config, WorkersConfig, added_setting, runtime_setting
from retrieval.recipe import ClipConfig
from trainer.model.recipe import AutoencoderConfig, DiffusionConfig, LoraConfig, ModelConfig

Decay = Literal["none", "linear", "cosine"]
TimestepSampling = Literal["uniform", "logit_normal", "density"]
CHANGEABLE = frozenset(
    {"steps", "global_batch", "learning_rate", "learning_rate_decay", "final_learning_rate", "warmup_steps"}
    | {"weight_decay", "decay_norms_and_biases", "adam_beta1", "adam_beta2", "adam_eps", "max_grad_norm", "ema_decay"}
)
"""Settings of section `train` that may change when a run is resumed. The metrics have the resulting numbers, the log
names every change."""
MAX_EMA_WIDTH = 0.288
"""Just below 12^(-1/2), the width of the mean of all steps."""
EmaWidth = Annotated[float, Field(gt=0, le=MAX_EMA_WIDTH)]


class LatentsConfig(WorkersConfig):
    """How training images are encoded to latents (section `latents` of a recipe)."""

    size: PositiveInt
    """Edge of a view in pixels: the shorter edge of the image is resized to it, then a square is cropped."""
    views: PositiveInt = 1
    """Views of each image; epoch e of training uses view e % views."""
    flip: bool = True
    """Mirror half of the views, except view 0."""
    aspect_step: NonNegativeInt = added_setting(0)
    """As `train.aspect_step`, which must be equal."""
    seed: NonNegativeInt = 0
    """Seed of the random crops."""
    batch_size: PositiveInt = runtime_setting(32)
    """Views in one call of the autoencoder."""
    decode_threads: PositiveInt = runtime_setting(2)
    """Threads of a worker that decode and crop images while the autoencoder encodes others."""
    gpus_per_worker: float = runtime_setting(0.0, ge=0)
    """GPUs of each worker; 0: CPU. GPUs encode `kl` and `vq` in bf16, and such latents have another fingerprint."""

    @property
    def device(self) -> str:
        """Torch device of the autoencoder."""
        return "cuda" if self.gpus_per_worker else "cpu"


class TrainConfig(Config):
    """Training of the UNet (section `train` of a recipe)."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run, which is also its folder below `runs/`."""
    start_from: str = ""
    """Name of a finished run; its exported weights initialize this one. Empty: random initial weights."""
    lora: LoraConfig | None = added_setting(None)
    """Train adapters (section `train.lora`) and leave the weights of `start_from` as they are. None: train all weights.
    The finished run has both the adapters and a whole model with them."""
    source: Literal["latents", "images"]
    """`latents`: those of `make latents`; `images`: pictures of `download/train`, which each step crops and encodes."""
    size: PositiveInt
    """Edge of a training image in pixels."""
    k: PositiveInt
    """Neighbors of each image in the neighbors table."""
    neighbors_used: NonNegativeInt = 0
    """Neighbors in the context of a sample, drawn from the k at each step, best first; 0: all k."""
    neighbor_noise: NonNegativeFloat = 0.0
    """Standard deviation of the noise added to each entry of a neighbor's unit vector, which then gets its former
    length. 0.02 rotates a vector of 768 dimensions by about 30 degrees. 0: no noise."""
    flip: bool = True
    """Mirror half of the images. Unused for latents: section `latents` has its own `flip`."""
    aspect_step: NonNegativeInt = added_setting(0)
    """Batches of equal aspect ratio: edges in steps of this many pixels, areas of at most size^2, ratios up to 2; each
    image is in the nearest shape. 0: squares."""
    global_batch: PositiveInt
    """Samples in one optimizer step, summed over all ranks."""
    micro_batch: PositiveInt = runtime_setting(...)
    """Samples in one forward and backward pass of a rank; gradients accumulate over its share of the step."""
    interleaved_shards: PositiveInt = 16
    """Shards that each global batch is drawn from. If the number of ranks divides it and it divides
    global_batch, each rank opens only its own part of the shards; else up to two more."""
    steps: PositiveInt
    """Optimizer steps, skipped ones included. A larger number continues a finished run."""
    learning_rate: PositiveFloat = 1e-4
    """Learning rate of AdamW after the warm-up."""
    optimizer: Literal["adamw", "adamw_8bit"] = added_setting("adamw")
    """`adamw_8bit` is that of the package bitsandbytes, which stores moments in 8 bits: 2 bytes a weight instead of 8.
    For one rank, with zero_stage 0, 1 or 2."""
    warmup_steps: NonNegativeInt = 10_000
    """Steps over which the learning rate rises linearly from 0."""
    learning_rate_decay: Decay = added_setting("none")
    """Course of the learning rate from the warm-up to the end of `steps`: `linear`, `cosine`, or `none` (constant)."""
    final_learning_rate: NonNegativeFloat = added_setting(0.0)
    """Learning rate at the end of the decay."""
    weight_decay: NonNegativeFloat = 0.01
    """Decoupled weight decay of AdamW."""
    decay_norms_and_biases: bool = added_setting(True)
    """Weight decay also of biases and of the weights of normalizations."""
    adam_beta1: float = added_setting(0.9, ge=0, lt=1)
    """Decay of AdamW's average of gradients."""
    adam_beta2: float = added_setting(0.999, ge=0, lt=1)
    """Decay of AdamW's average of squared gradients."""
    adam_eps: PositiveFloat = added_setting(1e-8)
    """Added to the denominator of AdamW."""
    max_grad_norm: NonNegativeFloat = 1.0
    """Gradients are clipped to this global norm; 0: no clipping."""
    max_skipped_steps: NonNegativeInt = runtime_setting(20)
    """Consecutive steps with a non-finite loss or gradient that may be skipped; one more ends the run."""
    max_replaced: float = runtime_setting(0.001, ge=0, le=1)
    """Largest share of the samples that may be replaced by other rows of their shard because their picture cannot be
    read; more end the run. 10 samples may always be replaced."""
    p_uncond: float = Field(0.1, ge=0, le=1)
    """Probability that a sample is trained without neighbors (for classifier-free guidance)."""
    min_snr_gamma: NonNegativeFloat = added_setting(0.0)
    """Weights the loss of a sample by min(SNR, gamma) / SNR, for v_prediction by min(SNR, gamma) / (SNR + 1), SNR being
    the signal-to-noise ratio of its timestep (Hang et al. 2023: 5). The validation loss has no weights. 0: none."""
    timestep_sampling: TimestepSampling = added_setting("uniform")
    """Distribution of the timesteps in training: `logit_normal` (Esser et al. 2024) or that of `timestep_density`."""
    timestep_logit_mean: float = added_setting(0.0)
    """`logit_normal`: mean of the logit of t / T. Above 0: more noise."""
    timestep_logit_deviation: PositiveFloat = added_setting(1.0)
    """`logit_normal`: standard deviation of the logit of t / T."""
    timestep_density: tuple[NonNegativeFloat, ...] = added_setting((), strict=False)
    """`density`: relative frequencies of equal ranges of timesteps, least noise first, such as [1, 2, 2, 1]."""
    ema_decay: float = Field(0.9999, ge=0, lt=1)
    """Decay of the moving average of the weights, which is exported. 0: no average; the weights are exported."""
    ema_widths: tuple[EmaWidth, ...] = added_setting((), strict=False)
    """Widths of further averages for `laion-rdm convert --ema-width`, such as [0.05, 0.1]: standard deviation of the
    averaged steps as a share of the training (Karras et al. 2024). 4 bytes a weight each."""
    ema_snapshot_every: PositiveInt = runtime_setting(5000)
    """Steps between snapshots of these averages, which are never deleted: 2 bytes a weight each."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Number format of the network. Master weights, their average and the loss are always fp32."""
    zero_stage: int = runtime_setting(1, ge=0, le=3)
    """What ranks share: 0 nothing (faster on one rank in fp32), 1 optimizer states, 2 and gradients, 3 and weights."""
    reduce_in_fp32: bool = runtime_setting(False)
    """With precision bf16, add the gradients of the ranks in fp32 and round the sum once: twice the bytes of gradients
    between ranks, and up to 4 GB more memory."""
    deterministic: bool = runtime_setting(False)
    """Use only deterministic algorithms, some slower: a resumed run then equals an uninterrupted one on CUDA too."""
    activation_checkpointing: bool = runtime_setting(False)
    """Recompute activations in the backward pass: less memory, a third more computation."""
    compile: bool = runtime_setting(False)
    """Compile the network with torch.compile for batches of micro_batch samples: faster steps on a GPU after minutes of
    compilation at each start. Not with zero_stage 3."""
    channels_last: bool = runtime_setting(False)
    """Order the network's activations in memory with the channels last, as convolutions on tensor cores read them."""
    timeout_minutes: PositiveInt = runtime_setting(60)
    """Time that a rank waits for the others in a collective, such as for rank 0 while it draws previews or exports."""
    checkpoint_every: PositiveInt = runtime_setting(1000)
    """Steps between checkpoints."""
    keep_checkpoints: PositiveInt = runtime_setting(2)
    """Number of newest checkpoints that are kept."""
    keep_every: NonNegativeInt = runtime_setting(0)
    """Checkpoints at multiples of this step are never deleted; 0: none."""
    log_every: PositiveInt = runtime_setting(10)
    """Steps between lines of the log and of metrics.jsonl."""
    profile_steps: NonNegativeInt = runtime_setting(0)
    """Steps of each start that torch.profiler records on rank 0, after the first 5, to `profile/`; 0: none."""
    validation_images: NonNegativeInt = 0
    """Held-out images, excluded from training: the last rows over all shards, in order of shard names."""
    validate_every: NonNegativeInt = runtime_setting(0)
    """Steps between losses on the held-out images, of the weights and of their average; 0: never."""
    preview_every: NonNegativeInt = runtime_setting(0)
    """Steps between sheets of samples for held-out images, drawn with the averaged weights; 0: never."""
    preview_prompts: tuple[str, ...] = runtime_setting((), strict=False)
    """Prompts that the sheets also show samples for, each conditioned on the prompt alone."""
    kid_every: NonNegativeInt = runtime_setting(0)
    """Steps between kernel distances (KID) of samples for held-out images from these, by [clip]; 0: never."""
    kid_images: int = runtime_setting(1000, ge=2)
    """Held-out images of the kernel distance: the first ones, at most this many."""
    wandb: bool = runtime_setting(False)
    """Also log to Weights & Biases, which reads its own environment variables (WANDB_MODE, ...)."""
    wandb_project: str = runtime_setting("")
    """Project name in Weights & Biases."""
    ranks: NonNegativeInt = runtime_setting(0)
    """Processes that `make train` starts on this machine, or workers on Ray; 0: one per GPU, at least one."""
    wait_for_gpus_s: NonNegativeInt = runtime_setting(1800)
    """On a Ray cluster, longest wait until it has a free GPU for each of `ranks` ranks, which Ray is asked for. 0: no
    wait, and a cluster without GPUs trains on CPUs. With ranks = 0, the number of GPUs at the start counts. GPUs
    that are there but in use are waited for at least 60 s."""
    workers: PositiveInt = runtime_setting(2)
    """Threads of each rank that read, decode and crop samples."""
    prefetch_batches: PositiveInt = runtime_setting(4)
    """Batches that each rank prepares ahead of the current step."""
    cache_folder: str = runtime_setting("")
    """Folder on the local disk for copies of the shards of an object store, which all ranks of a machine share. Empty:
    a folder beside other temporary files (TMPDIR); if cache_gb is 0 too, both settings of [storage] count."""
    cache_gb: float = runtime_setting(0.0, ge=0)
    """Largest size of these copies in GB. Below three times `interleaved_shards` shards, training waits more for data.
    0: half of the free disk space."""
    restart: bool = runtime_setting(False)
    """Delete a run with other settings or more steps in the folder, and start over; false: it is an error."""
    seed: NonNegativeInt = 0
    """Seed of the initial weights, the sample order and all noise."""

    @model_validator(mode="after")
    def _check(self) -> "TrainConfig":
        if self.zero_stage == 0 and self.precision != "fp32":
            raise ValueError("zero_stage 0 has no fp32 master weights: set precision fp32, or zero_stage 1")
        if self.zero_stage == 3 and self.compile:
            raise ValueError("zero_stage 3 fetches weights in hooks that cannot be compiled: set compile = false")
        if self.aspect_step and self.compile:
            raise ValueError("compile is for batches of one shape: set aspect_step = 0 or compile = false")
        if len({f"{width:g}" for width in self.ema_widths}) < len(self.ema_widths):
            raise ValueError(f"ema_widths must differ in their first 6 digits, got {list(self.ema_widths)}")
        if self.lora and not self.start_from:
            raise ValueError("lora needs start_from: adapters change a model that is already trained")
        if self.zero_stage == 3 and (self.lora or self.optimizer == "adamw_8bit"):
            raise ValueError('lora and optimizer "adamw_8bit" work with zero_stage 0, 1 and 2: stage 3 shards weights')
        least = 2 if self.kid_every else int(self.validate_every > 0 or self.preview_every > 0)
        if self.validation_images < least:
            raise ValueError(f"validate_every, preview_every and kid_every need validation_images of at least {least}")
        if self.wandb and not self.wandb_project:
            raise ValueError("wandb = true needs a wandb_project")
        if self.keep_every % self.checkpoint_every:
            raise ValueError(f"keep_every must be a multiple of checkpoint_every, got {self.keep_every}")
        if (self.timestep_sampling == "density") != (sum(self.timestep_density) > 0):
            raise ValueError('timestep_sampling "density" and timestep_density with a number above 0 need each other')
        if self.neighbors_used > self.k:
            raise ValueError(f"neighbors_used must be at most k {self.k}, got {self.neighbors_used}")
        if self.global_batch % self.micro_batch:
            raise ValueError(f"global_batch must be a multiple of micro_batch, got {self.global_batch}")
        return self

    @property
    def context_tokens(self) -> int:
        """Number of neighbors in the context of a sample."""
        return self.neighbors_used or self.k

    def without_changeable(self) -> "TrainConfig":
        """A copy with fixed values of the settings in CHANGEABLE, for the identity of checkpoints."""
        fields = type(self).model_fields
        # An added setting must be at its default, where fingerprints leave it out.
        is_added = {name: fields[name].json_schema_extra == ADDED for name in CHANGEABLE}
        return self.model_copy(update={name: fields[name].default if is_added[name] else 0 for name in CHANGEABLE})

    @property
    def folder(self) -> str:
        """The run's training folder relative to the root; also the stage name of its manifest."""
        return f"runs/{self.name}/train"


class TrainingRecipe(Config):
    """The recipe sections that training reads."""

    model: ModelConfig
    diffusion: DiffusionConfig
    autoencoder: AutoencoderConfig
    train: TrainConfig
    clip: ClipConfig | None = runtime_setting(None)
    """The encoder of train.preview_prompts and train.kid_every; None without them."""

    @model_validator(mode="after")
    def _check(self) -> "TrainingRecipe":
        if (self.train.preview_prompts or self.train.kid_every) and not self.clip:
            raise ValueError("train.preview_prompts and train.kid_every need a section clip")
        if self.train.min_snr_gamma and self.diffusion.zero_terminal_snr:
            raise ValueError("min_snr_gamma gives the last timestep of zero_terminal_snr the weight 0: use one of them")
        return self
