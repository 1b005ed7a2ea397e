"""Collects single items into batches, because a batch of queries costs far less than single queries."""

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
Result = TypeVar("Result")


@dataclass(frozen=True)
class BatchLimits:
    """A batch starts when it is full, or when its first item has waited `max_wait_s`."""

    max_batch: int
    """Items per batch."""
    max_wait_s: float
    """Longest wait of an item in seconds."""
    max_running: int
    """Batches that run at once. Items that arrive meanwhile wait for the next batch."""


@dataclass(frozen=True)
class _Entry(Generic[Item, Result]):
    item: Item
    future: "Future[Result]" = field(default_factory=Future)
    arrived: float = field(default_factory=time.monotonic)


class Batcher(Generic[Key, Item, Result]):
    """A queue in front of `run(key, items) -> results`, which returns one result per item, in order. Thread-safe.

    All items of a batch have the same key (for queries: the same k and effort). An exception of `run` becomes the
    exception of all items of that batch.
    """

    def __init__(self, run: Callable[[Key, list[Item]], Sequence[Result]], limits: BatchLimits) -> None:
        self._run = run
        self._limits = limits
        self._changed = threading.Condition()
        self._waiting: dict[Key, deque[_Entry[Item, Result]]] = {}
        self._running = 0
        self._closed = False
        self._pool = ThreadPoolExecutor(limits.max_running, thread_name_prefix="batch")
        self._scheduler = threading.Thread(target=self._schedule, name="schedule batches", daemon=True)
        self._scheduler.start()

    def submit(self, key: Key, item: Item) -> "Future[Result]":
        """Queue an item and return the future of its result. Raises UserError after `close`."""
        entry: _Entry[Item, Result] = _Entry(item)
        with self._changed:
            if self._closed:
                raise UserError("this cluster is closed and takes no queries. Open it again.")
            self._waiting.setdefault(key, deque()).append(entry)
            self._changed.notify()
        return entry.future

    def close(self) -> None:
        """Run all waiting items, then stop the threads."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._scheduler.join()
        self._pool.shutdown()

    def _schedule(self) -> None:
        while (batch := self._next()) is not None:
            key, entries = batch
            entries = [entry for entry in entries if entry.future.set_running_or_notify_cancel()]
            if not entries:
                self._finish()
                continue
            running = self._pool.submit(self._run, key, [entry.item for entry in entries])
            running.add_done_callback(partial(self._deliver, entries))

    def _next(self) -> tuple[Key, list[_Entry[Item, Result]]] | None:
        """Wait for the next batch that is due and may run; None when closed and empty."""
        with self._changed:
            while self._waiting or not self._closed:
                key, wait_s = self._due()
                if key is not None and wait_s <= 0 and self._running < self._limits.max_running:
                    self._running += 1
                    return key, self._take(key)
                self._changed.wait(wait_s if wait_s > 0 else None)
        return None

    def _due(self) -> tuple[Key | None, float]:
        """The key of the next batch and the seconds until it starts; None and 0 if no item waits."""
        soonest: tuple[Key | None, float] = (None, 0.0)
        for key, entries in self._waiting.items():
            ready = self._closed or len(entries) >= self._limits.max_batch
            wait_s = 0.0 if ready else entries[0].arrived + self._limits.max_wait_s - time.monotonic()
            if soonest[0] is None or wait_s < soonest[1]:
                soonest = key, wait_s
        return soonest

    def _take(self, key: Key) -> list[_Entry[Item, Result]]:
        entries = self._waiting[key]
        batch = [entries.popleft() for _ in range(min(len(entries), self._limits.max_batch))]
        if not entries:
            del self._waiting[key]
        return batch

    def _finish(self) -> None:
        with self._changed:
            self._running -= 1
            self._changed.notify()

    def _deliver(self, entries: list[_Entry[Item, Result]], running: "Future[Sequence[Result]]") -> None:
        self._finish()
        if (error := running.exception()) is not None:
            for entry in entries:
                entry.future.set_exception(error)
            return
        for entry, result in zip(entries, running.result(), strict=True):
            entry.future.set_result(result)
