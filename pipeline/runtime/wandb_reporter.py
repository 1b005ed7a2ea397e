"""Weights & Biases metrics of a stage: one point a shard, if its recipe section names a project.

Writes `wandb/` in the working folder (or WANDB_DIR) and, unless WANDB_MODE=offline, to the W&B server. A
resumed stage continues its W&B run. Manifests are the record.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from pipeline.runtime.memory import GB
from pipeline.runtime.stage import Stage
from retrieval.config import WorkersConfig
from retrieval.errors import UserError
from retrieval.extras import import_wandb
from retrieval.storage.manifest import ShardRecord

ReportShard = Callable[[ShardRecord, int, int], None]
"""Takes the record of a finished shard, its worker's peak memory in bytes, and the number of shards done."""


@contextmanager
def wandb_reporter(stage: Stage) -> Iterator[ReportShard]:
    """Within the block, a function to call for each finished shard. Raises UserError without W&B."""
    project = stage.config.wandb if isinstance(stage.config, WorkersConfig) else ""
    if not project:
        yield lambda *_: None
        return
    wandb = import_wandb()
    try:
        run = wandb.init(
            project=project,
            name=stage.name,
            id=f"{stage.name.replace('/', '-')}-{stage.fingerprint}",
            resume="allow",
            config=stage.config.model_dump(mode="json"),
        )
    except wandb.errors.Error as error:
        raise UserError(
            f"{stage.name}: wandb = {project!r}, but Weights & Biases does not start: {error}."
            " Run 'wandb login', set WANDB_MODE=offline, or leave the section's wandb empty."
        ) from error
    with run:
        yield lambda record, peak, done: run.log(_metrics(record, peak, done))


def _metrics(record: ShardRecord, peak: int, done: int) -> dict[str, float]:
    part = record.shard.rpartition("/")[0] or "all"
    metrics = {f"{part}/rows": record.rows, f"{part}/seconds": record.seconds}
    if record.seconds:
        metrics[f"{part}/rows_per_s"] = record.rows / record.seconds
    not_kept = {f"{part}/not_kept/{reason}": count for reason, count in record.reasons.items()}
    return metrics | not_kept | {"worker_peak_gb": peak / GB, "shards_done": done}
