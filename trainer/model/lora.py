"""Low-rank adapters (LoRA, Hu et al. 2022): small trained matrices beside frozen linear layers of the UNet.

Plain functions and one layer: reads and writes nothing. The layer is our own because with peft installed diffusers
imports peft, transformers and accelerate at each start, for 4 s of CPU time. Names and files follow peft.
"""

from typing import Any

import torch

from retrieval.errors import UserError
from trainer.model.recipe import LoraConfig, ModelConfig
from trainer.model.unet import build_unet

Weights = dict[str, torch.Tensor]
DOWN, UP = ".lora_A.weight", ".lora_B.weight"
"""Ends of the names of an adapter's two matrices, after the name of its layer."""


class LoraLinear(torch.nn.Module):
    """A frozen linear layer W with an adapter: x -> W x + (alpha / rank) B A x. A is random, B is 0 at first."""

    def __init__(self, base_layer: torch.nn.Linear, lora: LoraConfig) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = torch.nn.Linear(base_layer.in_features, lora.rank, bias=False)
        self.lora_B = torch.nn.Linear(lora.rank, base_layer.out_features, bias=False)
        torch.nn.init.zeros_(self.lora_B.weight)
        self._scale = lora.alpha / lora.rank

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        base: torch.Tensor = self.base_layer(inputs)
        return base + self._scale * self.lora_B(self.lora_A(inputs))


def add_adapters(unet: torch.nn.Module, lora: LoraConfig) -> None:
    """Freeze the network and add an adapter to each layer whose name ends with one of `lora.target`.

    Raises UserError if a target names no layer, or one that is not linear.
    """
    unet.requires_grad_(False)
    adapted: dict[str, Any] = {}
    for target in lora.target:
        layers = {name: layer for name, layer in unet.named_modules() if f".{name}".endswith(f".{target}")}
        other = [name for name, layer in layers.items() if not isinstance(layer, torch.nn.Linear)]
        if not layers or other:
            problem = f"names {other[0]}, which is no linear layer" if other else "names no layer of the network"
            raise UserError(f"train.lora.target {target!r} {problem}. Wanted ends of names, such as 'attn2.to_k'.")
        adapted |= layers
    # After the search: targets may overlap, and an adapter has layers of its own.
    for name, layer in adapted.items():
        parent, _, child = name.rpartition(".")
        setattr(unet.get_submodule(parent), child, LoraLinear(layer, lora))


def build_trained(model: ModelConfig, lora: LoraConfig | None) -> Any:
    """The network of a training run with random weights, adapters included; those to train require gradients."""
    unet = build_unet(model)
    if lora:
        add_adapters(unet, lora)
    return unet


def merge(base: Weights, adapters: Weights, lora: LoraConfig) -> Weights:
    """Weights of the network without adapters that computes the same: W + (alpha / rank) B A. All fp32, by name."""
    merged = dict(base)
    for name in [name.removesuffix(DOWN) for name in adapters if name.endswith(DOWN)]:
        product = adapters[f"{name}{UP}"] @ adapters[f"{name}{DOWN}"]
        merged[f"{name}.weight"] = base[f"{name}.weight"] + (lora.alpha / lora.rank) * product
    return merged


def peft_files(adapters: Weights, lora: LoraConfig) -> tuple[dict[str, Any], Weights]:
    """Content of peft's adapter_config.json, and the tensors of its adapter_model.safetensors by key."""
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "target_modules": list(lora.target),
        "bias": "none",
        "inference_mode": True,
    }
    return config, {f"base_model.model.{name}": tensor for name, tensor in adapters.items()}
