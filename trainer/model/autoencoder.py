"""The frozen autoencoder between pictures and latents.

Reads a folder: diffusers' `save_pretrained` layout of AutoencoderKL or VQModel, or our PatchAutoencoder in
the same layout; safetensors only. One interface for the three, so that `latents`, `train` and `sample` do
not know which one they use.
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
from trainer.recipe import AutoencoderConfig, AutoencoderKind

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, VQModel


class Autoencoder:
    """Pictures to scaled latents and back, in float32, without gradients.

    factor: pixels per latent; channels: of a latent; identity: SHA-256 over kind, settings, weights and
    scale: equal identities give equal latents.
    """

    def __init__(self, network: torch.nn.Module, config: AutoencoderConfig, identity: str) -> None:
        self._network: Any = network.eval().requires_grad_(False)
        self._kind, self._scale = config.kind, config.scale
        self.identity = identity
        self.factor, self.channels = _geometry(network)

    @classmethod
    def load(cls, config: AutoencoderConfig, device: str) -> "Autoencoder":
        """Opens the folder. Raises UserError where it is missing, of another kind or weights do not fit."""
        folder = Path(config.path)
        network = _build(config.kind, folder)
        weights = folder / WEIGHTS_NAME
        _fill(network, weights)
        settings = json.loads((folder / CONFIG_NAME).read_text())
        # An underscore marks what the writer notes about itself, such as diffusers' version.
        settings = {name: value for name, value in settings.items() if not name.startswith("_")}
        parts = [config.kind, settings, file_sha256(weights), config.scale]
        identity = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
        return cls(network.to(device), config, identity)

    @torch.no_grad()
    def encode_moments(self, images: torch.Tensor) -> torch.Tensor:
        """Mean and standard deviation of the posterior, times scale: (n, 2c, h/factor, w/factor).

        images: (n, 3, h, w) float32 in [-1, 1], on any device; the moments are on the network's. The
        deviation is 0 unless the kind is `kl`: latents of a quantized autoencoder are those before
        quantization.
        """
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
        """Pictures (n, 3, h*factor, w*factor) in [-1, 1] of scaled latents (n, c, h, w)."""
        decoded = self._network.decode(latents / self._scale)
        images: torch.Tensor = decoded if self._kind == "patch" else decoded.sample
        return images.clamp(-1, 1)


def draw_latents(moments: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Latents (n, c, h, w) = mean + deviation * noise. noise: standard normal, of the latents' shape."""
    mean, deviation = moments.chunk(2, dim=1)
    return mean + deviation * noise


def kl_f16(width: int = 128, latent_channels: int = 16, norm_groups: int = 32) -> "AutoencoderKL":
    """LAION-RDM's autoencoder with fresh weights: KL, factor 16 (paper Table 1; scale 0.22765929)."""
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
    """ImageNet-RDM's autoencoder with fresh weights: quantized, factor 4, 3 channels (paper Table 1)."""
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
    """Factor and channels."""
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
    """The network of the folder's config.json, with fresh weights."""
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise UserError(
            f"{path} is missing: [autoencoder] path must be a folder of {CONFIG_NAME} and {WEIGHTS_NAME}. "
            "Set it to the autoencoder's folder."
        )
    network_class = _network_class(kind)
    wanted = network_class.__name__
    try:
        settings = json.loads(path.read_text())
        found = settings.get("_class_name")
        if found != wanted:
            raise UserError(
                f"{path} describes a {found}, [autoencoder] kind '{kind}' wants a {wanted}. Set kind or path."
            )
        network: torch.nn.Module = network_class.from_config(settings)
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} does not describe a {wanted}: {error}. Restore the file or set another path."
        ) from error
    return network


def _fill(network: torch.nn.Module, path: Path) -> None:
    """Loads the weights; every tensor of the network and of the file must have its counterpart."""
    if not path.is_file():
        raise UserError(
            f"{path} is missing: weights are read from safetensors only. Convert other formats with "
            "diffusers' save_pretrained(safe_serialization=True)."
        )
    try:
        weights = load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path} is no safetensors file: {error}. Fetch or write it again.") from error
    wanted = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    if wanted != found:
        raise UserError(
            f"{path} does not fit its {CONFIG_NAME}: {_differences(wanted, found)}. "
            "Both must come from the same model: fetch or write them again."
        )
    network.load_state_dict(weights)


def _differences(wanted: dict[str, tuple[int, ...]], found: dict[str, tuple[int, ...]]) -> str:
    missing, left_over = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    reshaped = sorted(name for name in wanted.keys() & found.keys() if wanted[name] != found[name])
    kinds = {"missing": missing, "left over": left_over, "of another shape": reshaped}
    return "; ".join(
        f"{len(names)} tensors {kind} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for kind, names in kinds.items()
        if names
    )
