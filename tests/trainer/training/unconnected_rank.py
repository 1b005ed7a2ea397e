"""A rank of a training in whose network Gloo does not connect the ranks for checkpoints, with arguments of train_rank.

On GPUs the ranks train by NCCL, which finds the interfaces of a machine by itself.
"""

import os
import runpy
from typing import Any

from trainer.training import train

make_engine = train.make_engine


def make_engine_and_lose_the_interface(*arguments: Any) -> Any:
    engine = make_engine(*arguments)
    os.environ["GLOO_SOCKET_IFNAME"] = "missing0"
    return engine


if __name__ == "__main__":
    train.make_engine = make_engine_and_lose_the_interface
    runpy.run_module("train_rank", run_name="__main__", alter_sys=True)
