"""The denoising network: a UNet with cross-attention to neighbor embeddings.

One config class covers both models of the paper's Table 1 and the demo's small model. The network is diffusers'
UNet2DConditionModel, so that other programs can load exported folders.
"""

from typing import Any

import torch

from trainer.model.recipe import ModelConfig


def build_unet(config: ModelConfig) -> torch.nn.Module:
    """A network with random weights. Inputs: x_t (n, c, h, w), timesteps (n,), context (n, tokens, context_dim)."""
    from diffusers import UNet2DConditionModel  # slow to import, and not needed to check recipes

    attends = [2**level in config.attention for level in range(len(config.channels))]
    down = tuple("CrossAttnDownBlock2D" if attend else "DownBlock2D" for attend in attends)
    up = tuple("CrossAttnUpBlock2D" if attend else "UpBlock2D" for attend in reversed(attends))
    unet: Any = UNet2DConditionModel(
        in_channels=config.latent_channels,
        out_channels=config.latent_channels,
        cross_attention_dim=config.context_dim,
        block_out_channels=config.channels,
        # In diffusers this argument is the number of heads, in spite of its name.
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


def use_unfused_attention(unet: Any) -> None:
    """Compute attention with separate matrix products instead of torch's fused function, for training on CPUs.

    The backward pass of the fused function is slow there: in bf16 a step of the demo's network takes 1.2 to 1.4 times
    as long with it.
    """
    from diffusers.models.attention_processor import AttnProcessor  # slow to import, as above

    unet.set_attn_processor(AttnProcessor())


@torch.no_grad()
def _amplify_context(unet: Any, gain: float) -> None:
    for name, weight in unet.named_parameters():
        if name.endswith(("attn2.to_k.weight", "attn2.to_v.weight")):
            weight.mul_(gain)
