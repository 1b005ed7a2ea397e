"""AdamW's groups of parameters and the course of its learning rate, from section `train` of a recipe.

Plain functions: reads and writes nothing.
"""

import math
from typing import Any

import torch

from trainer.engine.eight_bit import make_adamw_8bit
from trainer.recipe import TrainConfig


def make_optimizer(module: torch.nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """torch's fused AdamW, on CPU and GPU, or that of bitsandbytes.

    DeepSpeed's FusedAdam and CPUAdam are compiled at first use, which takes minutes and a compiler on every machine;
    their losses agree to 1e-6.
    """
    groups = parameter_groups(module, config)
    if config.optimizer == "adamw_8bit":
        return make_adamw_8bit(groups, config)
    betas = (config.adam_beta1, config.adam_beta2)
    return torch.optim.AdamW(groups, config.learning_rate, betas, config.adam_eps, fused=True)


def parameter_groups(module: torch.nn.Module, config: TrainConfig) -> list[dict[str, Any]]:
    """All trained weights in one group, or, without `decay_norms_and_biases`, those of one dimension in a second one.

    Biases and the weights of normalizations have one dimension; all other weights have more.
    """
    parameters = [weight for weight in module.parameters() if weight.requires_grad]
    if config.decay_norms_and_biases:
        return [{"params": parameters, "weight_decay": config.weight_decay}]
    decayed, other = ([weight for weight in parameters if (weight.ndim > 1) == wanted] for wanted in (True, False))
    return [{"params": decayed, "weight_decay": config.weight_decay}, {"params": other, "weight_decay": 0.0}]


def learning_rate_at(config: TrainConfig, step: int) -> float:
    """The learning rate of `step` (from 0): linear from 0 in the warm-up, then constant or decaying until `steps`."""
    if step < config.warmup_steps:
        return config.learning_rate * min(1.0, (step + 1) / config.warmup_steps)
    if config.learning_rate_decay == "none":
        return config.learning_rate
    done = min(1.0, (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps))
    left = 1 - done if config.learning_rate_decay == "linear" else (1 + math.cos(math.pi * done)) / 2
    return config.final_learning_rate + left * (config.learning_rate - config.final_learning_rate)
