"""Reads checkpoints that the paper's authors released and maps their tensors to our names.

Reads one file of the CompVis layout (a torch file with `state_dict`, or safetensors with the same keys):
UNet, averaged UNet, autoencoder ("first stage") and noise schedule, or an autoencoder alone. The tensors must match the
recipe's model exactly. Pickled objects are never created.
"""

import pickle
import re
import struct
import zipfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tarfile import is_tarfile
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from retrieval.errors import UserError
from trainer.model.autoencoder import kl_f16, vq_f4
from trainer.model.diffusion import betas
from trainer.model.recipe import AutoencoderConfig, DiffusionConfig
from trainer.model.unet import build_unet
from trainer.recipe import TrainingRecipe
from trainer.released.tensor_names import AUTOENCODER, AVERAGE, UNET, autoencoder_key, average_key, unet_key

Tensors = dict[str, torch.Tensor]
Shape = tuple[int, ...]

NORM_GROUPS = 32
"""Number of groups of all group normalizations in the original code."""
FIRST = "encoder.conv_in.weight"
"""A tensor that every autoencoder of the original code has, after the prefix of its checkpoint."""
MAX_WIDTH = 4096
"""Most channels of an autoencoder's first and last convolution; the published ones have 128 and 32."""
IGNORED = frozenset(
    {
        # The schedule follows from `betas`, which are compared with the recipe.
        "alphas_cumprod",
        "alphas_cumprod_prev",
        "sqrt_alphas_cumprod",
        "sqrt_one_minus_alphas_cumprod",
        "log_one_minus_alphas_cumprod",
        "sqrt_recip_alphas_cumprod",
        "sqrt_recipm1_alphas_cumprod",
        "posterior_variance",
        "posterior_log_variance_clipped",
        "posterior_mean_coef1",
        "posterior_mean_coef2",
        "lvlb_weights",
        "logvar",
        "model_ema.decay",
        "model_ema.num_updates",
        # A random, untrained vector used for "no neighbors"; here that is the zero token.
        "unconditional_guidance_vex",
    }
)
"""Keys of a checkpoint that are not read."""
LOSS = "loss."
"""Prefix of an autoencoder's tensors that only its own training needs."""
IGNORED_PREFIXES = ("cond_stage_model.", "retriever.", f"{AUTOENCODER}{LOSS}")
"""Prefixes of keys that are not read: CLIP has its own files, and losses are not needed."""


@dataclass(frozen=True)
class ReleasedModel:
    """A released model: fp32 UNet weights by diffusers' names, and the folder of its autoencoder."""

    unet: Tensors
    autoencoder: Path
    encoder: dict[str, Any] | None = None
    """Identity of the CLIP encoder that it was trained with; None if the files do not tell it."""


@dataclass(frozen=True)
class _Layout:
    """Checkpoint keys and shapes of the tensors of one network, by diffusers' names."""

    keys: dict[str, str]
    shapes: dict[str, Shape]

    @classmethod
    def of(cls, network: torch.nn.Module, key: Callable[[str], str]) -> "_Layout":
        """Layout of a network. key: returns the checkpoint key of a parameter name."""
        shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
        return cls({name: key(name) for name in shapes}, shapes)

    def shapes_by_key(self) -> dict[str, Shape]:
        return {key: self.shapes[name] for name, key in self.keys.items()}

    def extract(self, checkpoint: Tensors) -> Tensors:
        """The tensors by diffusers' names, in fp32 and with our shapes."""
        return {
            name: checkpoint[key].float().reshape(self.shapes[name]).contiguous() for name, key in self.keys.items()
        }


def read_checkpoint(path: Path, config: TrainingRecipe, folder: Path) -> ReleasedModel:
    """Read a CompVis checkpoint as the recipe's model: averaged weights if it has them, else the weights.

    Writes the autoencoder to `folder`. Raises UserError with the keys or the setting that differ.
    """
    checkpoint = _read(path)
    _check_settings(path, config)
    _check_schedule(path, checkpoint, config.diffusion)
    network, first_stage = _empty_autoencoder(path, checkpoint, config.autoencoder, AUTOENCODER)
    with torch.device("meta"):
        unet = build_unet(config.model)
    weights = _Layout.of(unet, lambda name: unet_key(name, config.model))
    average = _Layout.of(unet, lambda name: average_key(weights.keys[name]))
    has_average = any(key.startswith(AVERAGE) for key in checkpoint)
    expected = weights.shapes_by_key() | first_stage.shapes_by_key()
    _check_tensors(path, checkpoint, expected | (average.shapes_by_key() if has_average else {}))
    _write_autoencoder(network, first_stage.extract(checkpoint), config.autoencoder, folder)
    return ReleasedModel((average if has_average else weights).extract(checkpoint), folder)


