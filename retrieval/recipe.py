"""Settings: the sections `clip`, `index`, `storage` and `embed.heads` of a recipe, and the parameters of a join.

Loads no torch, no faiss.
"""

import math
import re
from typing import Literal

from pydantic import Field, field_validator

from retrieval.config import Config, WorkersConfig, added_setting, runtime_setting

MIN_LIST_ROWS = 1_000
"""Fewest rows on which inverted lists and their codes can be trained."""
BUILDABLE = r"|Flat|HNSW\d+|(\w+,)?IVF\d+,\w+|(Pad\d+|OPQ\d+_\d+),IVF\d+_HNSW\d+,PQ\w+"
"""Keys that autofaiss builds. With HNSW<n> and lists in other forms it divides by zero."""


Precision = Literal["bf16", "fp32"]
"""Of matrix products on a device."""


class ClipConfig(Config):
    """The CLIP model (section `clip` of a recipe)."""

    model: str
    """open_clip's name (`ViT-L-14-quickgelu`), or `local-dir:<folder>` for a folder in open_clip's layout."""
    pretrained: str = ""
    """open_clip's tag (`openai`) or a checkpoint path; empty for `local-dir:`, which includes its weights."""


class HeadConfig(Config):
    """A network that gives pictures a score from their CLIP vectors (section `embed.heads.<name>` of a recipe)."""

    file: str = Field(min_length=1)
    """Path or URL of its weights: the state dict of linear layers, as `.safetensors` or as a torch file."""
    activation: Literal["relu", "none"]
    """Between the layers."""
    output: Literal["sigmoid", "none"]
    """Function of the last layer's output that gives the score."""
    max_score: float | None = None
    """Pictures with a higher score are left out as `high_score`. Without it, none."""
    min_score: float | None = None
    """Pictures with a lower score are left out as `low_score`. Without it, none."""


class IndexConfig(WorkersConfig):
    """How rows are partitioned and indexed (section `index` of a recipe)."""

    rows_per_partition: int = Field(1_000_000, ge=1)
    """Average rows per partition; determines the number of partitions."""
    index_key: str = ""
    """Index that autofaiss builds for every partition, by faiss's key: HNSW<n>, keys with IVF<n> such as
    `Pad768,IVF4096_HNSW32,PQ384x4fsr`, or Flat for none. Empty: none up to flat_rows, then inverted lists of 4-bit
    codes (retrieval.index.inverted_lists)."""
    flat_rows: int = Field(10_000, ge=MIN_LIST_ROWS)
    """Partitions of at most this many rows are searched exhaustively: 1.4 ms a query at 10,000 rows of 768 dimensions,
    0.16 ms in lists, whose build and calibration take 20 CPU-seconds more."""
    store: Literal["float16", "int8"] = added_setting("float16")
    """Numbers of the stored vectors. int8 halves their bytes on disk and in memory, 256 steps a dimension; results are
    ranked by the rounded vectors, and faiss searches the lists instead of the compiled library
    (docs/guides/searching.md)."""
    num_queries: int = Field(1_000, ge=1)
    """Rows used as queries to measure recall. A row is not its own neighbor."""
    seed: int = Field(0, ge=0)
    """Seed of the sample, the centroids, the order of rows in a partition and the queries."""
    cores_per_partition: int = runtime_setting(1, ge=1)
    """Threads that build one partition's index."""

    @field_validator("index_key")
    @classmethod
    def _buildable(cls, key: str) -> str:
        if not re.fullmatch(BUILDABLE, key):
            raise ValueError(
                f"autofaiss cannot build {key!r} for a database. Leave index_key empty, or use Flat, HNSW<n> or a key "
                "with IVF<n>, such as IVF1024,Flat. A graph over the lists needs Pad<n> or OPQ<n>_<n> before and PQ<n> "
                "after them: Pad768,IVF4096_HNSW32,PQ384x4fsr"
            )
        return key

    def num_partitions(self, rows: int) -> int:
        """The number of partitions of a database of `rows` rows."""
        return max(1, math.ceil(rows / self.rows_per_partition))

    def has_lists(self, rows: int) -> bool:
        """Whether a partition of `rows` rows gets inverted lists instead of an autofaiss index."""
        return not self.index_key and rows > self.flat_rows


class StorageConfig(Config):
    """Local copies of files of an object store (section `storage` of a recipe)."""

    cache_folder: str = runtime_setting("")
    """Folder on the local disk of each machine for copies of the files of databases, which all processes of the machine
    share. Empty: a folder beside other temporary files (TMPDIR)."""
    cache_gb: float = runtime_setting(0.0, ge=0, allow_inf_nan=False)
    """Largest size of these copies in GB; the least recently used ones are deleted first. 0: half of the free disk."""


class JoinConfig(Config):
    """Parameters of a join: neighbors, near copies, and search effort."""

    k: int
    """Neighbors of each query."""
    near_copy_similarity: float
    """Rows at least this similar to the query, in [-1, 1], are left out as near copies; 2 keeps all rows."""
    partitions_per_query: int
    """Partitions that a query visits; 0: all."""
    lists_per_partition: int = 0
    """Inverted lists that it visits at most in each partition; 0: compare all rows exactly, in float32."""
    query_block: int = runtime_setting(2048, ge=1)
    """Queries that an exact comparison takes at once."""
    row_block: int = runtime_setting(32768, ge=1)
    """Database rows that it takes at once. The block has query_block x row_block float32 values. A GPU also holds all
    rows of a partition in float16: 2 bytes x rows_per_partition x dimensions."""
