"""Runtime: what a stage is, how its shards run on Ray workers, its metrics and its progress."""

from typing import TYPE_CHECKING

from retrieval.lazy import public_names

if TYPE_CHECKING:
    from pipeline.runtime.runner import ShardError, Workers, run_shards
    from pipeline.runtime.stage import Stage

__getattr__ = public_names(__name__, {"runner": "ShardError Workers run_shards", "stage": "Stage"})
