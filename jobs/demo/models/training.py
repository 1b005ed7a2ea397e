"""Shared by the training of the demo's CLIP and autoencoder: precision and learning rates."""

import math

import torch

from retrieval.index.torch_products import has_bfloat16

WARM_UP_SHARE = 0.1


def bfloat16_autocast() -> torch.autocast:
    """bfloat16 matrix products, if the CPU has instructions for them: without, they are 130 times slower."""
    return torch.autocast("cpu", torch.bfloat16, enabled=has_bfloat16(torch.device("cpu")))


def warm_up_and_decay(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
    """Learning rates that rise linearly over a tenth of the steps, then fall to 0 along a half cosine."""
    warm_up = max(1, round(WARM_UP_SHARE * steps))

    def factor(step: int) -> float:
        if step < warm_up:
            return (step + 1) / (warm_up + 1)
        progress = (step - warm_up) / max(1, steps - warm_up)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
