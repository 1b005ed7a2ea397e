"""Gathers single queries that arrive at once into batches, because a batch costs far less than its queries.

Takes items from any number of threads and gives a future for each; calls one function with up to
`max_batch` items that share a key (here: the same k and effort). Knows nothing of vectors or Ray.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Generic, TypeVar

from retrieval.errors import UserError

Key = TypeVar("Key", bound=Hashable)
Item = TypeVar("Item")
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class BatchLimits:
    """When a batch goes off: it is full, or its first item has waited long enough."""

    max_batch: int
    """Items."""
    max_wait_s: float
    """Seconds."""
    max_running: int
    """Batches at work at once; what arrives meanwhile gathers."""


@dataclass(frozen=True)
class _Entry(Generic[Item, Answer]):
    item: Item
    future: "Future[Answer]" = field(default_factory=Future)
    arrived: float = field(default_factory=time.monotonic)


class Batcher(Generic[Key, Item, Answer]):
    """A queue in front of `run(key, items) -> answers`, one answer an item, in their order.

    An exception from `run` reaches every item of its batch, and no other.
    """

    def __init__(self, run: Callable[[Key, list[Item]], Sequence[Answer]], limits: BatchLimits) -> None:
        self._run = run
        self._limits = limits
        self._changed = threading.Condition()
        self._waiting: dict[Key, deque[_Entry[Item, Answer]]] = {}
        self._running = 0
        self._closed = False
        self._pool = ThreadPoolExecutor(limits.max_running, thread_name_prefix="batch")
        self._gatherer = threading.Thread(target=self._gather, name="gather batches", daemon=True)
        self._gatherer.start()

    def submit(self, key: Key, item: Item) -> "Future[Answer]":
        """Queue an item; its answer comes with the future. Raises UserError once closed."""
        entry: _Entry[Item, Answer] = _Entry(item)
        with self._changed:
            if self._closed:
                raise UserError("this cluster is closed and takes no queries. Open it again.")
            self._waiting.setdefault(key, deque()).append(entry)
            self._changed.notify()
        return entry.future

    def close(self) -> None:
        """Answer what waits, then end the threads."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._gatherer.join()
        self._pool.shutdown()

    def _gather(self) -> None:
        while (batch := self._next()) is not None:
            key, entries = batch
            wanted = [entry for entry in entries if entry.future.set_running_or_notify_cancel()]
            if not wanted:
                self._finish()
                continue
            running = self._pool.submit(self._run, key, [entry.item for entry in wanted])
            running.add_done_callback(partial(self._deliver, wanted))

    def _next(self) -> tuple[Key, list[_Entry[Item, Answer]]] | None:
        """The next batch once it is due and may run; None when closed and empty."""
        with self._changed:
            while self._waiting or not self._closed:
                key, wait_s = self._due()
                if key is not None and wait_s <= 0 and self._running < self._limits.max_running:
                    self._running += 1
                    return key, self._take(key)
                self._changed.wait(wait_s if wait_s > 0 else None)
        return None

    def _due(self) -> tuple[Key | None, float]:
        """The key whose batch goes off next and the seconds until then (0 if nothing waits)."""
        soonest: tuple[Key | None, float] = (None, 0.0)
        for key, entries in self._waiting.items():
            ready = self._closed or len(entries) >= self._limits.max_batch
            wait_s = 0.0 if ready else entries[0].arrived + self._limits.max_wait_s - time.monotonic()
            if soonest[0] is None or wait_s < soonest[1]:
                soonest = key, wait_s
        return soonest

    def _take(self, key: Key) -> list[_Entry[Item, Answer]]:
        entries = self._waiting[key]
        taken = [entries.popleft() for _ in range(min(len(entries), self._limits.max_batch))]
        if not entries:
            del self._waiting[key]
        return taken

    def _finish(self) -> None:
        with self._changed:
            self._running -= 1
            self._changed.notify()

    def _deliver(self, entries: list[_Entry[Item, Answer]], running: "Future[Sequence[Answer]]") -> None:
        self._finish()
        error = running.exception()
        if error is not None:
            for entry in entries:
                entry.future.set_exception(error)
            return
        for entry, answer in zip(entries, running.result(), strict=True):
            entry.future.set_result(answer)
