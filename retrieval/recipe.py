"""The settings of retrieval: sections `clip` and `index` of a recipe, and what a join is asked for.

Nothing that computes is imported here: who reads or checks settings need not wait for torch and faiss.
"""

import math
import re

from pydantic import Field, field_validator

from retrieval.config import Config, WorkersConfig, speed

MIN_LIST_ROWS = 1_000
"""Below so many rows there are too few to train lists and codes on."""


class ClipConfig(Config):
    """Which CLIP model to load (section `clip` of a recipe)."""

    model: str
    """open_clip's name (`ViT-L-14-quickgelu`), or `local-dir:<folder>` with open_clip's own layout."""
    pretrained: str = ""
    """open_clip's tag (`openai`) or a checkpoint path; empty for `local-dir:`, which holds its weights."""


class IndexConfig(WorkersConfig):
    """How rows are partitioned and indexed (section `index` of a recipe)."""

    rows_per_partition: int = Field(1_000_000, ge=1)
    """Wanted rows per partition; the number of partitions follows from it."""
    index_key: str = ""
    """Key of the index that autofaiss builds for every partition, such as Flat, HNSW32 or IVF4096,Flat;
    empty: Flat up to flat_rows, then inverted lists of 4-bit codes (retrieval.index.inverted_lists)."""
    flat_rows: int = Field(50_000, ge=MIN_LIST_ROWS)
    """Up to this many rows an exhaustive index answers within milliseconds and needs no tuning."""
    centroid_sample_rows: int = Field(1_000_000, ge=1)
    """Most rows that the partition centroids are trained on; stage `index` samples at most 64 shards."""
    num_queries: int = Field(1_000, ge=1)
    """Rows that stand for queries when recall is measured, without themselves among the neighbors."""
    seed: int = 0
    """Seed of the sample, the centroids, the order of rows within a partition and the queries."""
    cores_per_partition: int = speed(1, ge=1)
    """Threads that build one partition's index."""

    @field_validator("index_key")
    @classmethod
    def _buildable(cls, key: str) -> str:
        # faiss 1.14.2 renamed an argument of OPQMatrix that autofaiss 2.18 passes by its old name.
        if key and not re.fullmatch(r"Flat|HNSW\d+|IVF\d+,Flat", key):
            import faiss  # its version alone, for who is refused

            raise ValueError(
                f"autofaiss cannot build {key!r} for inner products with faiss {faiss.__version__}. Leave "
                "index_key empty (it is quicker and finds more), or name Flat, HNSW<n> or IVF<n>,Flat"
            )
        return key

    def num_partitions(self, rows: int) -> int:
        """Partitions for so many rows."""
        return max(1, math.ceil(rows / self.rows_per_partition))

    def has_lists(self, rows: int) -> bool:
        """Whether a partition of so many rows gets inverted lists instead of an autofaiss index."""
        return not self.index_key and rows > self.flat_rows


class JoinConfig(Config):
    """What a join looks for and how hard."""

    k: int
    """Neighbors for each query."""
    near_copy_similarity: float
    """Rows at least this similar to the query are copies of it and left out, in [-1, 1]; 2 keeps all."""
    partitions_per_query: int
    """Partitions a query visits; 0 visits all."""
    lists_per_partition: int = 0
    """Inverted lists it visits in each; 0 compares all its rows, in float32."""
    query_block: int = speed(2048, ge=1)
    """Queries compared at once with all rows, in float32."""
    row_block: int = speed(32768, ge=1)
    """Database rows compared at once; query_block x row_block similarities of 4 bytes are held."""
