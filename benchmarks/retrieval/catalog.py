"""The compared methods: index settings, search efforts, and the environment each runs in.

Holds data only, so that it can be read without the libraries of the other methods.
"""

import hashlib
import json
from dataclasses import dataclass, field
from itertools import product
from typing import Any

Effort = tuple[int, ...]


@dataclass(frozen=True)
class MethodSpec:
    """A method."""

    name: str
    label: str
    implementation: str
    """module:class of its adapter, which is constructed with the settings."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Settings of the index, and the version of the library."""
    efforts: tuple[Effort, ...] = ()
    """Search settings, from fast to slow; the adapter documents their meaning."""
    uses_bench_venv: bool = False
    """True if it runs in .venv-bench."""
    index: str = ""
    """Name of another method with the same index on disk; empty if it has its own."""

    @property
    def digest(self) -> str:
        """Part of the name of the index on disk."""
        key = json.dumps([self.implementation, self.settings], sort_keys=True)
        return hashlib.sha256(key.encode()).hexdigest()[:8]


def _grid(*axes: tuple[int, ...]) -> tuple[Effort, ...]:
    return tuple(product(*axes))


FAISS = "1.15.1"
RABITQLIB = "0.7.1"
PROBED_LISTS = (4, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64, 96, 128, 192, 256, 384)
CANDIDATE_FACTORS = (2, 3, 4, 6, 8)
GRAPH_EFFORTS = (20, 24, 32, 40, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
LISTS_PER_PARTITION = (6, 8, 10, 12, 14, 16, 20, 24, 32, 48, 56, 64, 80, 96, 128, 192, 256, 384)
CANDIDATES_PER_RESULT = (3, 4, 6, 8, 12, 16)


def _faiss_ivf(name: str, label: str, key: str, factors: tuple[int, ...] = ()) -> MethodSpec:
    efforts = _grid(PROBED_LISTS, factors) if factors else _grid(PROBED_LISTS)
    settings = {"key": key, "lists": 4096, "version": FAISS}
    return MethodSpec(name, label, "benchmarks.retrieval.adapters.faiss_ivf:FaissIvf", settings, efforts)


def _rabitqlib(name: str, label: str, kind: str, bits: int, factors: tuple[int, ...] = ()) -> MethodSpec:
    efforts = _grid(GRAPH_EFFORTS, factors) if factors else _grid(GRAPH_EFFORTS)
    settings = {"links": 16 if kind == "Hnsw" else 32, "construction": 200, "bits": bits, "version": RABITQLIB}
    return MethodSpec(name, label, f"benchmarks.retrieval.adapters.rabitq:{kind}", settings, efforts, True)


SCANN = MethodSpec(
    "scann",
    "ScaNN (tree, SOAR, AH, reorder)",
    "benchmarks.retrieval.adapters.other_libraries:Scann",
    {"leaves": 2000, "version": "1.4.2"},
    _grid((6, 8, 10, 12, 14, 16, 20, 24, 32, 48, 64, 96, 128, 192, 256, 384), (20, 30, 40, 50, 75, 100)),
    uses_bench_venv=True,
)
DATABASE = MethodSpec(
    "database",
    "Database.search (ours)",
    "benchmarks.retrieval.adapters.our_database:OurDatabase",
    {"schema": 7},
    _grid((1,), LISTS_PER_PARTITION, CANDIDATES_PER_RESULT),
)
BARE = MethodSpec(
    "bare",
    "its faiss call (ours)",
    "benchmarks.retrieval.adapters.our_database:BareIndex",
    {"schema": 7},
    DATABASE.efforts,
    index="database",
)
CLUSTER = MethodSpec(
    "cluster",
    "on Ray (ours)",
    "benchmarks.retrieval.adapters.our_cluster:OurCluster",
    {"schema": 7},
    DATABASE.efforts,
    index="database",
)
BRUTE = MethodSpec(
    "brute", "brute force (faiss Flat)", "benchmarks.retrieval.adapters.faiss_ivf:BruteForce", {}, ((0,),)
)
AUTOFAISS = MethodSpec(
    "autofaiss",
    "autofaiss's default",
    "benchmarks.retrieval.adapters.faiss_graphs:Autofaiss",
    {"version": "2.18.0"},
    ((0,),),
)
IVF_FLAT = _faiss_ivf("ivf-flat", "faiss IVF4096,Flat", "Flat")
FAST_SCAN = _faiss_ivf("fast-scan", "faiss IVF4096,PQ384x4fsr + refine", "PQ384x4fsr", CANDIDATE_FACTORS)

METHODS = (
    SCANN,
    DATABASE,
    BARE,
    IVF_FLAT,
    FAST_SCAN,
    _faiss_ivf("ivf-sqfp16", "faiss IVF4096,SQfp16", "SQfp16"),
    _faiss_ivf("ivf-sq8", "faiss IVF4096,SQ8 + refine", "SQ8", (2,)),
    _faiss_ivf("rabitq", "faiss IVF4096,RaBitQfs + refine", "RaBitQfs", (4, 6, 8, 12, 16, 24)),
    MethodSpec(
        "hnsw",
        "faiss HNSW32",
        "benchmarks.retrieval.adapters.faiss_graphs:FaissHnsw",
        {"links": 32, "construction": 40, "version": FAISS},
        _grid(GRAPH_EFFORTS),
    ),
    MethodSpec(
        "hnswlib",
        "hnswlib (M=16)",
        "benchmarks.retrieval.adapters.other_libraries:Hnswlib",
        {"links": 16, "construction": 200, "version": "0.8.0"},
        _grid(GRAPH_EFFORTS),
        uses_bench_venv=True,
    ),
    MethodSpec(
        "usearch",
        "usearch (bf16)",
        "benchmarks.retrieval.adapters.other_libraries:Usearch",
        {"links": 16, "construction": 128, "version": "2.26.6"},
        _grid(GRAPH_EFFORTS),
        uses_bench_venv=True,
    ),
    MethodSpec(
        "hnsw-rabitq",
        "faiss HNSW32,RaBitQ4 + refine",
        "benchmarks.retrieval.adapters.faiss_graphs:FaissHnswRaBitQ",
        {"links": 32, "construction": 40, "bits": 4, "version": FAISS},
        _grid(GRAPH_EFFORTS, (2, 4)),
    ),
    MethodSpec(
        "panorama",
        "faiss HNSW32, Panorama",
        "benchmarks.retrieval.adapters.faiss_graphs:FaissPanorama",
        {"links": 32, "construction": 40, "levels": 8, "version": FAISS},
        _grid(GRAPH_EFFORTS),
    ),
    _rabitqlib("rabitqlib-hnsw", "rabitqlib HNSW, 4 bits + exact ranking", "Hnsw", bits=4, factors=(2, 3, 4)),
    _rabitqlib("rabitqlib-hnsw8", "rabitqlib HNSW, 8 bits", "Hnsw", bits=8),
    _rabitqlib("symphony", "rabitqlib SymphonyQG, 8 bits", "Symphony", bits=8),
    MethodSpec(
        "zvec",
        "zvec HNSW, 7 bits + refine",
        "benchmarks.retrieval.adapters.vector_stores:Zvec",
        {"links": 16, "construction": 200, "bits": 7, "version": "0.8.0"},
        _grid(GRAPH_EFFORTS),
        uses_bench_venv=True,
    ),
    AUTOFAISS,
    BRUTE,
)
NOT_MEASURED = {
    "NGT-QG (ngt 2.8.0)": "its wheel opens quantized graphs but cannot build them; this needs the command `qbg` of NGT"
}
"""Methods that belong into the comparison, with the reason for which they are not in it."""
BY_NAME = {method.name: method for method in (*METHODS, CLUSTER)}
