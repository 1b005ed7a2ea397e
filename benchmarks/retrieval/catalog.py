"""Everything that is compared: how it is built, how hard it can try, and which environment it runs in.

Holds data only, so that the parent can read it where the rivals' libraries are not installed.
"""

import hashlib
import json
from dataclasses import dataclass, field
from itertools import product
from typing import Any

Effort = tuple[int, ...]


@dataclass(frozen=True)
class Entry:
    """One method."""

    name: str
    label: str
    implementation: str
    """module:class, made with the settings."""
    settings: dict[str, Any] = field(default_factory=dict)
    """What the index depends on, versions included."""
    efforts: tuple[Effort, ...] = ()
    """From cheap to dear; what the numbers mean is the implementation's."""
    bench: bool = False
    """Whether it runs in .venv-bench."""
    index: str = ""
    """Name of the entry whose index on disk it opens, its own if empty."""

    @property
    def digest(self) -> str:
        """Names the index on disk."""
        key = json.dumps([self.implementation, self.settings], sort_keys=True)
        return hashlib.sha256(key.encode()).hexdigest()[:8]


def _grid(*axes: tuple[int, ...]) -> tuple[Effort, ...]:
    return tuple(product(*axes))


FAISS = "1.15.1"
PROBES = (4, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64, 96, 128)
FACTORS = (2, 3, 4, 6, 8)
SEARCHED = (20, 24, 32, 40, 48, 64, 96, 128, 192, 256, 384)
LISTS = (6, 8, 10, 12, 14, 16, 20, 24, 32, 48, 56, 64, 80, 96)
CANDIDATES = (3, 4, 6, 8, 12, 16)


def _lists(name: str, label: str, key: str, factors: tuple[int, ...] = ()) -> Entry:
    efforts = _grid(PROBES, factors) if factors else _grid(PROBES)
    settings = {"key": key, "lists": 4096, "version": FAISS}
    return Entry(name, label, "benchmarks.retrieval.adapters.inverted:Inverted", settings, efforts)


SCANN = Entry(
    "scann",
    "ScaNN (tree, SOAR, AH, reorder)",
    "benchmarks.retrieval.adapters.rivals:Scann",
    {"leaves": 2000, "version": "1.4.2"},
    _grid((6, 8, 10, 12, 14, 16, 20, 24, 32, 48, 64, 96), (40, 60, 80, 100, 150, 200)),
    bench=True,
)
DATABASE = Entry(
    "database",
    "Database.search (ours)",
    "benchmarks.retrieval.adapters.ours:OurDatabase",
    {"schema": 2},
    _grid((1,), LISTS, CANDIDATES),
)
BARE = Entry(
    "bare",
    "the faiss call under it (ours)",
    "benchmarks.retrieval.adapters.ours:BareIndex",
    {"schema": 2},
    DATABASE.efforts,
    index="database",
)
CLUSTER = Entry(
    "cluster",
    "through Ray (ours)",
    "benchmarks.retrieval.adapters.through_ray:ThroughRay",
    {"schema": 2},
    DATABASE.efforts,
    index="database",
)
BRUTE = Entry(
    "brute", "brute force (faiss Flat)", "benchmarks.retrieval.adapters.inverted:BruteForce", {}, ((0,),)
)
AUTOFAISS = Entry(
    "autofaiss",
    "autofaiss's default",
    "benchmarks.retrieval.adapters.graphs:Autofaiss",
    {"version": "2.18.0"},
    ((0,),),
)
IVF_FLAT = _lists("ivf-flat", "faiss IVF4096,Flat", "Flat")
FAST_SCAN = _lists("fast-scan", "faiss IVF4096,PQ384x4fsr + refine", "PQ384x4fsr", FACTORS)

ENTRIES = (
    SCANN,
    DATABASE,
    BARE,
    IVF_FLAT,
    FAST_SCAN,
    _lists("ivf-sqfp16", "faiss IVF4096,SQfp16", "SQfp16"),
    _lists("ivf-sq8", "faiss IVF4096,SQ8 + refine", "SQ8", (2,)),
    _lists("rabitq", "faiss IVF4096,RaBitQfs + refine", "RaBitQfs", (4, 6, 8, 12, 16, 24)),
    Entry(
        "hnsw",
        "faiss HNSW32",
        "benchmarks.retrieval.adapters.graphs:FaissHnsw",
        {"links": 32, "construction": 40, "version": FAISS},
        _grid(SEARCHED),
    ),
    Entry(
        "hnswlib",
        "hnswlib (M=16)",
        "benchmarks.retrieval.adapters.rivals:Hnswlib",
        {"links": 16, "construction": 200, "version": "0.8.0"},
        _grid(SEARCHED),
        bench=True,
    ),
    Entry(
        "usearch",
        "usearch (bf16)",
        "benchmarks.retrieval.adapters.rivals:Usearch",
        {"links": 16, "construction": 128, "version": "2.20.9"},
        _grid(SEARCHED),
        bench=True,
    ),
    AUTOFAISS,
    BRUTE,
)
BY_NAME = {entry.name: entry for entry in (*ENTRIES, CLUSTER)}
