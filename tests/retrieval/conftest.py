"""Vectors like CLIP's (clusters of unequal sizes) and databases made of them."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from retrieval import Database, Root, schema
from retrieval.build import Identity, IndexConfig, build_database
from retrieval.encoder_identity import EncoderIdentity
from retrieval.partition import Vectors, unit

DIM = 32
IDENTITY = EncoderIdentity(model="test", weights="0" * 16, preprocessing="{}", dim=DIM)


def clustered(rows: int, seed: int) -> Vectors:
    """(rows, DIM) unit rows around 12 centers that do not depend on the seed."""
    centers = np.random.default_rng(99).standard_normal((12, DIM))
    rng = np.random.default_rng(seed)
    chosen = np.minimum(rng.zipf(1.5, rows) - 1, 11)
    return unit(centers[chosen] + 0.5 * rng.standard_normal((rows, DIM)))


def table_of(vectors: Vectors) -> pa.Table:
    """schema.embeddings rows with ids 1000, 1001, ... for unit vectors."""
    count = len(vectors)
    columns = {
        schema.IMAGE_ID: np.arange(1000, 1000 + count),
        "url": [f"http://example.org/{i}.jpg" for i in range(count)],
        "caption": [f"picture {i}" for i in range(count)],
        "license": pa.nulls(count, pa.string()),
        "width": pa.array([224] * count, pa.int32()),
        "height": pa.array([300] * count, pa.int32()),
        schema.EMBEDDING: schema.fixed_lists(vectors.astype(np.float16)),
    }
    return pa.table(columns, schema=schema.embeddings(DIM))


@pytest.fixture
def build(tmp_path: Path) -> Callable[..., Database]:
    """Builds a database of vectors under tmp_path and opens it."""

    def made(vectors: Vectors, name: str = "databases/test", **settings: object) -> Database:
        root = Root(tmp_path)
        config = IndexConfig(**settings)
        build_database(root, table_of(vectors), IDENTITY, config, Identity(name, {"source": "test"}))
        return Database.open(root.child(name))

    return made


@pytest.fixture(scope="session")
def vectors() -> Vectors:
    """3,000 clustered vectors."""
    return clustered(3000, seed=1)


@pytest.fixture(scope="session")
def queries() -> Vectors:
    """50 vectors from the same clusters."""
    return clustered(50, seed=2)


def brute_force(vectors: Vectors, queries: Vectors, k: int) -> np.ndarray:
    """Row numbers of the k best float16 rows of each query, best first."""
    stored = unit(vectors).astype(np.float16).astype(np.float32)
    return np.argsort(-(queries @ stored.T), axis=1, kind="stable")[:, :k]
