"""Fragments of named parameters on disk: one file `rank-<n>.safetensors` per rank.

A key `<state>/<parameter>@<start>` names the elements of its tensor. A reader reads only the slices that it needs.
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
"""First element, index after the last, key and open file of each fragment of one parameter's state."""


def fragment_key(state: str, fragment: Fragment) -> str:
    return f"{state}/{fragment.name}@{fragment.start}"


def rank_file_name(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def write_fragments(folder: Path, rank: int, values: dict[str, torch.Tensor]) -> int:
    """Write a rank's fragments by key and sync the file. values: on the CPU. Returns the size in bytes."""
    path = folder / rank_file_name(rank)
    save_file(values, path)
    with path.open("rb+") as file:
        os.fsync(file.fileno())
    return path.stat().st_size


class SavedFragments:
    """The fragments in a checkpoint's folder; a context manager that keeps the files open."""

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

    def read_into(self, state: str, fragment: Fragment) -> None:
        """Copy the saved elements of a state into a fragment. Saved fragments may have other borders."""
        count = 0
        for start, end, key, file in self._slices[f"{state}/{fragment.name}"]:
            first, last = max(start, fragment.start), min(end, fragment.end)
            if first < last:
                values = file.get_slice(key)[first - start : last - start]
                fragment.values[first - fragment.start : last - fragment.start].copy_(values)
                count += last - first
        assert count == fragment.values.numel(), f"{self._folder}: {state} of {fragment.name} is incomplete"
