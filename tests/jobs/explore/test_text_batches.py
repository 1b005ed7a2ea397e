"""Texts of concurrent requests are encoded together, each request gets its vector, and an error ends one request."""

import asyncio
from collections.abc import Sequence
from threading import Event

import numpy as np
import numpy.typing as npt

from jobs.explore.text_batches import MAX_TEXTS, TextBatches
from jobs.explore.work_queue import BusyError, WorkQueue


class LengthEncoder:
    """The vector of a text is its length. The first call waits for `released`. An empty text is an error."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.started, self.released = Event(), Event()

    def encode_texts(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        self.batches.append(list(texts))
        self.started.set()
        assert self.released.wait(60)
        if "" in texts:
            raise ValueError("an empty text")
        return np.array([[len(text)] for text in texts], np.float32)


async def encode_behind(encoder: LengthEncoder, batches: TextBatches, texts: Sequence[str]) -> list[object]:
    """Results or errors of texts that are requested while the model encodes the text "first"."""
    first = asyncio.create_task(batches.encode("first"))
    await asyncio.to_thread(encoder.started.wait, 60)
    others = [asyncio.create_task(batches.encode(text)) for text in texts]
    await asyncio.sleep(0)  # each task runs until it waits for the queue
    encoder.released.set()
    assert (await first).tolist() == [[5]]
    return await asyncio.gather(*others, return_exceptions=True)


def test_texts_that_wait_are_encoded_by_one_call() -> None:
    encoder = LengthEncoder()
    batches = TextBatches(encoder, WorkQueue("text", 1, 10, 60))
    vectors = asyncio.run(encode_behind(encoder, batches, ["a", "bb", "ccc"]))
    assert encoder.batches == [["first"], ["a", "bb", "ccc"]]
    assert [vector.tolist() for vector in vectors] == [[[1]], [[2]], [[3]]]  # type: ignore[attr-defined]


def test_a_call_encodes_a_limited_number_of_texts_in_their_order() -> None:
    encoder = LengthEncoder()
    batches = TextBatches(encoder, WorkQueue("text", 1, 100, 60))
    texts = [f"{number:03d}" for number in range(2 * MAX_TEXTS + 3)]
    vectors = asyncio.run(encode_behind(encoder, batches, texts))
    assert encoder.batches == [["first"], *(texts[i : i + MAX_TEXTS] for i in range(0, len(texts), MAX_TEXTS))]
    assert len(vectors) == len(texts)


def test_a_rejected_text_is_not_encoded() -> None:
    encoder = LengthEncoder()
    batches = TextBatches(encoder, WorkQueue("text", 1, 2, 60))
    _, rejected = asyncio.run(encode_behind(encoder, batches, ["a", "bb"]))
    assert isinstance(rejected, BusyError)
    assert encoder.batches == [["first"], ["a"]]


def test_texts_behind_an_error_are_encoded_alone() -> None:
    encoder = LengthEncoder()
    batches = TextBatches(encoder, WorkQueue("text", 1, 10, 60))
    error, vector = asyncio.run(encode_behind(encoder, batches, ["", "bb"]))
    assert isinstance(error, ValueError)
    assert vector.tolist() == [[2]]  # type: ignore[attr-defined]
    assert encoder.batches == [["first"], ["", "bb"], ["bb"]]
