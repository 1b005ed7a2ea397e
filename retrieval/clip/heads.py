"""Heads: small networks that give a picture a score from its CLIP vector, such as LAION's for safety and aesthetics.

Reads the state dict of a torch module (`.safetensors`, or a torch file that needs no pickle): linear layers in order.
The computation is numpy, so a head needs no device and gives equal scores on all machines of one kind.
"""

import io
import pickle
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.torch import load

from retrieval.clip.head_files import head_digest, head_setting, read_head
from retrieval.errors import UserError
from retrieval.recipe import HeadConfig

DAMAGED = (
    *(SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError, struct.error),
    *(LookupError, AssertionError, TypeError, AttributeError),
)
"""What the readers of torch and safetensors raise for damaged files."""
BLOCK_ROWS = 4096
MIN_DEVIATION = 1e-7
"""Keras divides normalized inputs by at least this."""
Array = npt.NDArray[np.float32]
Vectors = npt.NDArray[np.float16] | npt.NDArray[np.float32]


@dataclass(frozen=True)
class LinearLayer:
    """weight: (outputs, inputs); bias: (outputs,); relu: whether negative outputs become 0."""

    weight: Array
    bias: Array
    relu: bool


@dataclass(frozen=True)
class Head:
    """A network with one output. mean, deviation: (dim,) of its inputs, which are normalized by them first."""

    mean: Array
    deviation: Array
    layers: tuple[LinearLayer, ...]
    sigmoid: bool
    digest: str
    """16 hex digits of its settings and its weights."""

    def scores(self, vectors: Vectors) -> Array:
        """The scores (n,) float32 of unit CLIP vectors (n, dim), float16 or float32."""
        blocks = [self._scores(vectors[i : i + BLOCK_ROWS]) for i in range(0, len(vectors), BLOCK_ROWS)]
        return np.concatenate([np.empty(0, np.float32), *blocks])

    def _scores(self, vectors: Vectors) -> Array:
        values = (vectors.astype(np.float32) - self.mean) / self.deviation
        for layer in self.layers:
            values = values @ layer.weight.T + layer.bias
            values = np.maximum(values, 0) if layer.relu else values
        # The logistic function, without an overflow.
        return np.asarray((0.5 + 0.5 * np.tanh(values / 2) if self.sigmoid else values)[:, 0], np.float32)


def load_head(name: str, config: HeadConfig, dim: int) -> Head:
    """The head of a recipe's section `embed.heads.<name>` for CLIP vectors of length dim.

    Raises UserError for a file that cannot be read, has other tensors than those of linear layers, or other sizes.
    """
    where, content = head_setting(name, config), read_head(name, config)
    tensors = _tensors(content, config.file, where)
    statistics = {key: tensors.pop(key) for key in [*tensors] if re.search(r"(^|\.)(mean|variance)$", key)}
    layers = _layers(tensors, config.activation == "relu", where)
    _check_sizes(layers, dim, where)
    by_kind = {key.rpartition(".")[2]: value.reshape(-1) for key, value in statistics.items()}
    if len(by_kind) != len(statistics) or by_kind.keys() not in (set(), {"mean", "variance"}):
        raise UserError(f"{where} has {', '.join(statistics)}: wanted a mean and a variance of its inputs, or neither.")
    mean, variance = by_kind.get("mean", np.zeros(dim, np.float32)), by_kind.get("variance", np.ones(dim, np.float32))
    if mean.shape != (dim,) or variance.shape != (dim,):
        raise UserError(f"{where} normalizes {len(mean)} and {len(variance)} values; CLIP vectors have {dim}.")
    digest = head_digest(name, config, content)
    deviation = np.maximum(np.sqrt(variance), MIN_DEVIATION)
    return Head(mean, deviation, layers, config.output == "sigmoid", digest)


def _tensors(content: bytes, path: str, where: str) -> dict[str, Array]:
    """The tensors of a file as float32, by name."""
    try:
        if path.endswith(".safetensors"):
            state = load(content)
        else:
            state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except DAMAGED as error:
        raise UserError(
            f"{where} is not a .safetensors file or a torch file with only a state dict: {error}."
            " Save model.state_dict() again, or download the file again."
        ) from error
    if not isinstance(state, Mapping) or not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
        raise UserError(f"{where} is no state dict: wanted tensors by name. Save model.state_dict().")
    return {str(name): tensor.detach().float().numpy() for name, tensor in state.items()}


def _layers(tensors: dict[str, Array], relu: bool, where: str) -> tuple[LinearLayer, ...]:
    """The layers in the order of the numbers in their names. relu: whether there is one between two layers.

    `layers.15` and `layers.16` are neighbors in a Sequential, so nothing is between them.
    """
    prefixes = sorted({re.sub(r"\.?(weight|bias)$", "", name) for name in tensors}, key=_natural_order)
    names = {prefix: [f"{prefix}.{kind}".lstrip(".") for kind in ("weight", "bias")] for prefix in prefixes}
    wrong = sorted(tensors.keys() - {name for pair in names.values() for name in pair})
    wrong += [weight for weight, _ in names.values() if tensors.get(weight, np.empty(0)).ndim != 2]
    wrong += [bias for weight, bias in names.values() if bias in tensors and tensors[bias].ndim != 1]
    if wrong or not names:
        raise UserError(
            f"{where} is no stack of linear layers: {', '.join(wrong[:5]) or 'it is empty'}. Wanted a weight with two"
            " dimensions, and a bias with one, of each layer. Other networks are not supported."
        )
    layers = []
    for prefix, following in zip(prefixes, [*prefixes[1:], ""], strict=True):
        weight = tensors[names[prefix][0]]
        bias = tensors.get(names[prefix][1], np.zeros(len(weight), np.float32))
        is_between = following != "" and not _is_next_module(prefix, following)
        layers.append(LinearLayer(weight, bias, relu and is_between))
    return tuple(layers)


def _natural_order(name: str) -> list[tuple[int, str]]:
    """Sorts `layers.2` before `layers.10`."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _is_next_module(name: str, following: str) -> bool:
    """Whether two names are `<parent>.<n>` and `<parent>.<n + 1>`, as in a Sequential."""
    (parent, _, number), (next_parent, _, next_number) = name.rpartition("."), following.rpartition(".")
    is_numbered = number.isdigit() and next_number.isdigit()
    return parent == next_parent and is_numbered and int(next_number) == int(number) + 1


def _check_sizes(layers: tuple[LinearLayer, ...], dim: int, where: str) -> None:
    shapes = [layer.weight.shape for layer in layers]
    inputs, outputs = [shape[1] for shape in shapes], [shape[0] for shape in shapes]
    if inputs[0] != dim:
        raise UserError(f"{where} takes vectors of length {inputs[0]}; the recipe's CLIP model gives {dim}.")
    biases = [len(layer.bias) for layer in layers]
    if outputs[:-1] != inputs[1:] or outputs[-1] != 1 or biases != outputs:
        sizes = ", ".join(f"{shape[1]} to {shape[0]}" for shape in shapes)
        raise UserError(
            f"{where} has the layers {sizes}: wanted layers that follow each other, the last with 1 output."
        )
