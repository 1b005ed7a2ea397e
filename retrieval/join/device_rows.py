"""The vectors of a partition on the device that computes a join.

Reads the mapped vectors of a partition. A GPU gets all of them at once: 1.5 GB for a million rows of 768 dimensions.
They are sent through pinned memory, which is filled while an earlier part is on its way. A join that reads its rows
there needs no copy for each list, and several joins share them. On a CPU the rows are read from the memory map.
"""

from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from retrieval.index.partition import Partition
from retrieval.index.rerank import CodedRows, StoredRows
from retrieval.kernel.list_search import ListSearch

SENT_ROWS = 32_768
"""Rows in one pinned buffer, 50 MB of 768 dimensions."""


class DeviceRows:
    """The rows of one partition, and which of them are hidden. They are sent to a GPU at the first use, and once."""

    def __init__(self, partition: Partition, device: torch.device) -> None:
        self.partition, self.device = partition, device
        visible = partition.visible
        self.hidden = None if visible is None else ~torch.from_numpy(visible).to(device)
        """(rows,) bool on the device; None where no row is hidden."""
        self._is_read = False

    @cached_property
    def _stored(self) -> Tensor | CodedRows:
        rows = self.partition.embeddings
        if self.device.type == "cuda":
            return _sent(rows, self.device)
        return rows if isinstance(rows, CodedRows) else torch.from_numpy(rows)

    @property
    def list_search(self) -> ListSearch | None:
        """The compiled search of the lists; None on a GPU, and where the library does not map the index."""
        return self.partition.files.mapped_search if self.device.type == "cpu" else None

    def read_through(self) -> None:
        """Read the files of the partition in sequence, unless this was done."""
        if not self._is_read:
            for name in ("index.faiss", "embeddings.npy"):
                self.partition.files.read_through(name)
            self._is_read = True

    def __len__(self) -> int:
        return len(self.partition.embeddings)

    def block(self, start: int, end: int) -> Tensor:
        """Rows start to end - 1 as float16."""
        rows = self._stored[start:end]
        return torch.from_numpy(rows) if isinstance(rows, np.ndarray) else rows

    def take(self, numbers: Tensor) -> Tensor:
        """Rows by number (n,), float32."""
        if isinstance(self._stored, CodedRows):
            return torch.from_numpy(self._stored[numbers.numpy()]).float()
        return self._stored.index_select(0, numbers).float()


def _sent(rows: StoredRows, device: torch.device) -> Tensor:
    """The rows as float16 on a GPU. It waits only for a pinned buffer that is still being sent."""
    sent = torch.empty(rows.shape, dtype=torch.float16, device=device)
    buffers = [torch.empty((SENT_ROWS, rows.shape[1]), dtype=torch.float16, pin_memory=True) for _ in range(2)]
    ends = [torch.cuda.Event() for _ in buffers]
    for i, start in enumerate(range(0, len(rows), SENT_ROWS)):
        block = torch.from_numpy(rows[start : start + SENT_ROWS])
        buffer, end = buffers[i % 2][: len(block)], ends[i % 2]
        end.synchronize()
        buffer.copy_(block)
        sent[start : start + len(block)].copy_(buffer, non_blocking=True)
        end.record()
    return sent
