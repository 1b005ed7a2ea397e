"""A rank of a training of which rank 0 cannot write the model, with the arguments of train_rank."""

import os
import runpy
from typing import Any

from trainer.training import train


def fail(*_: Any) -> None:
    raise OSError("No space left on device")


if __name__ == "__main__":
    if os.environ["RANK"] == "0":
        train.export_run = fail
    runpy.run_module("train_rank", run_name="__main__", alter_sys=True)
