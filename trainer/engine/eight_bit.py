"""AdamW of bitsandbytes, which stores both moments in 8 bits: a quarter of the memory. For one rank.

A block of 256 elements shares an fp32 scale, so that moments cannot be split by parameter. They are saved as they are,
for each master tensor of the optimizer. Only this module knows the names of its states. No extra installs bitsandbytes:
diffusers imports it at each start if it is there, which takes 5 s.
"""

from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import torch

from retrieval.errors import UserError
from trainer.recipe import TrainConfig

STATES = ("state1", "state2", "absmax1", "absmax2")
"""Both moments, uint8, and their scales, fp32."""


def check_8bit(config: TrainConfig, world: int) -> None:
    """Raise UserError if the recipe's optimizer is that of bitsandbytes, and there are several ranks or no package."""
    if config.optimizer != "adamw_8bit":
        return
    if world > 1:
        raise UserError(
            f'train.optimizer "adamw_8bit" works on one rank, this run has {world}. Set train.ranks = 1, or the '
            f'optimizer to "adamw": ZeRO shards its moments over the ranks.'
        )
    if find_spec("bitsandbytes") is None:
        raise UserError(
            "train.optimizer \"adamw_8bit\" needs bitsandbytes: run '.venv/bin/python -m pip install bitsandbytes', or "
            'set the optimizer to "adamw".'
        )


def make_adamw_8bit(groups: list[dict[str, Any]], config: TrainConfig) -> Any:
    """The optimizer. Call `check_8bit` before."""
    import bitsandbytes

    betas = (config.adam_beta1, config.adam_beta2)
    # 0: small tensors too, so that all have the same states.
    return bitsandbytes.optim.AdamW8bit(groups, config.learning_rate, betas, config.adam_eps, min_8bit_size=0)


def is_8bit(optimizer: Any) -> bool:
    """True for an optimizer of `make_adamw_8bit`."""
    return type(optimizer).__name__ == "AdamW8bit"


def initialize_states(optimizer: Any, steps: int) -> None:
    """Create the moments as zeros, as the first step would, with the step counter at `steps`."""
    for number, group in enumerate(optimizer.param_groups):
        for position, master in enumerate(group["params"]):
            optimizer.init_state(group, master, number, position)
            optimizer.state[master]["step"] = steps


def states_of(optimizer: Any, state: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and flat values of one of STATES for each master tensor."""
    masters = [master for group in optimizer.param_groups for master in group["params"]]
    for number, master in enumerate(masters):
        yield f"master{number}", optimizer.state[master][state].view(-1)