def has_only_autoencoder(path: Path) -> bool:
    """True if a checkpoint file has a first stage and no UNet."""
    if path.suffix == ".safetensors":
        with safetensors_errors(path), safe_open(path, "pt") as file:
            keys: Collection[str] = file.keys()
    else:
        keys = _read(path).keys()
    return _first_stage_prefix(keys) is not None and not any(key.startswith(UNET) for key in keys)


def read_autoencoder(path: Path, config: AutoencoderConfig, folder: Path) -> None:
    """Write the autoencoder of a checkpoint to `folder`: of a first stage alone, or of a whole model.

    All other tensors of a whole model are ignored. Raises UserError with the keys or the setting that differ.
    """
    checkpoint = _read(path)
    prefix = _first_stage_prefix(checkpoint) or ""
    checkpoint = {key: tensor for key, tensor in checkpoint.items() if key.startswith(prefix)}
    network, layout = _empty_autoencoder(path, checkpoint, config, prefix)
    _check_tensors(path, checkpoint, layout.shapes_by_key(), (f"{prefix}{LOSS}",))
    _write_autoencoder(network, layout.extract(checkpoint), config, folder)


def _first_stage_prefix(keys: Collection[str]) -> str | None:
    """What stands before the names of the autoencoder's tensors; None if a checkpoint has no autoencoder."""
    return next((prefix for prefix in (AUTOENCODER, "") if f"{prefix}{FIRST}" in keys), None)


def _write_autoencoder(network: Any, weights: Tensors, config: AutoencoderConfig, folder: Path) -> None:
    network.load_state_dict(weights, assign=True)
    network.register_to_config(scaling_factor=config.scale)
    network.save_pretrained(folder, safe_serialization=True)


