"""Runtime: what a stage is, how its shards run on Ray workers, its metrics and its progress.

The names are imported on first use, because the runner loads Ray.
"""

from typing import TYPE_CHECKING

from retrieval.lazy import public_names

if TYPE_CHECKING:
    from pipeline.runtime.runner import ShardError, Work, Workers, run_shards
    from pipeline.runtime.stage import Stage
    from pipeline.runtime.status import StageSpec, Status, find_manifest, stage_status

__all__ = [
    "ShardError",
    "Stage",
    "StageSpec",
    "Status",
    "Work",
    "Workers",
    "find_manifest",
    "run_shards",
    "stage_status",
]

__getattr__ = public_names(
    __name__,
    {
        "ShardError": "runner",
        "Stage": "stage",
        "StageSpec": "status",
        "Status": "status",
        "Work": "runner",
        "Workers": "runner",
        "find_manifest": "status",
        "run_shards": "runner",
        "stage_status": "status",
    },
)
