"""The exponential moving average of the weights, in fp32, split over ranks as DeepSpeed splits them.

Each rank averages the pieces of the fp32 master weights that it owns, so that a step needs no
communication; the pieces come together for the export only. Reads and writes the `ema-*` files of a
checkpoint, whose keys say which elements they hold, so that they can be read however they were split.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import deepspeed.comm as dist
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import safe_get_local_fp32_param
from safetensors import safe_open
from safetensors.torch import save_file


@dataclass(frozen=True)
class Fragment:
    """A piece of one parameter: elements start .. start + values.numel() of its flattened master weight."""

    name: str
    start: int
    values: torch.Tensor

    @property
    def end(self) -> int:
        """One past its last element in the flattened parameter."""
        return self.start + self.values.numel()


def decay_at(updates: int, decay: float) -> float:
    """min(decay, (1 + n) / (10 + n)) after n updates, so that the average forgets the initial weights."""
    return min(decay, (1 + updates) / (10 + updates))


def master_fragments(module: torch.nn.Module, zero_stage: int, rank: int, world: int) -> list[Fragment]:
    """This rank's pieces of the fp32 master weights: views, which follow the optimizer."""
    named = list(module.named_parameters())
    if zero_stage == 0:
        owned = named[rank::world]
        return [Fragment(name, 0, weight.detach().flatten()) for name, weight in owned]
    piece_of = _split_weight if zero_stage == 3 else _split_optimizer
    return [piece for name, weight in named if (piece := piece_of(name, weight, rank)) is not None]


def _split_optimizer(name: str, weight: torch.nn.Parameter, rank: int) -> Fragment | None:
    mapping = weight._hp_mapping  # type: ignore[attr-defined]
    if mapping is None:
        return None
    return Fragment(name, mapping.lp_fragment_address.start, mapping.hp_fragment.detach())


def _split_weight(name: str, weight: torch.nn.Parameter, rank: int) -> Fragment | None:
    local = safe_get_local_fp32_param(weight).detach().flatten()
    start = rank * local.numel()
    # The last ranks' pieces are padded to the common length.
    count = min(local.numel(), weight.ds_numel - start)  # type: ignore[attr-defined]
    return Fragment(name, start, local[:count]) if count > 0 else None


class Average:
    """The moving average of a list of fragments, which it reads at every update."""

    def __init__(self, masters: list[Fragment], decay: float) -> None:
        self._masters = [piece.values for piece in masters]
        self._decay = decay
        self.fragments = [Fragment(piece.name, piece.start, piece.values.clone()) for piece in masters]
        self._averages = [piece.values for piece in self.fragments]

    def update(self, updates: int) -> None:
        """average += (1 - decay) (weights - average), after optimizer step number `updates` (from 1)."""
        torch._foreach_lerp_(self._averages, self._masters, 1 - decay_at(updates, self._decay))

    def save(self, folder: Path, rank: int) -> None:
        """Write this rank's pieces to `ema-<rank>.safetensors`."""
        save_file(
            {f"{piece.name}@{piece.start}": piece.values for piece in self.fragments},
            folder / f"ema-{rank:05d}.safetensors",
        )

    def load(self, folder: Path) -> None:
        """Fill this rank's pieces from the files of all ranks of a checkpoint, however they were split."""
        saved = _saved_pieces(folder)
        for piece in self.fragments:
            filled = 0
            for start, count, path, key in saved[piece.name]:
                first, last = max(start, piece.start), min(start + count, piece.end)
                if first < last:
                    with safe_open(path, "pt") as file:
                        values = file.get_slice(key)[first - start : last - start]
                    piece.values[first - piece.start : last - piece.start].copy_(values)
                    filled += last - first
            assert filled == piece.values.numel(), f"{folder}: {piece.name} is incomplete"

    def gather(self, shapes: dict[str, torch.Size]) -> Iterator[tuple[str, torch.Tensor]]:
        """Each averaged parameter whole, on every rank, in the order of `shapes`. All ranks must iterate."""
        own = {piece.name: piece for piece in self.fragments}
        device = get_accelerator().current_device_name()
        for name, shape in shapes.items():
            whole = torch.zeros(shape.numel(), device=device)
            if name in own:
                whole[own[name].start : own[name].end] = own[name].values
            dist.all_reduce(whole)
            yield name, whole.view(shape).cpu()


def _saved_pieces(folder: Path) -> dict[str, list[tuple[int, int, Path, str]]]:
    """Start, length, file and key of every saved piece, by parameter."""
    found: dict[str, list[tuple[int, int, Path, str]]] = {}
    for path in sorted(folder.glob("ema-*.safetensors")):
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118
                name, start = key.rsplit("@", 1)
                found.setdefault(name, []).append((int(start), file.get_slice(key).get_shape()[0], path, key))
    return found
