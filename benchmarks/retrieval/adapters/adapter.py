"""What a worker asks of a method: build, open, search, join."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.retrieval.data import Ids, Vectors

Search = Callable[[Vectors], Ids]


class Method(ABC):
    """A method with its settings. Row numbers are ids."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings

    @abstractmethod
    def build(self, rows: np.ndarray, folder: Path, threads: int) -> dict[str, Any]:
        """Write the index of rows (n, dim) float16, a memory map, into the folder. Returns what to record."""

    @abstractmethod
    def open(self, folder: Path, rows: np.ndarray) -> None:
        """Make ready for searching."""

    @abstractmethod
    def threads(self, number: int) -> None:
        """Threads that the next searches use."""

    @abstractmethod
    def searcher(self, k: int, effort: tuple[int, ...]) -> Search:
        """Returns (n, dim) float32 -> (n, k) int64 at that effort; what an effort costs once is paid here."""

    def single(self, k: int, effort: tuple[int, ...]) -> Search:
        """The same for (1, dim), where a library has another call for it."""
        return self.searcher(k, effort)

    def join(self, k: int, effort: tuple[int, ...]) -> Search:
        """The same for very many queries, where there is another call for it."""
        return self.searcher(k, effort)

    def ids(self, found: Ids) -> Ids:
        """Row numbers for what a search returned; outside of what is timed."""
        return found

    def close(self) -> None:  # noqa: B027 - most have nothing to stop
        """Stop what was started."""
