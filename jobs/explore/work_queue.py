"""A few threads with a bounded queue in front, for work that would block the event loop.

Whoever comes when the queue is full is sent away at once, whoever waits too long is told why; work that is
already running hears it too, and stops where it looks.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Event
from typing import Any, TypeVar

import faiss
import torch

Result = TypeVar("Result")


class Refused(Exception):
    """The server cannot serve this now. status: of HTTP; the text is for whoever asked."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class Turns:
    """`threads` workers; at most `most` pieces of work under way and waiting, for `timeout_s` each."""

    def __init__(self, name: str, threads: int, most: int, timeout_s: float) -> None:
        self.name = name
        self.most = most
        self.timeout_s = timeout_s
        self._pool = ThreadPoolExecutor(threads, name, _one_thread_each if threads > 1 else None)
        self._pending: set[Future[Any]] = set()

    def __len__(self) -> int:
        return len(self._pending)

    async def run(self, work: Callable[[Event], Result]) -> Result:
        """What `work` returns. It is given an event that is set when nobody waits for it any longer.

        Raises Refused: 429 where the queue is full, 503 where no turn came, 504 where it took too long.
        """
        if len(self) >= self.most:
            raise Refused(429, f"{len(self)} requests wait for a {self.name} already. Try again in a while.")
        stop = Event()
        future = self._pool.submit(work, stop)
        self._pending.add(future)
        future.add_done_callback(self._pending.discard)
        try:
            return await asyncio.wait_for(asyncio.wrap_future(future), self.timeout_s)
        except TimeoutError:
            if future.cancel():
                raise Refused(
                    503, f"No {self.name} could begin within {self.timeout_s:g} s: others came before."
                ) from None
            raise Refused(
                504, f"The {self.name} took more than {self.timeout_s:g} s. Ask for less."
            ) from None
        finally:
            stop.set()

    def close(self) -> None:
        """Take no more work and drop what waits."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def _one_thread_each() -> None:
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
