"""The paper's released checkpoints, opened under our names.

Reads one file of the CompVis layout (a torch file with `state_dict`, or the same keys as safetensors): the
UNet, its average, the first stage and the noise schedule. Every tensor must be of the recipe's model and
every tensor of the model must be there. Pickled objects are never made.
"""

import pickle
import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from retrieval.errors import UserError
from trainer.model.autoencoder import kl_f16, vq_f4
from trainer.model.diffusion import betas
from trainer.model.unet import build_unet
from trainer.recipe import AutoencoderConfig, DiffusionConfig, TrainingRecipe
from trainer.released.tensor_names import AUTOENCODER, AVERAGE, autoencoder_key, average_key, unet_key

Tensors = dict[str, torch.Tensor]
Shape = tuple[int, ...]

NORM_GROUPS = 32
"""Groups of every group normalization of the original code."""
IGNORED = frozenset(
    {
        # The schedule follows from `betas`, which are compared.
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
        # A random vector that stood for no neighbors and that no training saw; ours is the zero token.
        "unconditional_guidance_vex",
    }
)
"""Keys of a checkpoint that are not read."""
IGNORED_PREFIXES = ("cond_stage_model.", "retriever.", f"{AUTOENCODER}loss.")
"""What stands under these is not read: CLIP has its own files, and losses are over."""


@dataclass(frozen=True)
class ReleasedModel:
    """A released model: fp32 UNet weights by our names, and the folder of its autoencoder."""

    unet: Tensors
    autoencoder: Path


@dataclass(frozen=True)
class _Layout:
    """Where the tensors of one network stand in a checkpoint, and their shapes, by our names."""

    keys: dict[str, str]
    shapes: dict[str, Shape]

    @classmethod
    def of(cls, network: torch.nn.Module, key: Callable[[str], str]) -> "_Layout":
        """The layout of a network whose parameter `name` stands under `key(name)`."""
        shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
        return cls({name: key(name) for name in shapes}, shapes)

    def wanted(self) -> dict[str, Shape]:
        """Shapes by the checkpoint's keys."""
        return {key: self.shapes[name] for name, key in self.keys.items()}

    def take(self, found: Tensors) -> Tensors:
        """The tensors by our names, fp32 in our shapes."""
        return {
            name: found[key].float().reshape(self.shapes[name]).contiguous()
            for name, key in self.keys.items()
        }


def read_checkpoint(path: Path, config: TrainingRecipe, scratch: Path) -> ReleasedModel:
    """A CompVis checkpoint as the recipe's model; the average where there is one, else the weights.

    Writes the autoencoder below `scratch`. Raises UserError naming the keys that are missing, left over or
    of another shape, or the setting that differs.
    """
    found = _read(path)
    _check_settings(path, config)
    _check_schedule(path, found, config.diffusion)
    network = _autoencoder(path, found, config.autoencoder)
    levels = len(network.config.block_out_channels)
    first_stage = _Layout.of(network, lambda name: autoencoder_key(name, levels))
    with torch.device("meta"):
        unet = build_unet(config.model)
    weights = _Layout.of(unet, lambda name: unet_key(name, config.model))
    average = _Layout.of(unet, lambda name: average_key(weights.keys[name]))
    averaged = any(key.startswith(AVERAGE) for key in found)
    wanted = weights.wanted() | first_stage.wanted() | (average.wanted() if averaged else {})
    _check_tensors(path, found, wanted)
    network.load_state_dict(first_stage.take(found), assign=True)
    network.register_to_config(scaling_factor=config.autoencoder.scale)
    network.save_pretrained(scratch, safe_serialization=True)
    return ReleasedModel((average if averaged else weights).take(found), scratch)


