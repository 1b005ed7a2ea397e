"""What each request is conditioned on: its query, its neighbors in one or several databases, their weights.

Takes requests, gives tokens with weights. Every distinct prompt is encoded once and every distinct query
searched for once in a database, however many requests share them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from retrieval.database.database import Database
from retrieval.errors import UserError
from retrieval.storage import schema
from trainer.model.context import Vectors, make_context, unit_rows
from trainer.sampling.request import Neighbor, Request

SHOWN = (schema.IMAGE_ID, "url", "caption")
RECALL = 0.95
"""Share of the true neighbors that conditions are searched with."""


@dataclass(frozen=True)
class Sources:
    """Where conditions come from."""

    encode: Callable[[list[str]], Vectors]
    """Texts to unit rows."""
    database: Callable[[str], Database]
    """An opened database by name."""
    pseudo_query: Callable[[int, float], tuple[int, Vectors]]
    """Id and embedding of an image of the training database, by seed and top_m."""


@dataclass(frozen=True)
class Conditioned:
    """A request with what retrieval found for it."""

    request: Request
    neighbors: tuple[Neighbor, ...]
    context: Vectors
    """(tokens, dim) unit rows."""
    weights: Vectors
    """(tokens,) above 0: how often each token counts in attention."""
    pseudo_query: int | None = None


@dataclass(frozen=True)
class Query:
    """What stands for a request in a search, and in its context."""

    tokens: Vectors
    """(q, dim): the text, then the images."""
    pseudo_query: int | None = None
    like: str = "images"
    """Which of a database's calibrations holds for it: `texts` for a prompt alone."""

    @property
    def vector(self) -> Vectors:
        """(dim,) the direction to search in: the mean of several tokens, which count the same.

        Raises UserError for tokens whose mean has no direction.
        """
        if len(self.tokens) == 1:
            return np.asarray(self.tokens[0])
        try:
            return unit_rows(unit_rows(self.tokens).mean(axis=0))
        except ValueError as error:
            raise UserError("prompt and images cancel out: there is no direction to search in.") from error


Found = list[tuple[Neighbor, Vectors]]
"""Neighbors with their embeddings (dim,), best first."""


def condition(requests: Sequence[Request], sources: Sources) -> list[Conditioned]:
    """Neighbors and context of each request, in order. Raises UserError where nothing is left to say."""
    queries = make_queries(requests, sources)
    found = _search(requests, queries, sources)
    return [
        _conditioned(one, query, lists) for one, query, lists in zip(requests, queries, found, strict=True)
    ]


def make_queries(requests: Sequence[Request], sources: Sources) -> list[Query]:
    """The query of each request."""
    prompts = sorted({request.prompt for request in requests if request.prompt})
    texts = dict(zip(prompts, sources.encode(prompts), strict=True)) if prompts else {}
    queries = []
    for one in requests:
        if one.mode == "unconditional":
            image_id, vector = sources.pseudo_query(one.seed, one.top_m)
            queries.append(Query(vector[None], image_id))
            continue
        text = [texts[one.prompt]] if one.prompt else []
        tokens = np.stack([*text, *(image.embedding for image in one.images)])
        queries.append(Query(tokens, like="images" if one.images else "texts"))
    return queries


def _search(requests: Sequence[Request], queries: Sequence[Query], sources: Sources) -> list[list[Found]]:
    """For each request the neighbors from each of its databases, more than k where some are excluded."""
    asked: dict[tuple[str, int, str], dict[bytes, Vectors]] = {}
    keys = []
    for one, query in zip(requests, queries, strict=True):
        vector = query.vector
        places = [(name, one.k + len(one.exclude), query.like) for name in one.shares()]
        keys.append([(place, vector.tobytes()) for place in places])
        for place in places:
            asked.setdefault(place, {})[vector.tobytes()] = vector
    found = {}
    for place in sorted(asked):
        (name, count, like), vectors = place, asked[place]
        lists = _listed(sources.database(name), np.stack([*vectors.values()]), count, like)
        found.update({(place, key): one for key, one in zip(vectors, lists, strict=True)})
    return [[found[key] for key in one] for one in keys]


def _conditioned(request: Request, query: Query, lists: list[Found]) -> Conditioned:
    kept: Found = []
    factors = dict(request.weights)
    for share, found in zip(request.shares().values(), lists, strict=True):
        allowed = [pair for pair in found if pair[0].image_id not in request.exclude][: request.k]
        weighed = [(factors.get(one.image_id, 1.0) * share, one, vector) for one, vector in allowed]
        kept += [(replace(one, weight=weight), vector) for weight, one, vector in weighed if weight > 0]
    neighbors = tuple(one for one, _ in kept)
    dim = query.tokens.shape[1]
    vectors = np.stack([vector for _, vector in kept]) if kept else np.empty((0, dim), np.float32)
    try:
        context = make_context(request.mode, query.tokens, vectors)
    except ValueError as error:
        raise UserError(f"{error}: exclude fewer images, or weigh one above 0.") from error
    weights = np.ones(len(context), np.float32)
    weights[len(context) - len(neighbors) :] = [one.weight for one in neighbors]
    return Conditioned(request, neighbors, context, weights, query.pseudo_query)


def _listed(database: Database, queries: Vectors, count: int, like: str) -> list[Found]:
    """The best rows of a database for each query (n, dim)."""
    neighbors = database.search(queries, count, effort=database.effort(RECALL, like))
    results = []
    for ids, similarities, vectors, table in zip(
        neighbors.ids, neighbors.similarities, neighbors.embeddings, neighbors.rows, strict=True
    ):
        records = [
            Neighbor(
                int(id_), float(similarity), row["url"], row["caption"], database.name, 1.0, details(row)
            )
            for id_, similarity, row in zip(ids, similarities, table.to_pylist(), strict=True)
        ]
        results.append([*zip(records, vectors, strict=True)])
    return results


def details(row: dict[str, object]) -> dict[str, object]:
    """What a database keeps of an image beside its id, address and caption, without what it does not know."""
    return {name: value for name, value in row.items() if name not in SHOWN and value is not None}
