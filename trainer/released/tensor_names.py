"""Maps diffusers' parameter names to the keys of checkpoints of the paper's code (CompVis).

Covers the UNet with spatial transformers and the variational and quantized autoencoders. The mapping
starts from our names, so a tensor of our networks that a checkpoint lacks is an error. Pure functions.
"""

import re

from trainer.model.recipe import ModelConfig

UNET = "model.diffusion_model."
AVERAGE = "model_ema."
AUTOENCODER = "first_stage_model."

_BLOCK = re.compile(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.+)")
_MIDDLE = re.compile(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)")
_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_AUTOENCODER_PARTS = {
    "conv_norm_out": "norm_out",
    "conv_shortcut": "nin_shortcut",
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}


def unet_key(name: str, config: ModelConfig) -> str:
    """Checkpoint key of a UNet parameter. Names within attention blocks are the same in both."""
    if block := _BLOCK.fullmatch(name):
        side, level, kind, number, rest = block.groups()
        module = _down_module if side == "down" else _up_module
        return f"{UNET}{module(config, int(level), kind, int(number))}.{_inside(kind, rest)}"
    if middle := _MIDDLE.fullmatch(name):
        kind, number, rest = middle.groups()
        # The order is residual, attention, residual.
        position = 2 * int(number) if kind == "resnets" else 1
        return f"{UNET}middle_block.{position}.{_inside(kind, rest)}"
    return UNET + _renamed(name, _ENDS)


def average_key(key: str) -> str:
    """Checkpoint key of the averaged copy of a UNet tensor: without dots, which buffer names cannot have."""
    return AVERAGE + key.removeprefix("model.").replace(".", "")


def autoencoder_key(name: str, levels: int) -> str:
    """Checkpoint key of an autoencoder parameter. levels: number of resolutions of the autoencoder."""
    side, _, rest = name.partition(".")
    if side not in ("encoder", "decoder"):
        return AUTOENCODER + name
    if block := _BLOCK.fullmatch(rest):
        direction, level, kind, number, inner = block.groups()
        part = {"resnets": f"block.{number}", "attentions": f"attn.{number}"}.get(kind, f"{direction}sample")
        # CompVis numbers both directions from the finest resolution.
        resolution = int(level) if direction == "down" else levels - 1 - int(level)
        return f"{AUTOENCODER}{side}.{direction}.{resolution}.{part}.{_renamed(inner, _AUTOENCODER_PARTS)}"
    if middle := _MIDDLE.fullmatch(rest):
        kind, number, inner = middle.groups()
        part = f"{'block' if kind == 'resnets' else 'attn'}_{int(number) + 1}"
        return f"{AUTOENCODER}{side}.mid.{part}.{_renamed(inner, _AUTOENCODER_PARTS)}"
    return f"{AUTOENCODER}{side}.{_renamed(rest, _AUTOENCODER_PARTS)}"


def _down_module(config: ModelConfig, level: int, kind: str, number: int) -> str:
    """Module of a down block. Block 0 is the first convolution; all but the last end with a downsampler."""
    first = 1 + level * (config.layers + 1)
    if kind == "downsamplers":
        return f"input_blocks.{first + config.layers}.0"
    return f"input_blocks.{first + number}.{int(kind == 'attentions')}"


def _up_module(config: ModelConfig, level: int, kind: str, number: int) -> str:
    """Module of an up block. It has one layer more than the down block; the last has the upsampler."""
    first = level * (config.layers + 1)
    if kind == "upsamplers":
        attends = 2 ** (len(config.channels) - 1 - level) in config.attention
        return f"output_blocks.{first + config.layers}.{2 if attends else 1}"
    return f"output_blocks.{first + number}.{int(kind == 'attentions')}"


def _inside(kind: str, rest: str) -> str:
    if kind == "resnets":
        return _renamed(rest, _RESNET)
    return rest.replace("conv.", "op.") if kind == "downsamplers" else rest


def _renamed(name: str, table: dict[str, str]) -> str:
    module, _, leaf = name.rpartition(".")
    return f"{table.get(module, module)}.{leaf}"
