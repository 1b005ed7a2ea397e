"""A rank that waits before a step: `python -m held_rank STEP MODULE ARGUMENT...` runs a module that trains.

The rank goes on when it has received SIGTERM. So a test can kill or terminate a run before its end on any machine.
"""

import runpy
import sys
import time
from collections.abc import Generator

from trainer.data.loader import TrainingBatch
from trainer.training import loop

HELD_STEP = int(sys.argv.pop(1))


class HeldLoop(loop._Loop):
    def step(self, batches: Generator[TrainingBatch], termination: loop.Termination) -> bool:
        while self.progress.step + len(self._numbers) + 1 == HELD_STEP and not termination.requested:
            time.sleep(0.02)
        return super().step(batches, termination)


if __name__ == "__main__":
    loop._Loop = HeldLoop  # type: ignore[misc]
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