def _autoencoder(path: Path, found: Tensors, config: AutoencoderConfig) -> Any:
    """The first stage's network without weights; its sizes are the checkpoint's."""
    sizes = {}
    for word, part in (("width", "encoder.conv_in"), ("moments", "quant_conv")):
        key = f"{AUTOENCODER}{part}.weight"
        if key not in found:
            raise UserError(f"{path} has no {key}: wanted a checkpoint with its first stage. Fetch it whole.")
        sizes[word] = found[key].shape[0]
    codes = found.get(f"{AUTOENCODER}quantize.embedding.weight")
    kind = "kl" if codes is None else "vq"
    if config.kind != kind:
        raise UserError(
            f"{path} holds an autoencoder of kind '{kind}', [autoencoder] kind is '{config.kind}'. Set it."
        )
    with torch.device("meta"):
        if codes is None:
            return kl_f16(sizes["width"], sizes["moments"] // 2, NORM_GROUPS)
        return vq_f4(sizes["width"], len(codes), NORM_GROUPS)


def _check_settings(path: Path, config: TrainingRecipe) -> None:
    """What no tensor tells, and no released model has otherwise."""
    fixed = {"model.norm_groups": NORM_GROUPS, "diffusion.prediction": "epsilon"}
    found = {
        "model.norm_groups": config.model.norm_groups,
        "diffusion.prediction": config.diffusion.prediction,
    }
    for name, wanted in fixed.items():
        if found[name] != wanted:
            raise UserError(f"{name} is {found[name]!r}, models such as {path} have {wanted!r}. Set it.")


def _check_schedule(path: Path, found: Tensors, config: DiffusionConfig) -> None:
    if "betas" not in found:
        raise UserError(f"{path} has no betas: its noise schedule is unknown. Fetch the whole checkpoint.")
    theirs, ours = found["betas"].double(), betas(config)
    if theirs.shape != ours.shape or not torch.allclose(theirs, ours, rtol=1e-5, atol=0):
        raise UserError(
            f"{path} was trained with {len(theirs)} betas from {float(theirs[0]):.6g} to "
            f"{float(theirs[-1]):.6g}, [diffusion] says {config.steps} from {config.beta_start} to "
            f"{config.beta_end}, the square roots linear in t. Set [diffusion] to the checkpoint's."
        )


def _check_tensors(path: Path, found: Tensors, wanted: dict[str, Shape]) -> None:
    """Every wanted tensor must be there in its shape, and nothing else but what is known and not read."""
    left_over = [
        key
        for key in found
        if key not in wanted and key not in IGNORED | {"betas"} and not key.startswith(IGNORED_PREFIXES)
    ]
    shapes = {key: tuple(found[key].shape) for key in wanted if key in found}
    reshaped = [
        f"{key} is {shape}, wanted {wanted[key]}"
        for key, shape in shapes.items()
        if _plain(shape) != _plain(wanted[key])
    ]
    kinds = {
        "missing": [key for key in wanted if key not in found],
        "left over": left_over,
        "of another shape": reshaped,
    }
    faults = [
        f"{len(keys)} keys {kind} ({'; '.join(keys[:3])}{'; ...' if len(keys) > 3 else ''})"
        for kind, keys in kinds.items()
        if keys
    ]
    if faults:
        raise UserError(
            f"{path} is not the model of the recipe's [model] and [autoencoder]: {', '.join(faults)}. "
            "Set the sections to the checkpoint's model, or fetch the file again."
        )


def _plain(shape: Shape) -> Shape:
    """A 1x1 convolution is a linear layer: some versions of the original code wrote one for the other."""
    return shape[:2] if shape[2:] == (1, 1) else shape


def _read(path: Path) -> Tensors:
    if not path.is_file():
        raise UserError(f"{path} is not there: wanted a checkpoint file. Fetch it or correct the path.")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise UserError(f"{path} is no safetensors file: {error}. Fetch it again.") from error
    content = _unpickle(path)
    content = content.get("state_dict", content) if isinstance(content, dict) else {}
    if not content or not all(isinstance(tensor, torch.Tensor) for tensor in content.values()):
        raise UserError(f"{path} has no state_dict of tensors: wanted a checkpoint of the CompVis layout.")
    return dict(content)


class _Unread:
    """Stands for Lightning's callback class, a mere key beside the weights, without importing Lightning."""


# What Lightning leaves beside the weights of a finished training, and nothing that could run.
_HARMLESS: list[Any] = [
    (_Unread, "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"),
    (np.float64(0).__reduce__()[0], "numpy.core.multiarray.scalar"),
    np.dtype,
    type(np.dtype(np.float64)),
]


def _unpickle(path: Path) -> Any:
    """The file's content. Memory-mapped, so that what is not taken is not read either."""
    damaged = f"{path} is no torch file, or torn. Fetch it again."
    if not zipfile.is_zipfile(path):
        raise UserError(damaged)
    try:
        with torch.serialization.safe_globals(_HARMLESS):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        if named is None:
            raise UserError(damaged) from error
        raise UserError(
            f"{path} holds a pickled {named.group(1)}, which could run anything: wanted tensors alone. "
            "Fetch it from its makers, or have whoever trusts it save its state_dict as safetensors."
        ) from error
    except (RuntimeError, LookupError, EOFError) as error:
        raise UserError(damaged) from error