def _empty_autoencoder(path: Path, checkpoint: Tensors, config: AutoencoderConfig, prefix: str) -> tuple[Any, _Layout]:
    """The autoencoder without weights, with the sizes of the checkpoint, and its layout there."""
    sizes = {}
    for size, name in (("width", FIRST), ("moments", "quant_conv.weight")):
        if (key := f"{prefix}{name}") not in checkpoint:
            raise UserError(f"{path} has no {key}: wanted a checkpoint with its first stage. Download it again.")
        sizes[size] = len(checkpoint[key]) if checkpoint[key].ndim else 0
    if sizes["width"] % NORM_GROUPS or not all(sizes.values()) or max(sizes.values()) > MAX_WIDTH:
        raise UserError(
            f"{path} has an autoencoder with {sizes['width']} channels at its first convolution and "
            f"{sizes['moments']} at its last: wanted KL-f16 or VQ-f4 (128 and 32, or 128 and 3). Download it again."
        )
    codes = checkpoint.get(f"{prefix}quantize.embedding.weight")
    if codes is not None and (codes.ndim != 2 or not len(codes)):
        raise UserError(f"{path} has codes of shape {tuple(codes.shape)}, wanted (n, 3). Download it again.")
    kind = "kl" if codes is None else "vq"
    if config.kind != kind:
        raise UserError(
            f"{path} has an autoencoder of kind '{kind}', [autoencoder] kind is '{config.kind}'. Change it."
        )
    with torch.device("meta"):
        network: Any = (
            kl_f16(sizes["width"], sizes["moments"] // 2, NORM_GROUPS)
            if codes is None
            else vq_f4(sizes["width"], len(codes), NORM_GROUPS)
        )
    levels = len(network.config.block_out_channels)
    return network, _Layout.of(network, lambda name: prefix + autoencoder_key(name, levels).removeprefix(AUTOENCODER))


def _check_settings(path: Path, config: TrainingRecipe) -> None:
    """Check settings that have the same value in all released models and follow from no tensor."""
    expected = {"model.norm_groups": NORM_GROUPS, "diffusion.prediction": "epsilon"}
    settings = {"model.norm_groups": config.model.norm_groups, "diffusion.prediction": config.diffusion.prediction}
    for name, value in expected.items():
        if settings[name] != value:
            raise UserError(f"{name} is {settings[name]!r}, models such as {path} have {value!r}. Set it.")


def _check_schedule(path: Path, checkpoint: Tensors, config: DiffusionConfig) -> None:
    if "betas" not in checkpoint:
        raise UserError(f"{path} has no betas: its noise schedule is unknown. Download it again.")
    theirs, ours = checkpoint["betas"].double(), betas(config)
    if theirs.shape != ours.shape or not torch.allclose(theirs, ours, rtol=1e-5, atol=0):
        raise UserError(
            f"{path} was trained with {len(theirs)} betas from {float(theirs[0]):.6g} to "
            f"{float(theirs[-1]):.6g}, [diffusion] has {config.steps} from {config.beta_start} to "
            f"{config.beta_end} with square roots linear in t. Set [diffusion] to the checkpoint's values."
        )


def _check_tensors(
    path: Path, checkpoint: Tensors, expected: dict[str, Shape], ignored: tuple[str, ...] = IGNORED_PREFIXES
) -> None:
    """Check that all expected tensors exist with their shapes, and that no unknown tensor exists."""
    unknown = [
        key
        for key in checkpoint
        if key not in expected and key not in IGNORED | {"betas"} and not key.startswith(ignored)
    ]
    shapes = {key: tuple(checkpoint[key].shape) for key in expected if key in checkpoint}
    reshaped = [
        f"{key} is {shape}, wanted {expected[key]}"
        for key, shape in shapes.items()
        if _squeezed(shape) != _squeezed(expected[key])
    ]
    problems = {
        "missing": [key for key in expected if key not in checkpoint],
        "unknown": unknown,
        "of another shape": reshaped,
    }
    messages = [
        f"{len(keys)} keys {problem} ({'; '.join(keys[:3])}{'; ...' if len(keys) > 3 else ''})"
        for problem, keys in problems.items()
        if keys
    ]
    if messages:
        raise UserError(
            f"{path} is not the model of the recipe's [model] and [autoencoder]: {', '.join(messages)}. "
            "Set the sections to the checkpoint's model, or download the file again."
        )


def _squeezed(shape: Shape) -> Shape:
    """The shape of a linear layer for a 1x1 convolution: versions of the original code differ in this."""
    return shape[:2] if shape[2:] == (1, 1) else shape


def _read(path: Path) -> Tensors:
    if not path.is_file():
        raise UserError(f"{path} does not exist: wanted a checkpoint file. Download it or correct the path.")
    if path.suffix == ".safetensors":
        with safetensors_errors(path):
            return load_file(path)
    content = _unpickle(path)
    content = content.get("state_dict", content) if isinstance(content, dict) else {}
    if not content or not all(isinstance(key, str) and isinstance(content[key], torch.Tensor) for key in content):
        raise UserError(f"{path} has no state_dict of tensors: wanted a checkpoint of the CompVis layout.")
    # Others could expand a small file to any size, for example with strides of 0.
    if others := [key for key, tensor in content.items() if not _is_stored(tensor)]:
        raise UserError(f"{path} does not store all elements of {others[0]}: it may be forged. Download it again.")
    return dict(content)


def _is_stored(tensor: torch.Tensor) -> bool:
    """True if the file has every element of a tensor."""
    return tensor.layout == torch.strided and tensor.untyped_storage().nbytes() >= tensor.nbytes


@contextmanager
def safetensors_errors(path: Path) -> Iterator[None]:
    """Raises UserError in place of an error of safetensors."""
    try:
        yield
    except SafetensorError as error:
        raise UserError(f"{path} is not a safetensors file: {error}. Download it again.") from error


class _Unread:
    """Placeholder for Lightning's callback class, a key in some files, so that Lightning is not needed."""


# Types that Lightning stores in a checkpoint. None of them runs code on loading.
_HARMLESS: list[Any] = [
    (_Unread, "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"),
    (np.float64(0).__reduce__()[0], "numpy.core.multiarray.scalar"),
    np.dtype,
    type(np.dtype(np.float64)),
]


def _unpickle(path: Path) -> Any:
    """Content of a torch file. Memory-mapped, so that unused tensors are not read.

    Files of torch before 1.6 are a pickle without a zip archive; they are read at once, by the same rules.
    """
    damaged = f"{path} is not a torch file, or incomplete. Download it again."
    is_zip = zipfile.is_zipfile(path)
    if not is_zip and (kind := _other_kind(path)):
        raise UserError(
            f"{path} is {kind}; wanted a torch file or safetensors. Download it again, or correct the path."
        )
    try:
        with torch.serialization.safe_globals(_HARMLESS):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        match = re.search(r"GLOBAL (\S+)", str(error))
        if match is None:
            raise UserError(damaged) from error
        raise UserError(
            f"{path} contains a pickled {match.group(1)}, which could run any code: only tensors are loaded. "
            "If you trust the file, save its state_dict as safetensors and import that."
        ) from error
    except (RuntimeError, LookupError, EOFError, ValueError, OSError, struct.error) as error:
        raise UserError(damaged) from error


def _other_kind(path: Path) -> str:
    """What a file that is no zip archive is, if it is certainly no checkpoint that can be read; else empty."""
    with path.open("rb") as file:
        start = file.read(512)
    if not start.strip(b"\0"):
        return "empty"
    if start.startswith(b"version https://git-lfs"):
        return "a pointer of Git LFS, not the file itself (run 'git lfs pull')"
    if start.lstrip()[:1] == b"<":
        return "a web page, perhaps an error message or a login"
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") < path.stat().st_size:
        return "a safetensors file with another suffix (rename it)"
    if start.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"7z\xbc\xaf", b"Rar!")):
        return "a compressed file (unpack it)"
    return "a tar archive, as torch before 0.1.10 wrote (save it again with a newer torch)" if is_tarfile(path) else ""
