"""The frozen autoencoder between images and latents.

Reads a folder in diffusers' `save_pretrained` layout with an AutoencoderKL, a VQModel or our PatchAutoencoder; weights
in safetensors format only. All three have the same interface for `latents`, `train` and `sample`.
"""

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from retrieval.errors import UserError
from retrieval.storage.root import file_sha256
from trainer.model.patch_autoencoder import CONFIG_NAME, WEIGHTS_NAME, PatchAutoencoder
from trainer.model.recipe import AutoencoderConfig, AutoencoderKind

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, VQModel


PIXELS_AT_ONCE = 8 * 768**2
"""Pixels of the images that are encoded in one call. KL-f16 takes 0.7 GiB per 768 px image in bf16: a
whole micro batch of the paper's recipes would not fit beside the UNet's training."""


class Autoencoder:
    """Encodes images to scaled latents and decodes them, without gradients.

    It computes in float32, but on CUDA the encoders of `kl` and `vq` compute in bf16, which changes latents by about
    1 %. factor: pixels per latent along an edge; channels: channels of a latent; identity: SHA-256 of kind, settings,
    weights and scale. Equal identities give equal latents, up to the rounding of the device and its precision
    (`AutoencoderConfig.precision`).
    """

    def __init__(self, network: torch.nn.Module, config: AutoencoderConfig, identity: str) -> None:
        self._network: Any = network.eval().requires_grad_(False)
        self._kind, self._scale = config.kind, config.scale
        self.identity = identity
        self.factor, self.channels = _geometry(network)

    @classmethod
    def load(cls, config: AutoencoderConfig, device: str) -> "Autoencoder":
        """Load a folder. Raises UserError if it is missing, has another kind, or its weights do not match."""
        folder = Path(config.path)
        network = _build(config.kind, folder)
        weights = folder / WEIGHTS_NAME
        _load_weights(network, weights)
        settings = json.loads((folder / CONFIG_NAME).read_text())
        # Names with an underscore describe the writer, such as diffusers' version.
        settings = {name: value for name, value in settings.items() if not name.startswith("_")}
        parts = [config.kind, settings, file_sha256(weights), config.scale]
        identity = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
        network = network.to(device)
        if config.precision(device) == "bf16":
            encode_in_bf16(network)
        return cls(network, config, identity)

    @torch.no_grad()
    def encode_moments(self, images: torch.Tensor) -> torch.Tensor:
        """Mean and standard deviation of the posterior, times scale: (n, 2c, h/factor, w/factor).

        images: (n, 3, h, w) float32 in [-1, 1], on any device; the result is float32 on the network's device. The
        deviation is 0 unless the kind is `kl`. Latents of kind `vq` are those before quantization.
        """
        count = max(1, PIXELS_AT_ONCE // (images.shape[2] * images.shape[3]))
        return torch.cat([self._encode(part) for part in images.split(count)])

    def _encode(self, images: torch.Tensor) -> torch.Tensor:
        device = next(self._network.parameters()).device
        encoded = self._network.encode(images.to(device))
        if self._kind == "kl":
            mean, deviation = encoded.latent_dist.mean, encoded.latent_dist.std
        else:
            mean = encoded.latents if self._kind == "vq" else encoded
            deviation = torch.zeros_like(mean)
        return torch.cat([mean, deviation], dim=1) * self._scale

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Images (n, 3, h*factor, w*factor) in [-1, 1] of scaled latents (n, c, h, w)."""
        decoded = self._network.decode(latents / self._scale)
        images: torch.Tensor = decoded if self._kind == "patch" else decoded.sample
        return images.clamp(-1, 1)


def encode_in_bf16(network: Any) -> None:
    """Let the encoder of an AutoencoderKL or VQModel compute in bf16 and channels_last; all else stays float32."""

    def lower(_: torch.nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        return (inputs[0].to(torch.bfloat16, memory_format=torch.channels_last),)

    network.encoder.to(torch.bfloat16, memory_format=torch.channels_last)
    network.encoder.register_forward_pre_hook(lower)
    network.encoder.register_forward_hook(lambda _, inputs, output: output.float())


def draw_latents(moments: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Latents (n, c, h, w) = mean + deviation * noise. noise: standard normal, of the latents' shape."""
    mean, deviation = moments.chunk(2, dim=1)
    return mean + deviation * noise


def kl_f16(width: int = 128, latent_channels: int = 16, norm_groups: int = 32) -> "AutoencoderKL":
    """LAION-RDM's autoencoder with random weights: KL, factor 16 (paper Table 1; scale 0.22765929)."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        latent_channels=latent_channels,
        block_out_channels=(width, width, 2 * width, 2 * width, 4 * width),
        down_block_types=("DownEncoderBlock2D",) * 4 + ("AttnDownEncoderBlock2D",),
        up_block_types=("AttnUpDecoderBlock2D",) + ("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        norm_num_groups=norm_groups,
    )


def vq_f4(width: int = 128, codes: int = 8192, norm_groups: int = 32) -> "VQModel":
    """ImageNet-RDM's autoencoder with random weights: quantized, factor 4, 3 channels (paper Table 1)."""
    from diffusers import VQModel

    return VQModel(
        latent_channels=3,
        vq_embed_dim=3,
        num_vq_embeddings=codes,
        block_out_channels=(width, 2 * width, 4 * width),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=2,
        norm_num_groups=norm_groups,
    )


def _geometry(network: torch.nn.Module) -> tuple[int, int]:
    """Pixels per latent along an edge, and channels of a latent."""
    if isinstance(network, PatchAutoencoder):
        return network.shape.factor, network.shape.channels
    settings: Any = network.config
    return 2 ** (len(settings.block_out_channels) - 1), settings.latent_channels


def _network_class(kind: AutoencoderKind) -> Any:
    if kind == "patch":
        return PatchAutoencoder
    from diffusers import AutoencoderKL, VQModel

    return {"kl": AutoencoderKL, "vq": VQModel}[kind]


def _build(kind: AutoencoderKind, folder: Path) -> torch.nn.Module:
    """The network of the folder's config.json, with random weights."""
    path = folder / CONFIG_NAME
    if not path.is_file():
        needed = f"{CONFIG_NAME} and {WEIGHTS_NAME}. Set it to the autoencoder's folder."
        raise UserError(f"{path} is missing: [autoencoder] path must be a folder with {needed}")
    network_class = _network_class(kind)
    class_name = network_class.__name__
    try:
        settings = json.loads(path.read_text())
        if settings.get("_class_name") != class_name:
            raise UserError(
                f"{path} describes a {settings.get('_class_name')}, but [autoencoder] kind '{kind}' needs a "
                f"{class_name}. Change kind or path."
            )
        network: torch.nn.Module = network_class.from_config(settings)
    except (ValueError, TypeError, AttributeError) as error:
        message = f"{path} does not describe a {class_name}: {error}. Restore the file or change the path."
        raise UserError(message) from error
    return network


def _load_weights(network: torch.nn.Module, path: Path) -> None:
    """Load the weights. Raises UserError unless names and shapes of all tensors match the network."""
    if not path.is_file():
        raise UserError(
            f"{path} is missing: weights must be in safetensors format. Convert other formats with "
            "diffusers' save_pretrained(safe_serialization=True)."
        )
    try:
        weights = load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path} is not a safetensors file: {error}. Download or write it again.") from error
    expected = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    if shapes != expected:
        raise UserError(
            f"{path} does not match its {CONFIG_NAME}: {_differences(expected, shapes)}. "
            "Both must come from the same model: download or write them again."
        )
    network.load_state_dict(weights)


def _differences(expected: dict[str, tuple[int, ...]], shapes: dict[str, tuple[int, ...]]) -> str:
    """Tensors that are missing, unexpected or of another shape, for an error message."""
    common = expected.keys() & shapes.keys()
    kinds = {
        "missing": sorted(expected.keys() - shapes.keys()),
        "unexpected": sorted(shapes.keys() - expected.keys()),
        "of another shape": sorted(name for name in common if expected[name] != shapes[name]),
    }
    return "; ".join(
        f"{len(names)} tensors {kind} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for kind, names in kinds.items()
        if names
    )
