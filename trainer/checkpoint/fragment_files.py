"""Pieces of named parameters on disk: one safetensors file a rank, readable by any other number of ranks.

Writes `rank-<n>.safetensors`, whose keys `<state>/<parameter>@<start>` say which elements they hold.
A reader takes the slices that it needs from the files of all ranks and never holds more than these.
"""

import os
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from trainer.engine.fragments import Fragment

Slices = list[tuple[int, int, str, Any]]
"""First element, one past the last, key and open file of the pieces of one parameter's state."""


def key_of(state: str, piece: Fragment) -> str:
    """The key under which a piece is kept."""
    return f"{state}/{piece.name}@{piece.start}"


def file_name(rank: int) -> str:
    """The file of a rank's pieces."""
    return f"rank-{rank:05d}.safetensors"


def write_fragments(folder: Path, rank: int, values: dict[str, torch.Tensor]) -> int:
    """Write a rank's pieces, by key, and wait until the disk has them. values: on the CPU. Returns bytes."""
    path = folder / file_name(rank)
    save_file(values, path)
    with path.open("rb+") as file:
        os.fsync(file.fileno())
    return path.stat().st_size


class SavedFragments:
    """The pieces of a checkpoint's folder; a context, which keeps its files open."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files = ExitStack()
        self._slices: dict[str, Slices] = {}
        for path in sorted(folder.glob("rank-*.safetensors")):
            file = self._files.enter_context(safe_open(path, "pt"))
            for key in file.keys():  # noqa: SIM118
                state, start = key.rsplit("@", 1)
                first, count = int(start), file.get_slice(key).get_shape()[0]
                self._slices.setdefault(state, []).append((first, first + count, key, file))

    def __enter__(self) -> "SavedFragments":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._files.close()

    def fill(self, state: str, piece: Fragment) -> None:
        """Copy the saved elements of a state into a piece, however they were split when they were saved."""
        filled = 0
        for start, end, key, file in self._slices[f"{state}/{piece.name}"]:
            first, last = max(start, piece.start), min(end, piece.end)
            if first < last:
                values = file.get_slice(key)[first - start : last - start]
                piece.values[first - piece.start : last - piece.start].copy_(values)
                filled += last - first
        assert filled == piece.values.numel(), f"{self._folder}: {state} of {piece.name} is incomplete"
