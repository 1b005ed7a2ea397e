"""Turns requests into cross-attention tokens: encodes queries, retrieves neighbors, weights them.

Each distinct prompt is encoded once, and each distinct query is searched once per database.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from retrieval.database.database import Database
from retrieval.errors import UserError
from retrieval.index.conditions import parse_complement
from retrieval.storage import schema
from trainer.model.context import Vectors, at_raw_norm, make_context, unit_rows
from trainer.model.recipe import ContextNorm
from trainer.sampling.request import Neighbor, Request

RECALL = 0.95
"""Recall of the searches for neighbors."""
MIN_MEAN = 1e-5
"""A shorter mean of unit vectors has no direction but that of rounding errors."""
MAIN_FIELDS = (schema.IMAGE_ID, "url", "caption", schema.NORM)
"""Columns of the metadata that are fields of Neighbor; the others are its details."""


@dataclass(frozen=True)
class ConditioningSources:
    """The encoder and the databases that conditioning reads."""

    encode: Callable[[list[str]], Vectors]
    """Encodes texts as rows at the length that CLIP gives."""
    database: Callable[[str], Database]
    """Opens a database by name."""
    pseudo_query: Callable[[int, float], tuple[int, Vectors]]
    """Draws (id, embedding) of an image of the training database. Arguments: seed and top_m."""
    context_norm: ContextNorm = "unit"
    """Length of the tokens that the model takes."""


@dataclass(frozen=True)
class ConditionedRequest:
    """A request with its neighbors and its context."""

    request: Request
    neighbors: tuple[Neighbor, ...]
    context: Vectors
    """(tokens, dim) rows at the length that the model takes."""
    weights: Vectors
    """(tokens,) above 0: weight of each token in attention."""
    pseudo_query: int | None = None
    negative: Vectors | None = None
    """(dim,) token of the negative prompt; None: without."""


@dataclass(frozen=True)
class Query:
    """The query of a request: searched for in databases, and part of the context."""

    tokens: Vectors
    """(q, dim): the text's embedding, then those of the images, at any length."""
    pseudo_query: int | None = None
    kind: str = "images"
    """Selects the calibration of the database: `texts` for a prompt without images, else `images`."""
    negative: Vectors | None = None
    """(dim,) embedding of the negative prompt, at any length."""

    @property
    def vector(self) -> Vectors:
        """(dim,) search vector: the normalized mean of the tokens. Raises UserError if the mean is zero."""
        mean = unit_rows(self.tokens).mean(axis=0)
        if np.linalg.norm(mean) < MIN_MEAN:
            raise UserError("prompt and images cancel out: their mean is zero. Change the prompt or remove an image.")
        return unit_rows(mean)


EmbeddedNeighbors = list[tuple[Neighbor, Vectors]]
"""Neighbors with their embeddings (dim,), best first."""
Search = tuple[str, int, str, str]
"""Name of a database, number of results, kind of the queries, condition of rows that are left out."""


def condition(requests: Sequence[Request], sources: ConditioningSources) -> list[ConditionedRequest]:
    """Neighbors and context of each request, in order. Raises UserError for an empty context."""
    queries = make_queries(requests, sources)
    results = _search_all(requests, queries, sources)
    rows = zip(requests, queries, results, strict=True)
    return [_conditioned(*row, sources.context_norm) for row in rows]


def make_queries(requests: Sequence[Request], sources: ConditioningSources) -> list[Query]:
    """The query of each request."""
    prompts = sorted({text for request in requests for text in (request.prompt, request.negative_prompt) if text})
    texts = dict(zip(prompts, sources.encode(prompts), strict=True)) if prompts else {}
    queries = []
    for request in requests:
        negative = texts.get(request.negative_prompt)
        if request.mode == "unconditional":
            image_id, vector = sources.pseudo_query(request.seed, request.top_m)
            queries.append(Query(vector[None], image_id, negative=negative))
            continue
        text = [texts[request.prompt]] if request.prompt else []
        tokens = np.stack([*text, *(image.embedding for image in request.images)])
        queries.append(Query(tokens, kind="images" if request.images else "texts", negative=negative))
    return queries


