"""The numbers of training steps, gathered from all ranks and copied to the host without a wait for the device.

Every step adds a row. It is read LAG steps later, while the device works on the next steps, or with all others when
these are needed, such as for the log.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import deepspeed.comm as dist
import numpy as np
import numpy.typing as npt
import torch
from deepspeed.accelerator import get_accelerator

from trainer.engine.deepspeed_engine import Ranks

LAG = 2
"""Steps that the host may be ahead of the device."""


@dataclass(frozen=True)
class StepRow:
    """The numbers of a step: (world, n) float64 on the CPU. image_ids: of the samples of this rank."""

    numbers: torch.Tensor
    image_ids: npt.NDArray[np.int64]


class StepNumbers:
    """The rows that have not been read, oldest first. All ranks add and read the same steps."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._rows: deque[tuple[StepRow, Any]] = deque()

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, values: torch.Tensor, image_ids: npt.NDArray[np.int64]) -> None:
        """Add the values of this rank, (n,) float64 on the device. A collective."""
        gathered = [torch.empty_like(values) for _ in range(self._ranks.world)]
        dist.all_gather(gathered, values)
        numbers = torch.empty((len(gathered), len(values)), dtype=values.dtype, pin_memory=values.is_cuda)
        numbers.copy_(torch.stack(gathered), non_blocking=True)
        copied = torch.cuda.Event() if values.is_cuda else None
        if copied:
            copied.record()
        self._rows.append((StepRow(numbers, image_ids), copied))

    def read_all(self) -> Iterator[StepRow]:
        """Remove and return all rows, after one wait for the device."""
        if self._rows:
            get_accelerator().synchronize()
        while self._rows:
            yield self._rows.popleft()[0]

    def read_old(self) -> Iterator[StepRow]:
        """Remove and return the rows before the last LAG ones."""
        while len(self._rows) > LAG:
            row, copied = self._rows.popleft()
            if copied:
                copied.synchronize()
            yield row
