"""Checkpoints that any number of ranks can load, and the export of finished runs."""

from typing import TYPE_CHECKING

from retrieval.lazy import public_names

if TYPE_CHECKING:
    from trainer.checkpoint.checkpoint import CheckpointFolder
    from trainer.checkpoint.export import FinishedRun, publish_run, read_model_weights

__getattr__ = public_names(__name__)
