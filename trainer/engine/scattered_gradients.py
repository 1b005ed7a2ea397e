"""The reduction of gradients among ranks on CPUs, for ZeRO 1 in fp32.

A rank needs only the gradients of its own partition. It gets them from the other ranks by an all-to-all, which is half
of the bytes of DeepSpeed's all-reduce, and without its copies back to the parameters. On GPUs DeepSpeed reduces during
the backward pass.
"""

import deepspeed
import deepspeed.comm as dist
import torch

from trainer.recipe import TrainConfig


def is_scattered(config: TrainConfig, world: int, device: torch.device) -> bool:
    """True if `scatter_gradients` takes the place of DeepSpeed's reduction."""
    return device.type == "cpu" and world > 1 and config.zero_stage == 1 and config.precision == "fp32"


def scatter_gradients(engine: deepspeed.DeepSpeedEngine) -> None:
    """Give DeepSpeed the mean over ranks of the gradients of this rank's partition. A collective."""
    zero = engine.optimizer
    for group, weights in enumerate(zero.round_robin_bit16_groups):
        gradients = [torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in weights]
        padding = gradients[0].new_zeros(zero.bit16_groups_flat[group].numel() - sum(map(torch.numel, gradients)))
        own = torch.cat([*(gradient.flatten() for gradient in gradients), padding])
        received = torch.empty_like(own)
        dist.all_to_all_single(received, own)
        zero.averaged_gradients[group] = [received.view(dist.get_world_size(), -1).mean(dim=0)]
