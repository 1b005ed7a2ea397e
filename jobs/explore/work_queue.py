"""A thread pool with a bounded queue, for work that would block the event loop, and turns of requests.

A request to a full queue fails at once. If a request exceeds its timeout or is cancelled, an event stops its work.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager
from threading import Event
from typing import Any, TypeVar

import faiss
import torch

Result = TypeVar("Result")


class BusyError(Exception):
    """The server cannot serve a request now. status: the HTTP status."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class Turns:
    """At most `running` requests at a time; the others wait in order. At most `max_pending` run and wait.

    The event loop serves all requests that are ready before it looks for new ones. If few run, few are ready.
    """

    def __init__(self, name: str, running: int, max_pending: int, timeout_s: float) -> None:
        """timeout_s: longest wait for a turn."""
        self.name = name
        self.max_pending = max_pending
        self.timeout_s = timeout_s
        self._running = asyncio.Semaphore(running)
        self._num_pending = 0

    def __len__(self) -> int:
        return self._num_pending

    @asynccontextmanager
    async def take(self) -> AsyncIterator[None]:
        """Wait for a turn, which ends with the block.

        Raises BusyError: 429 if `max_pending` requests run and wait, 503 if no turn came in time.
        """
        if len(self) >= self.max_pending:
            raise BusyError(429, f"The queue is full: {len(self)} {self.name} requests. Try again later.")
        self._num_pending += 1
        try:
            try:
                async with asyncio.timeout(self.timeout_s):
                    await self._running.acquire()
            except TimeoutError:
                raise _no_start(self.name, self.timeout_s) from None
            try:
                yield
            finally:
                self._running.release()
        finally:
            self._num_pending -= 1


class WorkQueue:
    """`threads` workers; at most `max_pending` jobs running and waiting, for `timeout_s` each."""

    def __init__(self, name: str, threads: int, max_pending: int, timeout_s: float) -> None:
        self.name = name
        self.max_pending = max_pending
        self.timeout_s = timeout_s
        self._pool = ThreadPoolExecutor(threads, name, _one_thread_each if threads > 1 else None)
        self._pending: set[Future[Any]] = set()
        self._stops: set[Event] = set()

    def __len__(self) -> int:
        return len(self._pending)

    async def run(self, work: Callable[[Event], Result]) -> Result:
        """The result of `work`, which is called with an event that is set when the request ends.

        Raises BusyError: 429 if the queue is full, 503 if no worker became free in time, 504 if the work took too long.
        """
        if len(self) >= self.max_pending:
            raise BusyError(429, f"The queue is full: {len(self)} {self.name} requests. Try again later.")
        stop = Event()
        self._stops.add(stop)
        future = self._pool.submit(work, stop)
        self._pending.add(future)
        future.add_done_callback(self._pending.discard)
        try:
            return await asyncio.wait_for(asyncio.wrap_future(future), self.timeout_s)
        except TimeoutError:
            if future.cancel():
                raise _no_start(self.name, self.timeout_s) from None
            raise BusyError(
                504, f"The {self.name} took more than {self.timeout_s:g} s. Ask for fewer steps or neighbors."
            ) from None
        finally:
            stop.set()
            self._stops.discard(stop)

    def close(self) -> None:
        """Accept no more work, drop waiting work and stop running work."""
        for stop in list(self._stops):
            stop.set()
        self._pool.shutdown(wait=False, cancel_futures=True)


def _no_start(name: str, timeout_s: float) -> BusyError:
    return BusyError(503, f"The {name} could not start within {timeout_s:g} s. Try again later.")


def _one_thread_each() -> None:
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
