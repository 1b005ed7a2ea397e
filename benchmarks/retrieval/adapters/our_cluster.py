"""Our engine through Ray: one local node, one actor that computes on both CPUs."""

from pathlib import Path

import numpy as np

from benchmarks.retrieval.adapters.adapter import Search
from benchmarks.retrieval.adapters.ours import OurDatabase
from retrieval.cluster.cluster import Cluster
from retrieval.index.effort import Effort
from retrieval.storage import schema


class ThroughRay(OurDatabase):
    """`Cluster.search`. Effort as `Database.search`."""

    def open(self, folder: Path, rows: np.ndarray) -> None:
        """Start Ray and the actor."""
        super().open(folder, rows)
        self._cluster = Cluster.open(self.database, actors=1, cpus_per_actor=2.0)

    def searcher(self, k: int, effort: tuple[int, ...]) -> Search:
        """The image ids of the Arrow table that comes back."""
        wanted = Effort(*effort)

        def search(queries: np.ndarray) -> np.ndarray:
            table = self._cluster.search(queries, k, effort=wanted)
            return table[schema.IMAGE_ID].to_numpy().reshape(len(queries), k)

        return search

    def close(self) -> None:
        """End the actor and Ray."""
        self._cluster.close()
