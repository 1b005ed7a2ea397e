"""Counts the calls of a block that wait for the GPU: torch counts them on CUDA, a stand-in where there is no CUDA.

On a CPU all tensors are in the same memory. The stand-in takes as tensors of the host those that the caller names, the
copies by `.cpu()`, and what is computed from these; all others count as tensors of the GPU. A call waits if it takes a
value from the GPU, copies between GPU and host without `non_blocking`, or is one of `synchronize`.
"""

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from deepspeed.accelerator import get_accelerator
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

READING = frozenset(
    {"item", "tolist", "numpy", "__array__", "__bool__", "__float__", "__int__", "__index__", "__format__", "__repr__"}
    | {"__contains__", "equal", "allclose", "is_nonzero", "nonzero", "argwhere", "masked_select", "unique"}
)
"""Functions that return values of a tensor, or a tensor of a shape that depends on values."""
HOST = "_of_host"


class SimulatedWaits(TorchFunctionMode):
    """Within the block, `waits` gets the name of each function of torch that would wait for a GPU."""

    def __init__(self, host: Iterable[torch.Tensor]) -> None:
        """host: tensors of the host."""
        super().__init__()
        self.waits: list[str] = []
        for tensor in host:
            setattr(tensor, HOST, True)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "backward":
            with _ReadsOfHooks(self.waits):
                return func(*args, **kwargs)
        tensors = _tensors((args, kwargs))
        from_host = all(getattr(tensor, HOST, False) for tensor in tensors)
        to_device = "device" in kwargs or (name == "to" and any(isinstance(arg, torch.device | str) for arg in args))
        if self._is_wait(name, tensors, from_host, to_device) and not kwargs.get("non_blocking"):
            self.waits.append(name)
        result = func(*args, **kwargs)
        if name in ("to", "cpu") and any(result is tensor for tensor in tensors):
            result = result.view_as(result)  # a tensor of its own, with its own mark
        for tensor in _tensors(result):
            if not any(tensor is one for one in tensors):
                setattr(tensor, HOST, name == "cpu" or (from_host and not to_device))
        return result

    def _is_wait(self, name: str, tensors: list[torch.Tensor], from_host: bool, to_device: bool) -> bool:
        if from_host:
            return to_device and name in ("to", "tensor", "as_tensor")
        if name in ("copy_", "__getitem__"):
            on_host = {getattr(tensor, HOST, False) for tensor in tensors}
            return len(on_host) > 1 if name == "copy_" else tensors[-1].dtype == torch.bool and len(tensors) > 1
        return name in READING or name == "cpu"


class _ReadsOfHooks(TorchDispatchMode):
    """Counts the values that hooks of a backward pass read, where functions of torch cannot be replaced."""

    def __init__(self, waits: list[str]) -> None:
        super().__init__()
        self._waits = waits

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            self._waits.append("item" if "scalar" in func.__name__ else "nonzero")
        return func(*args, **(kwargs or {}))


def _tensors(values: Any) -> list[torch.Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, torch.Tensor)]


@contextmanager
def counted_waits(host: Iterable[torch.Tensor] = ()) -> Iterator[list[str]]:
    """The calls in the block that wait for the GPU, complete at its end. host: tensors of the host (stand-in)."""
    waits: list[str] = []
    with _counted_synchronizations(waits), _counted_reads(waits, host):
        yield waits


@contextmanager
def _counted_reads(waits: list[str], host: Iterable[torch.Tensor]) -> Iterator[None]:
    """Add the calls that read values or copy."""
    if not torch.cuda.is_available():
        with SimulatedWaits(host) as simulated:
            yield
        waits += simulated.waits
        return
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits += [f"{each.filename}:{each.lineno}" for each in caught if "synchronizing" in str(each.message)]


@contextmanager
def _counted_synchronizations(waits: list[str]) -> Iterator[None]:
    """Add the calls of `synchronize`, of which torch does not warn."""
    owner = torch.cuda if torch.cuda.is_available() else get_accelerator()
    original = owner.synchronize

    def synchronize(*args: Any) -> None:
        waits.append("synchronize")
        original(*args)

    with mock.patch.object(owner, "synchronize", synchronize):
        yield