def _search_all(
    requests: Sequence[Request], queries: Sequence[Query], sources: ConditioningSources
) -> list[list[EmbeddedNeighbors]]:
    """Neighbors of each request from each of its databases: k plus the number of excluded ids."""
    vectors: dict[Search, dict[bytes, Vectors]] = {}
    keys = []
    for request, query in zip(requests, queries, strict=True):
        count, vector = request.k + len(request.exclude), query.vector
        searches = [(name, count, query.kind, request.without) for name in request.database_weights()]
        keys.append([(search, vector.tobytes()) for search in searches])
        for search in searches:
            vectors.setdefault(search, {})[vector.tobytes()] = vector
    results = {}
    for search in sorted(vectors):
        distinct = np.stack([*vectors[search].values()])
        neighbors = _search(sources.database(search[0]), distinct, search, sources.context_norm)
        results.update({(search, key): row for key, row in zip(vectors[search], neighbors, strict=True)})
    return [[results[key] for key in of_request] for of_request in keys]


def _conditioned(
    request: Request, query: Query, results: list[EmbeddedNeighbors], norm: ContextNorm
) -> ConditionedRequest:
    """Weights the k best neighbors of each database and builds the context."""
    selected: EmbeddedNeighbors = []
    factors = dict(request.weights)
    for share, candidates in zip(request.database_weights().values(), results, strict=True):
        allowed = [pair for pair in candidates if pair[0].image_id not in request.exclude]
        for neighbor, vector in allowed[: request.k]:
            weight = factors.get(neighbor.image_id, 1.0) * share * request.neighbor_weight
            if weight > 0:
                selected.append((replace(neighbor, weight=weight), vector))
    neighbors = tuple(neighbor for neighbor, _ in selected)
    dim = query.tokens.shape[1]
    vectors = np.stack([vector for _, vector in selected]) if selected else np.empty((0, dim), np.float32)
    try:
        context = make_context(request.mode, query.tokens, vectors, norm)
    except ValueError as error:
        raise UserError(f"{error}: exclude fewer images, or set a weight above 0.") from error
    weights = np.ones(len(context), np.float32)
    weights[len(context) - len(neighbors) :] = [neighbor.weight for neighbor in neighbors]
    negative = query.negative if query.negative is None or norm == "raw" else unit_rows(query.negative)
    return ConditionedRequest(request, neighbors, context, weights, query.pseudo_query, negative)


def _search(database: Database, queries: Vectors, search: Search, norm: ContextNorm) -> list[EmbeddedNeighbors]:
    """The most similar rows of a database for each query (n, dim), with vectors at the length that the model takes."""
    _, count, kind, without = search
    if without:
        database = database.where(without, parse_complement)
    results = database.search(queries, count, recall=RECALL, like=kind)
    embeddings = results.embeddings
    if norm == "raw":
        embeddings = at_raw_norm(embeddings, results.norms, f"database {database.name}")
    return [
        [
            (_neighbor(database.name, float(score), row), vector)
            for score, vector, row in zip(similarities, vectors, table.to_pylist(), strict=True)
        ]
        for similarities, vectors, table in zip(results.similarities, embeddings, results.rows, strict=True)
    ]


def _neighbor(database: str, similarity: float, row: dict[str, Any]) -> Neighbor:
    """row: the metadata of the image; unknown values are no details."""
    details = {name: value for name, value in row.items() if name not in MAIN_FIELDS and value is not None}
    return Neighbor(
        **{name: row[name] for name in MAIN_FIELDS}, similarity=similarity, database=database, details=details
    )


def neighbor_table(neighbors: Sequence[Neighbor], database: Database) -> pa.Table:
    """The metadata of neighbors from a database, in the columns of its `metadata_at`."""
    rows = [{name: getattr(each, name) for name in MAIN_FIELDS} | each.details for each in neighbors]
    return pa.Table.from_pylist(rows, database.metadata_at(np.empty(0, np.int64)).schema)
