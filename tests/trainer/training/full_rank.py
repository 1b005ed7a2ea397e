"""A rank of a training of which rank 0 cannot write the index of the checkpoints, with the arguments of train_rank."""

import os
import runpy
from typing import Any

from trainer.checkpoint.checkpoint import CheckpointFolder


def fail(*_: Any) -> None:
    raise OSError("No space left on device")


if __name__ == "__main__":
    if os.environ["RANK"] == "0":
        CheckpointFolder._publish = fail  # type: ignore[method-assign]
    runpy.run_module("train_rank", run_name="__main__", alter_sys=True)
