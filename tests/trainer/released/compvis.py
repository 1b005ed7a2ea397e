"""Reimplementation of the paper's networks with the parameter names and arithmetic of the CompVis code.

Only for tests. It does not use diffusers or our name mapping, so outputs and keys can be compared with ours.
"""

import math
from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional

from trainer.model.recipe import ModelConfig


class UNetResidual(nn.Module):
    def __init__(self, inputs: int, outputs: int, time: int) -> None:
        super().__init__()
        self.in_layers = nn.Sequential(nn.GroupNorm(32, inputs), nn.SiLU(), nn.Conv2d(inputs, outputs, 3, 1, 1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(time, outputs))
        last = nn.Conv2d(outputs, outputs, 3, 1, 1)
        self.out_layers = nn.Sequential(nn.GroupNorm(32, outputs), nn.SiLU(), nn.Dropout(0), last)
        self.skip_connection = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: torch.Tensor, time: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        hidden = self.in_layers(x) + self.emb_layers(time)[:, :, None, None]
        return self.skip_connection(x) + self.out_layers(hidden)


class Attention(nn.Module):
    def __init__(self, width: int, context: int, head: int) -> None:
        super().__init__()
        self.head = head
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context, width, bias=False)
        self.to_v = nn.Linear(context, width, bias=False)
        self.to_out = nn.Sequential(nn.Linear(width, width), nn.Dropout(0))

    def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            part.unflatten(-1, (-1, self.head)).transpose(1, 2)
            for part in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        shares = (q @ k.transpose(-1, -2) * self.head**-0.5).softmax(dim=-1)
        return self.to_out((shares @ v).transpose(1, 2).flatten(2))


