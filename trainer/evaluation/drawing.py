"""Cells of samples, drawn and stored piece by piece: what `evaluate` and the paper's figures share.

Writes, for each cell, `samples/<cell>/<n>.png` with its recipe inside and the pictures' CLIP features in
`features.npy`; reads them back.
"""

import io
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from tqdm import tqdm

from retrieval.storage.manifest import ShardRecord
from retrieval.storage.root import FileRecord
from trainer.evaluation.judgement import Shown
from trainer.evaluation.metrics import Features
from trainer.evaluation.styles import Cell
from trainer.sampling.batches import Batch
from trainer.sampling.picture import png_bytes
from trainer.sampling.request import Sample
from trainer.sampling.resumable import Pieces
from trainer.sampling.sampler import Sampler


def draw_cells(
    sampler: Sampler,
    cells: Sequence[Cell],
    pieces: Pieces,
    plan: Callable[[Cell], Sequence[Batch]] | None = None,
) -> list[ShardRecord]:
    """Draw the cells that are not finished; one piece each. Returns the records of all, in order.

    plan: the batches of a cell, whose positions are those of its requests; by default what retrieval gives.
    """
    stage = pieces.stage.rsplit("/", maxsplit=1)[-1]
    plan = plan or (lambda cell: sampler.plan(cell.requests))
    records = {cell.name: record for cell in cells if (record := pieces.done(cell.name))}
    missing = [cell for cell in cells if cell.name not in records]
    total, count = sum(len(cell.requests) for cell in cells), sum(len(cell.requests) for cell in missing)
    began = time.monotonic()
    drawing: deque[tuple[Cell, Batch]] = deque()

    def read() -> Iterator[Batch]:
        for cell in missing:
            for batch in plan(cell):
                drawing.append((cell, batch))
                yield batch

    finished: dict[int, Sample] = {}
    with tqdm(total=total, initial=total - count, desc=stage, unit="image", mininterval=0.5) as bar:
        for samples in sampler.draw(read()):
            cell, batch = drawing.popleft()
            finished.update(zip(batch.positions, samples, strict=True))
            bar.update(len(samples))
            if len(finished) == len(cell.requests):
                files = _write(sampler, cell, [finished[i] for i in range(len(finished))], pieces)
                records[cell.name] = pieces.write(cell.name, files, len(finished))
                finished = {}
    seconds = time.monotonic() - began
    rate = count / max(seconds, 1e-9)
    logging.getLogger(stage).info(f"{stage}: {count} images  {seconds:.1f} s  {rate:.2f} images/s")
    return [records[cell.name] for cell in cells]


def read_shown(sampler: Sampler, cell: Cell, pieces: Pieces) -> Shown:
    """The stored features of a cell's pictures, with those of its prompts."""
    with pieces.root.open(_features(cell, pieces)) as file:
        pictures: Features = np.load(file, allow_pickle=False)
    return Shown(pictures, sampler.encoder.encode_texts(cell.prompts))


def place(cell: Cell, pieces: Pieces, number: int) -> str:
    """Name of a cell's picture below the root."""
    return f"{pieces.stage}/samples/{cell.name}/{number:04d}.png"


def _write(sampler: Sampler, cell: Cell, samples: Sequence[Sample], pieces: Pieces) -> list[FileRecord]:
    files = [
        pieces.root.write_bytes(place(cell, pieces, number), png_bytes(one.picture, one.recipe()))
        for number, one in enumerate(samples)
    ]
    buffer = io.BytesIO()
    np.save(buffer, sampler.encoder.encode_images([one.picture for one in samples]), allow_pickle=False)
    return [*files, pieces.root.write_bytes(_features(cell, pieces), buffer.getvalue())]


def _features(cell: Cell, pieces: Pieces) -> str:
    return f"{pieces.stage}/samples/{cell.name}/features.npy"
