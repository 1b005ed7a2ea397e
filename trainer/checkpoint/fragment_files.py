"""Fragments of named parameters in files: one file `rank-<n>.safetensors` per rank.

A key `<state>/<parameter>@<start>` names the elements of its tensor. A reader reads only the slices that it needs.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from retrieval.errors import UserError
from retrieval.storage.root import FileRecord, Root, file_sha256
from trainer.engine.fragments import Fragment

Slices = list[tuple[int, int, str, str]]
"""First element, index after the last, key and file of each fragment of one parameter's state."""
DIGITS = 15
"""Hex digits of a file's digest, so that ranks can gather it as an int64."""


def fragment_key(state: str, fragment: Fragment) -> str:
    return f"{state}/{fragment.name}@{fragment.start}"


def rank_file_name(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def by_key(states: Iterable[tuple[str, Sequence[Fragment]]]) -> dict[str, torch.Tensor]:
    """The fragments of states, such as averages, by their keys in a file. states: with their names."""
    return {fragment_key(state, fragment): fragment.values for state, fragments in states for fragment in fragments}


def write_fragments(root: Root, name: str, values: dict[str, torch.Tensor]) -> FileRecord:
    """Write a rank's fragments by key. values: on the CPU."""
    with root.writing(name) as pending:
        save_file(values, pending.path)
    return pending.record


class SavedFragments:
    """The fragments in a checkpoint's folder; a context manager that keeps the files open.

    files: the checkpoint's own; the folder may have others, of a run that was stopped before it could publish them.
    Files of an object store are copied to the local disk when a fragment of them is needed.
    """

    def __init__(
        self, root: Root, folder: str, files: Iterable[str], digests: Mapping[str, str] | None = None, advice: str = ""
    ) -> None:
        """digests: first DIGITS of each file's SHA-256; earlier versions stored none. advice: if one differs."""
        self._root, self._folder = root, folder
        self._digests, self._advice = digests or {}, advice
        self._resources = ExitStack()
        self._files: dict[str, Any] = {}
        self._slices: dict[str, Slices] = {}
        for name in (f"{folder}/{file}" for file in sorted(files)):
            for key, count in _lengths(root, name).items():
                state, start = key.rsplit("@", 1)
                self._slices.setdefault(state, []).append((int(start), int(start) + count, key, name))

    def __enter__(self) -> "SavedFragments":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._resources.close()

    def read_into(self, state: str, fragment: Fragment) -> None:
        """Copy the saved elements of a state into a fragment. Saved fragments may have other borders."""
        count = 0
        for start, end, key, name in self._slices[f"{state}/{fragment.name}"]:
            first, last = max(start, fragment.start), min(end, fragment.end)
            if first < last:
                values = self._file(name).get_slice(key)[first - start : last - start]
                fragment.values[first - fragment.start : last - fragment.start].copy_(values)
                count += last - first
        assert count == fragment.values.numel(), f"{self._folder}: {state} of {fragment.name} is incomplete"

    def check_lengths(self, state: str, fragments: list[Fragment]) -> None:
        """Raise UserError if a state was saved for other tensors. For the 8-bit optimizer, which cannot split them."""
        for fragment in fragments:
            slices = self._slices.get(f"{state}/{fragment.name}", [])
            if (saved := sum(end - start for start, end, *_ in slices)) != fragment.values.numel():
                raise UserError(
                    f"{self._root.at(self._folder)} has {saved:,} elements of {state} of {fragment.name}, the "
                    f"optimizer has {fragment.values.numel():,}. Moments in 8 bits cannot be split: set "
                    f"train.zero_stage and train.decay_norms_and_biases to their values of the last start."
                )

    def _file(self, name: str) -> Any:
        if name not in self._files:
            path = self._resources.enter_context(self._root.local(name))
            wanted = self._digests.get(name.removeprefix(f"{self._folder}/"))
            if wanted and (found := file_sha256(path)[:DIGITS]) != wanted:
                message = f"{self._root.at(name)} is damaged: its SHA-256 begins with {found}, expected {wanted}."
                raise UserError(f"{message} {self._advice}")
            self._files[name] = self._resources.enter_context(safe_open(path, "pt"))
        return self._files[name]


def _lengths(root: Root, name: str) -> dict[str, int]:
    """Number of elements of each fragment of a file, by key: from the header, without the values."""
    with root.open(name) as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return {key: tensor["shape"][0] for key, tensor in header.items() if key != "__metadata__"}