class Gated(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 2 * hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * functional.gelu(gate)


class FeedForward(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(Gated(width, 4 * width), nn.Dropout(0), nn.Linear(4 * width, width))


class TransformerBlock(nn.Module):
    def __init__(self, width: int, context: int, head: int) -> None:
        super().__init__()
        self.attn1 = Attention(width, width, head)
        self.ff = FeedForward(width)
        self.attn2 = Attention(width, context, head)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(width), nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        x = x + self.attn1(self.norm1(x), self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff.net(self.norm3(x))


class SpatialTransformer(nn.Module):
    def __init__(self, width: int, context: int, head: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(32, width, eps=1e-6)
        self.proj_in = nn.Conv2d(width, width, 1)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(width, context, head)])
        self.proj_out = nn.Conv2d(width, width, 1)

    def forward(self, x: torch.Tensor, time: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        tokens = self.proj_in(self.norm(x)).flatten(2).transpose(1, 2)
        for block in self.transformer_blocks:
            tokens = block(tokens, context)
        return x + self.proj_out(tokens.transpose(1, 2).unflatten(2, x.shape[2:]))


class UNetDown(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(width, width, 3, 2, 1)

    def forward(self, x: torch.Tensor, time: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        return self.op(x)


class UNetUp(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, 1, 1)

    def forward(self, x: torch.Tensor, time: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        return self.conv(functional.interpolate(x, scale_factor=2, mode="nearest"))


class FirstConvolution(nn.Conv2d):
    def forward(self, x: torch.Tensor, time: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        return super().forward(x)


class Layers(nn.Sequential):
    def forward(self, x: torch.Tensor, time: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        for layer in self:
            x = layer(x, time, context)
        return x


class UNetModel(nn.Module):
    """The UNet of the original code."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        base, widths, layers = config.channels[0], config.channels, config.layers
        time = 4 * base

        def residual(inputs: int, outputs: int, level: int) -> list[nn.Module]:
            made: list[nn.Module] = [UNetResidual(inputs, outputs, time)]
            if 2**level in config.attention:
                made.append(SpatialTransformer(outputs, config.context_dim, config.channels_per_head))
            return made

        self.time_embed = nn.Sequential(nn.Linear(base, time), nn.SiLU(), nn.Linear(time, time))
        self.input_blocks = nn.ModuleList([Layers(FirstConvolution(config.latent_channels, base, 3, 1, 1))])
        passed, width = [base], base
        for level, wide in enumerate(widths):
            for _ in range(layers):
                self.input_blocks.append(Layers(*residual(width, wide, level)))
                width = wide
                passed.append(width)
            if level + 1 < len(widths):
                self.input_blocks.append(Layers(UNetDown(width)))
                passed.append(width)
        self.middle_block = Layers(
            UNetResidual(width, width, time),
            SpatialTransformer(width, config.context_dim, config.channels_per_head),
            UNetResidual(width, width, time),
        )
        self.output_blocks = nn.ModuleList()
        for level, wide in reversed(list(enumerate(widths))):
            for layer in range(layers + 1):
                parts = residual(width + passed.pop(), wide, level)
                width = wide
                if level and layer == layers:
                    parts.append(UNetUp(width))
                self.output_blocks.append(Layers(*parts))
        last = nn.Conv2d(width, config.latent_channels, 3, 1, 1)
        self.out = nn.Sequential(nn.GroupNorm(32, width), nn.SiLU(), last)
        self.base = base

    def forward(self, x: torch.Tensor, timesteps: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        half = self.base // 2
        speeds = (-math.log(10000) * torch.arange(half, dtype=torch.float32) / half).exp()
        angles = timesteps[:, None].float() * speeds
        time = self.time_embed(torch.cat([angles.cos(), angles.sin()], dim=-1))
        passed = []
        for block in self.input_blocks:
            x = block(x, time, context)
            passed.append(x)
        x = self.middle_block(x, time, context)
        for block in self.output_blocks:
            x = block(torch.cat([x, passed.pop()], dim=1), time, context)
        return self.out(x)


class Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(32, inputs, eps=1e-6), nn.Conv2d(inputs, outputs, 3, 1, 1)
        self.norm2, self.conv2 = nn.GroupNorm(32, outputs, eps=1e-6), nn.Conv2d(outputs, outputs, 3, 1, 1)
        if inputs != outputs:
            self.nin_shortcut = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.conv1(functional.silu(self.norm1(x)))
        hidden = self.conv2(functional.silu(self.norm2(hidden)))
        return hidden + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class PixelAttention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(32, width, eps=1e-6)
        self.q, self.k, self.v = (nn.Conv2d(width, width, 1) for _ in range(3))
        self.proj_out = nn.Conv2d(width, width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normal = self.norm(x)
        q, k, v = (part(normal).flatten(2) for part in (self.q, self.k, self.v))
        shares = (q.transpose(1, 2) @ k * x.shape[1] ** -0.5).softmax(dim=-1)
        return x + self.proj_out((v @ shares.transpose(1, 2)).unflatten(2, x.shape[2:]))


class Level(nn.Module):
    """One resolution: residual blocks, optional attention, and a change of size."""

    def __init__(self, widths: list[int], attends: bool) -> None:
        super().__init__()
        self.block = nn.ModuleList([Residual(*pair) for pair in pairwise(widths)])
        self.attn = nn.ModuleList([PixelAttention(width) for width in widths[1:]] if attends else [])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for number, block in enumerate(self.block):
            x = block(x)
            if len(self.attn):
                x = self.attn[number](x)
        return x


class Resample(nn.Module):
    def __init__(self, width: int, up: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, 1, 1) if up else nn.Conv2d(width, width, 3, 2, 0)
        self.up = up

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.up:
            return self.conv(functional.interpolate(x, scale_factor=2, mode="nearest"))
        return self.conv(functional.pad(x, (0, 1, 0, 1)))


class Middle(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.block_1, self.attn_1, self.block_2 = (
            Residual(width, width),
            PixelAttention(width),
            Residual(width, width),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Module):
    def __init__(self, widths: list[int], outputs: int, attends_last: bool) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, widths[0], 3, 1, 1)
        self.down = nn.ModuleList()
        for level, (before, width) in enumerate(zip([widths[0], *widths], widths)):
            last = level == len(widths) - 1
            self.down.append(Level([before, width, width], attends_last and last))
            if not last:
                self.down[-1].downsample = Resample(width, up=False)
        self.mid = Middle(widths[-1])
        self.norm_out = nn.GroupNorm(32, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], outputs, 3, 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
            x = level.downsample(x) if hasattr(level, "downsample") else x
        return self.conv_out(functional.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    def __init__(self, widths: list[int], inputs: int, attends_last: bool) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(inputs, widths[-1], 3, 1, 1)
        self.mid = Middle(widths[-1])
        levels = []
        for level, (width, above) in enumerate(zip(widths, [*widths[1:], widths[-1]])):
            levels.append(Level([above, width, width, width], attends_last and level == len(widths) - 1))
            if level:
                levels[-1].upsample = Resample(width, up=True)
        self.up = nn.ModuleList(levels)
        self.norm_out = nn.GroupNorm(32, widths[0], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[0], 3, 3, 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.mid(self.conv_in(x))
        for level in reversed(self.up):
            x = level(x)
            x = level.upsample(x) if hasattr(level, "upsample") else x
        return self.conv_out(functional.silu(self.norm_out(x)))


class Variational(nn.Module):
    """KL-f16: five resolutions, attention at the last."""

    def __init__(self, width: int, channels: int = 16) -> None:
        super().__init__()
        widths = [width, width, 2 * width, 2 * width, 4 * width]
        self.encoder, self.decoder = Encoder(widths, 2 * channels, True), Decoder(widths, channels, True)
        self.quant_conv = nn.Conv2d(2 * channels, 2 * channels, 1)
        self.post_quant_conv = nn.Conv2d(channels, channels, 1)

    def moments(self, x: torch.Tensor) -> torch.Tensor:
        mean, log_variance = self.quant_conv(self.encoder(x)).chunk(2, dim=1)
        return torch.cat([mean, (0.5 * log_variance.clamp(-30, 20)).exp()], dim=1)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.post_quant_conv(latents))


class Codes(nn.Module):
    def __init__(self, count: int, channels: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(count, channels)


class Quantized(nn.Module):
    """VQ-f4: three resolutions, attention only in the middle."""

    def __init__(self, width: int, codes: int = 8192, channels: int = 3) -> None:
        super().__init__()
        widths = [width, 2 * width, 4 * width]
        self.encoder, self.decoder = Encoder(widths, channels, False), Decoder(widths, channels, False)
        self.quantize = Codes(codes, channels)
        self.quant_conv = nn.Conv2d(channels, channels, 1)
        self.post_quant_conv = nn.Conv2d(channels, channels, 1)

    def moments(self, x: torch.Tensor) -> torch.Tensor:
        mean = self.quant_conv(self.encoder(x))
        return torch.cat([mean, torch.zeros_like(mean)], dim=1)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        codes = self.quantize.embedding.weight
        nearest = torch.cdist(latents.movedim(1, -1).flatten(0, -2), codes).argmin(dim=1)
        chosen = codes[nearest].unflatten(0, (len(latents), *latents.shape[2:])).movedim(-1, 1)
        return self.decoder(self.post_quant_conv(chosen))


def checkpoint(unet: nn.Module, first_stage: nn.Module, beta_end: float) -> dict[str, torch.Tensor]:
    """The state_dict of the full model with the buffers of the schedule, without an average."""
    betas = torch.linspace(0.0015**0.5, beta_end**0.5, 1000, dtype=torch.float64) ** 2
    alphas = torch.cumprod(1 - betas, dim=0)
    state = {f"model.diffusion_model.{name}": tensor for name, tensor in unet.state_dict().items()}
    state |= {f"first_stage_model.{name}": tensor for name, tensor in first_stage.state_dict().items()}
    return state | {
        "betas": betas.float(),
        "alphas_cumprod": alphas.float(),
        "sqrt_alphas_cumprod": alphas.sqrt().float(),
    }


def average(unet: nn.Module) -> dict[str, torch.Tensor]:
    """The averaged copy in the original format: buffer names have no dots."""
    names = {name: f"diffusion_model.{name}".replace(".", "") for name, _ in unet.named_parameters()}
    state = {f"model_ema.{names[name]}": tensor.detach() for name, tensor in unet.named_parameters()}
    return state | {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(112_000)}


def randomize(network: nn.Module, seed: int) -> nn.Module:
    """Random weights with which every layer affects the output: normal, scaled by fan-in; norms near 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in network.parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if weight.ndim == 1:
                weight.copy_(0.2 * noise if weight.mean() < 0.5 else 1 + 0.2 * noise)
            else:
                weight.copy_(noise * weight[0].numel() ** -0.5)
    return network.eval().requires_grad_(False)
