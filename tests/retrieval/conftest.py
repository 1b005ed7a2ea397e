"""Vectors like CLIP's (clusters of unequal sizes) and databases made of them."""

import ctypes
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import faiss
import numpy as np
import pyarrow as pa
import pytest
import torch

from retrieval import Database, Root
from retrieval.clip.identity import EncoderIdentity
from retrieval.database.build import DatabaseIdentity, write_database
from retrieval.index.routing import Vectors, unit
from retrieval.kernel.library import library
from retrieval.recipe import IndexConfig
from retrieval.storage import schema

DIM = 32
IDENTITY = EncoderIdentity(model="test", weights="0" * 16, preprocessing="{}", dim=DIM)


def clustered(rows: int, seed: int) -> Vectors:
    """(rows, DIM) unit rows around 12 centers that do not depend on the seed."""
    centers = np.random.default_rng(99).standard_normal((12, DIM))
    rng = np.random.default_rng(seed)
    chosen = np.minimum(rng.zipf(1.5, rows) - 1, 11)
    return unit(centers[chosen] + 0.5 * rng.standard_normal((rows, DIM)))


def around_one_direction(rows: int, seed: int) -> Vectors:
    """(rows, DIM) unit rows around one direction that does not depend on the seed."""
    direction = unit(np.random.default_rng(99).standard_normal(DIM))
    return unit(direction + 0.1 * np.random.default_rng(seed).standard_normal((rows, DIM)))


def along_few_directions(rows: int, seed: int, dim: int = 256, power: float = 0.5) -> Vectors:
    """(rows, dim) unit rows around one direction, with variances that fall as i ** (-2 power)."""
    rng = np.random.default_rng(99)
    basis, _ = np.linalg.qr(rng.standard_normal((dim, dim)))
    mean = 2 * rng.standard_normal(dim) / np.sqrt(dim)
    spread = np.arange(1, dim + 1) ** -power
    return unit(np.random.default_rng(seed).standard_normal((rows, dim)) * spread @ basis + mean)


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
        schema.NORM: pa.nulls(count, pa.float32()),
        schema.EMBEDDING: schema.fixed_lists(vectors.astype(np.float16)),
    }
    return pa.table(columns, schema=schema.embeddings(DIM))


def built(folder: Path, vectors: Vectors, name: str = "databases/test", **settings: object) -> Database:
    """Builds a database of vectors below a folder and opens it. Recall is measured with few queries."""
    root = Root(folder)
    config = IndexConfig(**{"num_queries": 50, **settings})
    write_database(root, table_of(vectors), IDENTITY, config, DatabaseIdentity(name, {"source": "test"}))
    return Database.open(root.child(name))


@pytest.fixture(scope="session")
def compiled_library() -> ctypes.CDLL:
    """The library of this machine. It is compiled when the first test needs it."""
    if (loaded := library()) is None:
        pytest.skip("no g++, or a processor without AVX2")
    return loaded


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """One thread multiplies such small matrices faster than several."""
    before = torch.get_num_threads(), faiss.omp_get_max_threads()
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    yield
    torch.set_num_threads(before[0])
    faiss.omp_set_num_threads(before[1])


@pytest.fixture
def build(tmp_path: Path) -> Callable[..., Database]:
    """Builds a database of vectors below tmp_path and opens it."""
    return partial(built, tmp_path)


@pytest.fixture(scope="session")
def vectors() -> Vectors:
    """3,000 clustered vectors."""
    return clustered(3000, seed=1)


@pytest.fixture(scope="session")
def queries() -> Vectors:
    """50 vectors from the same clusters."""
    return clustered(50, seed=2)


@pytest.fixture(scope="session")
def in_lists(tmp_path_factory: pytest.TempPathFactory, vectors: Vectors) -> Database:
    """The 3,000 vectors in one partition with inverted lists. No test may change it."""
    return built(tmp_path_factory.mktemp("lists"), vectors, flat_rows=1000)


@pytest.fixture(scope="session")
def in_partitions(tmp_path_factory: pytest.TempPathFactory, vectors: Vectors) -> Database:
    """The 3,000 vectors in six partitions without lists. No test may change it."""
    return built(tmp_path_factory.mktemp("partitions"), vectors, rows_per_partition=500)


@pytest.fixture(scope="session")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Database:
    """8,000 vectors in four partitions, large ones with inverted lists. No test may change it."""
    rows = clustered(8000, seed=1)
    return built(tmp_path_factory.mktemp("mixed"), rows, rows_per_partition=2000, flat_rows=1500)


def brute_force(vectors: Vectors, queries: Vectors, k: int) -> np.ndarray:
    """Row numbers of the k most similar float16 rows of each query, best first."""
    stored = unit(vectors).astype(np.float16).astype(np.float32)
    return np.argsort(-(queries @ stored.T), axis=1, kind="stable")[:, :k]


def share_found(true: np.ndarray, found: np.ndarray) -> float:
    """Mean share of the true rows of a query, (n, k), among the found ones, (n, m)."""
    return float(np.mean([np.isin(truth, rows).mean() for truth, rows in zip(true, found, strict=True)]))
