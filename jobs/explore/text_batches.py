"""Encodes the texts of concurrent searches together: one call of the model for several texts that wait for it."""

from dataclasses import dataclass
from threading import Lock
from typing import Protocol

import numpy as np
import numpy.typing as npt

from jobs.explore.work_queue import WorkQueue

Vectors = npt.NDArray[np.float32]
MAX_TEXTS = 16
"""Texts of one call. Requests whose texts are encoded together go on together, and all others wait for them."""


class TextEncoder(Protocol):
    """What encodes texts: `retrieval.clip.Encoder`."""

    def encode_texts(self, texts: list[str]) -> Vectors:
        """Unit vectors (n, dim)."""


@dataclass(eq=False)
class Text:
    """A text and its vector (1, dim), which is None until it is encoded."""

    text: str
    vector: Vectors | None = None


class TextBatches:
    """Vectors of texts by the jobs of a queue with one thread. A job encodes its text and others that wait.

    An error ends the request of this job only: the other texts are encoded one by one.
    """

    def __init__(self, encoder: TextEncoder, queue: WorkQueue) -> None:
        self.queue = queue
        self._encoder = encoder
        self._waiting: list[Text] = []
        self._lock = Lock()

    async def encode(self, text: str) -> Vectors:
        """The unit vector (1, dim) of a text. Raises BusyError as `WorkQueue.run`."""
        entry = Text(text)
        with self._lock:
            self._waiting.append(entry)
        try:
            return await self.queue.run(lambda stop: self._vector(entry))
        finally:
            with self._lock:
                if entry in self._waiting:  # rejected or cancelled
                    self._waiting.remove(entry)

    def _vector(self, entry: Text) -> Vectors:
        if entry.vector is None:
            batch = [entry]
            with self._lock:
                if entry in self._waiting:  # else an error ended the job that had taken it
                    batch = [entry, *(each for each in self._waiting if each is not entry)][:MAX_TEXTS]
                    self._waiting = [each for each in self._waiting if each not in batch]
            for each, vector in zip(batch, self._encoder.encode_texts([each.text for each in batch]), strict=True):
                each.vector = vector[None]
        assert entry.vector is not None
        return entry.vector
