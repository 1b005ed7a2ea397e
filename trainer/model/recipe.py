"""The recipe sections of the networks: `autoencoder`, `model`, `diffusion` and `train.lora`.

This module imports neither torch nor diffusers, so that reading and checking settings is fast.
"""

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from retrieval.config import Config, added_setting
from retrieval.recipe import Precision

AutoencoderKind = Literal["kl", "vq", "patch"]
Prediction = Literal["epsilon", "v_prediction"]
SchedulerName = Literal["ddim", "plms", "dpm++", "euler", "euler_karras", "unipc"]
ContextNorm = Literal["unit", "raw"]
Integers = Annotated[tuple[PositiveInt, ...], Field(strict=False)]


class AutoencoderConfig(Config):
    """The autoencoder (section `autoencoder` of a recipe)."""

    kind: AutoencoderKind
    """`kl`: diffusers' AutoencoderKL; `vq`: diffusers' VQModel; `patch`: the demo's PatchAutoencoder."""
    path: str
    """Folder with config.json and the weights in safetensors format."""
    scale: PositiveFloat = 1.0
    """Factor on the latents that brings their variance to about 1."""

    def precision(self, device: str) -> Precision:
        """Number format in which images are encoded on a device such as "cuda:0"."""
        return "bf16" if self.kind != "patch" and device.startswith("cuda") else "fp32"


class ModelConfig(Config):
    """Shape of the UNet (section `model` of a recipe)."""

    latent_channels: PositiveInt
    """Channels of the network's input and output: those of a latent."""
    context_dim: PositiveInt
    """Dimension of a neighbor embedding, which is that of the CLIP encoder."""
    context_norm: ContextNorm = "unit"
    """Length of the CLIP vectors that condition the network. `unit`: normalized to 1, as in the paper's LAION model;
    `raw`: as CLIP gives them (about 10 for ViT-B/32), as in the paper's ImageNet model."""
    channels: Integers
    """Channels at each resolution, finest first. Each resolution is half of the previous one."""
    attention: Integers
    """Downsampling factors (1, 2, 4, ...) with cross-attention to the context; the middle always has it."""
    layers: PositiveInt = 2
    """Residual blocks at each resolution."""
    channels_per_head: PositiveInt = 32
    """Channels of one attention head."""
    norm_groups: PositiveInt = 32
    """Groups of each group normalization; must divide every entry of `channels`."""
    context_gain: PositiveFloat = 1.0
    """Factor on the initial key and value weights of cross-attention. 1 in the paper; a larger factor makes
    short training runs use the neighbors earlier, because the entries of a unit vector are small."""

    @model_validator(mode="after")
    def _check(self) -> "ModelConfig":
        factors = [2**level for level in range(len(self.channels))]
        if not set(self.attention) <= set(factors):
            raise ValueError(f"attention must be among {factors}, got {list(self.attention)}")
        for divisor in (self.norm_groups, self.channels_per_head):
            if any(width % divisor for width in self.channels):
                raise ValueError(f"channels {list(self.channels)} must be divisible by {divisor}")
        return self


class DiffusionConfig(Config):
    """The noise schedule and the prediction target (section `diffusion` of a recipe)."""

    steps: PositiveInt = 1000
    """T, the number of timesteps."""
    beta_start: float = Field(0.0015, gt=0, lt=1)
    """beta at t = 0."""
    beta_end: float = Field(0.015, gt=0, lt=1)
    """beta at t = T - 1; the square root of beta is linear in t."""
    prediction: Prediction = "epsilon"
    """epsilon as in the paper, or v = sqrt(abar_t) eps - sqrt(1 - abar_t) x_0."""
    zero_terminal_snr: bool = added_setting(False)
    """Rescale the schedule so that the last timestep is pure noise, where sampling then starts (Lin et al. 2023). Needs
    v_prediction."""

    @model_validator(mode="after")
    def _check(self) -> "DiffusionConfig":
        if self.zero_terminal_snr and self.prediction != "v_prediction":
            raise ValueError("zero_terminal_snr needs v_prediction: at pure noise, epsilon says nothing of the picture")
        if self.beta_end < self.beta_start:
            raise ValueError(f"beta_end must be at least beta_start {self.beta_start}, got {self.beta_end}")
        return self


class LoraConfig(Config):
    """Low-rank adapters, trained in place of the weights (section `train.lora` of a recipe)."""

    rank: PositiveInt = 16
    """Rank of the change of a layer's weights."""
    alpha: PositiveFloat = 16.0
    """The change is multiplied by alpha / rank."""
    target: tuple[str, ...] = Field(("to_q", "to_k", "to_v", "to_out.0"), strict=False, min_length=1)
    """Ends of the names of linear layers: by default the projections of all attention. `attn2.to_k` and `attn2.to_v`
    are those of the neighbors, `ff.net.0.proj` and `ff.net.2` the layers behind attention."""
