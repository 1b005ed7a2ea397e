"""What a stage tells Weights & Biases, where its section of the recipe names a project: a point a shard.

Writes `wandb/` in the working folder (WANDB_DIR says otherwise) and, unless WANDB_MODE=offline, to its
server. A stage that goes on does so in the same run of W&B. The record are the manifests.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from pipeline.runtime.memory import GB
from pipeline.runtime.stage import Stage
from retrieval.config import WorkersConfig
from retrieval.errors import UserError
from retrieval.storage.manifest import ShardRecord

Tell = Callable[[ShardRecord, int, int], None]
"""Takes a shard that was made, the bytes that its worker held at most, and how many shards are done."""


@contextmanager
def curves(stage: Stage) -> Iterator[Tell]:
    """What to call for each shard within the block. Raises UserError where W&B cannot start."""
    project = stage.config.wandb if isinstance(stage.config, WorkersConfig) else ""
    if not project:
        yield lambda *_: None
        return
    import wandb

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
        yield lambda record, peak, done: run.log(_values(record, peak, done))


def _values(record: ShardRecord, peak: int, done: int) -> dict[str, float]:
    part = record.shard.rpartition("/")[0] or "all"
    values = {f"{part}/rows": record.rows, f"{part}/seconds": record.seconds}
    if record.seconds:
        values[f"{part}/rows_per_s"] = record.rows / record.seconds
    not_kept = {f"{part}/not_kept/{reason}": count for reason, count in record.reasons.items()}
    return values | not_kept | {"worker_peak_gb": peak / GB, "shards_done": done}
