"""A small autoencoder for small images: principal components of patches plus a few residual convolutions.

Reads and writes a folder with config.json and safetensors weights, like diffusers' autoencoders. It starts
from the best linear code of a patch, so that one minute of training on two cores gives latents for a tiny
diffusion model. Production uses diffusers' autoencoders.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save
from torch import nn
from torch.nn import functional

from retrieval.storage.root import Root

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"


@dataclass(frozen=True)
class PatchShape:
    """factor: patch edge in pixels; channels: of a latent; hidden: of a convolution; blocks: per half."""

    factor: int = 4
    channels: int = 4
    hidden: int = 64
    blocks: int = 2


class PatchAutoencoder(nn.Module):
    """Encodes pixels in [-1, 1] to latents with about unit variance in each channel, and decodes them."""

    components: torch.Tensor
    offset: torch.Tensor
    mean: torch.Tensor
    deviation: torch.Tensor

    def __init__(self, shape: PatchShape) -> None:
        super().__init__()
        self.shape = shape
        patch = 3 * shape.factor**2
        self.register_buffer("components", torch.zeros(shape.channels, patch))
        self.register_buffer("offset", torch.zeros(patch))
        self.register_buffer("mean", torch.zeros(shape.channels))
        self.register_buffer("deviation", torch.ones(shape.channels))
        self.to_latent = _residual_net(patch, shape.channels, shape)
        self.to_patch = _residual_net(shape.channels, patch, shape)

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """images: (n, 3, h, w), h and w multiples of factor. Returns (n, channels, h/factor, w/factor)."""
        patches = functional.pixel_unshuffle(images, self.shape.factor) - _channelwise(self.offset)
        code = functional.conv2d(patches, self.components[:, :, None, None]) + self.to_latent(patches)
        return (code - _channelwise(self.mean)) / _channelwise(self.deviation)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """latents: (n, channels, h, w). Returns (n, 3, h*factor, w*factor), not clipped."""
        code = latents * _channelwise(self.deviation) + _channelwise(self.mean)
        linear = functional.conv2d(code, self.components.T[:, :, None, None])
        patches = linear + self.to_patch(latents) + _channelwise(self.offset)
        return functional.pixel_shuffle(patches, self.shape.factor)

    @torch.no_grad()
    def fit_components(self, images: torch.Tensor) -> None:
        """Fit the linear code to the images' patches; their latents then have mean 0 and variance 1 per channel."""
        patches = functional.pixel_unshuffle(images, self.shape.factor).movedim(1, -1).flatten(0, -2)
        self.offset.copy_(patches.mean(dim=0))
        _, vectors = torch.linalg.eigh(torch.cov(patches.T))
        self.components.copy_(vectors[:, -self.shape.channels :].T.flip(0))
        latents = self.encode(images).movedim(1, -1).flatten(0, -2)
        mean, deviation = latents.mean(dim=0), latents.std(dim=0)
        self.mean += mean * self.deviation
        self.deviation *= deviation

    def save(self, folder: Path) -> None:
        """Write the weights, then config.json: an interrupted call leaves a folder that does not load."""
        root = Root(folder)
        weights = {name: tensor.detach().contiguous() for name, tensor in self.state_dict().items()}
        root.write_bytes(WEIGHTS_NAME, save(weights))
        root.write_json(CONFIG_NAME, {"_class_name": type(self).__name__, **asdict(self.shape)})

    @classmethod
    def from_config(cls, config: dict[str, int | str]) -> "PatchAutoencoder":
        """A model with random weights from the content of config.json."""
        values = {name: int(value) for name, value in config.items() if not name.startswith("_")}
        return cls(PatchShape(**values))


class _Residual(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.SiLU(), nn.Conv2d(hidden, hidden, 3, padding=1), nn.SiLU(), nn.Conv2d(hidden, hidden, 1)
        )

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = features + self.layers(features)
        return output


def _residual_net(inputs: int, outputs: int, shape: PatchShape) -> Callable[[torch.Tensor], torch.Tensor]:
    last = nn.Conv2d(shape.hidden, outputs, 3, padding=1)
    # Zero output, so that training starts from the linear code.
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)  # type: ignore[arg-type]
    blocks = [_Residual(shape.hidden) for _ in range(shape.blocks)]
    return nn.Sequential(nn.Conv2d(inputs, shape.hidden, 3, padding=1), *blocks, nn.SiLU(), last)


def _channelwise(values: torch.Tensor) -> torch.Tensor:
    return values[None, :, None, None]
