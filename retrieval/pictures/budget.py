"""The limits for decoding: pixels of a picture, and memory, shared by all threads of a process.

A thread takes a share before it decodes and waits until the others have returned enough. So many large pictures in
a row take more time, not more memory.
"""

import ctypes
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

MAX_PIXELS = 1 << 27
"""Most pixels of a picture in any stage. Below Pillow's own limit of 178,956,970."""
TRIMMED_BYTES = 64 << 20


def trim_memory(num_bytes: int) -> None:
    """Return freed memory to the system if so many bytes were freed: glibc keeps blocks up to 32 MiB for itself."""
    if num_bytes >= TRIMMED_BYTES and sys.platform == "linux":
        library = ctypes.CDLL(None)
        if hasattr(library, "malloc_trim"):
            library.malloc_trim(0)


class DecodeBudget:
    """A number of bytes that threads share. Shares are handed out in order of arrival."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._used = 0
        self._turn = threading.Lock()
        self._returned = threading.Condition()

    @contextmanager
    def share(self, num_bytes: int) -> Iterator[None]:
        """Hold `num_bytes`, at most `max_bytes`, during the block. Waits until they are free.

        A thread that holds a share must not take another: two such threads could wait for each other.
        """
        assert num_bytes <= self.max_bytes
        # The thread whose turn it is keeps the others waiting, so that small pictures do not delay a large one forever.
        with self._turn, self._returned:
            self._returned.wait_for(lambda: self._used + num_bytes <= self.max_bytes)
            self._used += num_bytes
        try:
            yield
        finally:
            with self._returned:
                self._used -= num_bytes
                self._returned.notify_all()


BUDGET = DecodeBudget(2_000_000_000)
"""Of this process."""
