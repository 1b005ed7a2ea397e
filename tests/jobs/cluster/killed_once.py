"""`laion-rdm train` as a rank, for tests: rank 0 is killed at step 5 of the start that begins at step 0."""

import os
import signal
from typing import Any

from jobs.train import main
from trainer.training import loop

set_learning_rate = loop.set_learning_rate
steps: list[int] = []


def killed(engine: Any, config: Any, step: int) -> float:
    """`set_learning_rate`, which every step calls once."""
    steps.append(step)
    if (steps[0], step, os.environ["RANK"]) == (0, 5, "0"):
        os.kill(os.getpid(), signal.SIGKILL)
    return set_learning_rate(engine, config, step)


if __name__ == "__main__":
    loop.set_learning_rate = killed
    main()
