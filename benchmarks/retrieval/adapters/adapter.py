"""The interface of all compared methods: build, open, search, join."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.retrieval.data import Ids, Vectors

BLOCK_ROWS = 1 << 16
Search = Callable[[Vectors], Ids]


def blocks(rows: np.ndarray, size: int = BLOCK_ROWS) -> Iterator[tuple[int, Vectors]]:
    """The rows in float32, `size` at a time, with the number of the first."""
    for start in range(0, len(rows), size):
        yield start, rows[start : start + size].astype(np.float32)


class SearchAdapter(ABC):
    """A method with its settings. Its ids are row numbers."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings

    @abstractmethod
    def build(self, rows: np.ndarray, folder: Path, threads: int) -> dict[str, Any]:
        """Write the index of rows (n, dim) float16 to a folder. Returns values for the record."""

    @abstractmethod
    def open(self, folder: Path, rows: np.ndarray) -> None:
        """Open the index for searching."""

    def threads(self, number: int) -> None:
        """Set the number of threads of the next searches."""
        self._threads = number

    @abstractmethod
    def searcher(self, k: int, effort: tuple[int, ...]) -> Search:
        """A function (n, dim) float32 -> (n, k) int64; one-time costs of the effort are paid here."""

    def single(self, k: int, effort: tuple[int, ...]) -> Search:
        """The same for (1, dim), if the library has a separate call for one query."""
        return self.searcher(k, effort)

    def join(self, k: int, effort: tuple[int, ...]) -> Search:
        """The same for very many queries, if the library has a separate call for them."""
        return self.searcher(k, effort)

    def ids(self, results: Ids) -> Ids:
        """Row numbers of the results of a search; not timed."""
        return results

    def close(self) -> None:  # noqa: B027 - most adapters start nothing
        """Stop processes that the adapter started."""
