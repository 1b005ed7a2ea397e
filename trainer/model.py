"""The denoising network: a UNet whose cross-attention reads neighbor embeddings as they are.

Reads nothing, writes nothing. One configuration expresses both models of the paper's Table 1 and the
small one of the demo; the network is diffusers' own class, so that its folders open anywhere.
"""

from typing import Annotated, Any

import torch
from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from retrieval.config import Config

Integers = Annotated[tuple[PositiveInt, ...], Field(strict=False)]


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


def build_unet(config: ModelConfig) -> torch.nn.Module:
    """A UNet2DConditionModel with fresh weights.

    It takes (n, c, h, w), (n,) timesteps and (n, tokens, context_dim).
    """
    from diffusers import UNet2DConditionModel  # it takes long, and many need ModelConfig alone

    attends = [2**level in config.attention for level in range(len(config.channels))]
    down = tuple("CrossAttnDownBlock2D" if attend else "DownBlock2D" for attend in attends)
    up = tuple("CrossAttnUpBlock2D" if attend else "UpBlock2D" for attend in reversed(attends))
    unet: Any = UNet2DConditionModel(
        in_channels=config.latent_channels,
        out_channels=config.latent_channels,
        cross_attention_dim=config.context_dim,
        block_out_channels=config.channels,
        # diffusers' argument of this name is the number of heads.
        attention_head_dim=tuple(width // config.channels_per_head for width in config.channels),
        down_block_types=down,
        up_block_types=up,
        layers_per_block=config.layers,
        norm_num_groups=config.norm_groups,
        transformer_layers_per_block=1,
        use_linear_projection=False,
        act_fn="silu",
        norm_eps=1e-5,
        flip_sin_to_cos=True,
        freq_shift=0,
        downsample_padding=1,
    )
    _amplify_context(unet, config.context_gain)
    return unet


@torch.no_grad()
def _amplify_context(unet: Any, gain: float) -> None:
    for name, weight in unet.named_parameters():
        if name.endswith(("attn2.to_k.weight", "attn2.to_v.weight")):
            weight.mul_(gain)
