"""From requests to batches: retrieval, contexts, and which requests go through the UNet together.

Takes requests and open databases, gives arrays ready for the sampler. A plan depends only on the list of
requests and the batch size, so that an interrupted stage computes the same batches again.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from retrieval.database import Database, Neighbors
from trainer.context import Vectors, make_context
from trainer.request import Neighbor, Request


@dataclass(frozen=True)
class Conditioned:
    """A request with what retrieval found for it."""

    request: Request
    neighbors: tuple[Neighbor, ...]
    context: Vectors
    """(tokens, dim) unit rows."""


@dataclass(frozen=True)
class Batch:
    """Requests of one context length, one scheduler, one number of steps and one size."""

    positions: tuple[int, ...]
    """Where each stood in the planned list."""
    items: tuple[Conditioned, ...]

    @property
    def contexts(self) -> Vectors:
        """(n, tokens, dim) float32 unit rows."""
        return np.stack([item.context for item in self.items])


def condition(
    requests: Sequence[Request], encode: Callable[[list[str]], Vectors], database: Callable[[str], Database]
) -> list[Conditioned]:
    """Neighbors and context of each request, in order; each prompt is encoded and searched for once."""
    prompts = sorted({request.prompt for request in requests})
    texts = dict(zip(prompts, encode(prompts), strict=True))
    found: dict[tuple[str, int, str], tuple[Vectors, tuple[Neighbor, ...]]] = {}
    for name, k in sorted({(one.database, one.k) for one in requests if one.mode != "text"}):
        asked = sorted({one.prompt for one in requests if one.mode != "text" and one.database == name})
        neighbors = database(name).search(np.stack([texts[prompt] for prompt in asked]), k)
        found.update({(name, k, prompt): one for prompt, one in zip(asked, _listed(neighbors), strict=True)})
    results = []
    for one in requests:
        text = texts[one.prompt]
        nothing = (np.empty((0, len(text)), np.float32), ())
        vectors, records = nothing if one.mode == "text" else found[one.database, one.k, one.prompt]
        results.append(Conditioned(one, records, make_context(one.mode, text, vectors)))
    return results


def make_batches(conditioned: Sequence[Conditioned], batch_size: int) -> list[Batch]:
    """Batches of at most `batch_size`, of nearly equal size, shortest contexts first, order kept within."""
    groups: dict[tuple[int | str, ...], list[int]] = {}
    for position, item in enumerate(conditioned):
        one = item.request
        key = (len(item.context), one.scheduler, one.steps, one.height, one.width)
        groups.setdefault(key, []).append(position)
    return [
        Batch(tuple(chunk), tuple(conditioned[position] for position in chunk))
        for _, positions in sorted(groups.items())
        for chunk in even_chunks(positions, batch_size)
    ]


def even_chunks(positions: Sequence[int], size: int) -> list[list[int]]:
    """As few runs as hold at most `size` each, of lengths that differ by at most one."""
    bounds = np.linspace(0, len(positions), -(-len(positions) // size) + 1).round().astype(int)
    return [list(positions[start:end]) for start, end in pairwise(bounds)]


def _listed(neighbors: Neighbors) -> list[tuple[Vectors, tuple[Neighbor, ...]]]:
    """Embeddings and records of each query's neighbors."""
    results = []
    for i, table in enumerate(neighbors.rows):
        columns = zip(table["url"].to_pylist(), table["caption"].to_pylist(), strict=True)
        records = tuple(
            Neighbor(int(id_), float(similarity), url, caption)
            for id_, similarity, (url, caption) in zip(
                neighbors.ids[i], neighbors.similarities[i], columns, strict=True
            )
        )
        results.append((neighbors.embeddings[i], records))
    return results
