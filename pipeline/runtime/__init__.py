"""Runtime: what a stage is, how its shards run on Ray workers, its metrics and its progress."""

from typing import TYPE_CHECKING

from retrieval.lazy import public_names

if TYPE_CHECKING:
    from pipeline.runtime.pool import ShardError
    from pipeline.runtime.runner import run_shards
    from pipeline.runtime.stage import Stage
    from pipeline.runtime.workers import Workers

__getattr__ = public_names(__name__)
