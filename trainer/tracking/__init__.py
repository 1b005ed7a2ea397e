"""Records of a run: metrics files, TensorBoard, Weights & Biases, and utilization of the devices."""

from typing import TYPE_CHECKING

from retrieval.lazy import public_names

if TYPE_CHECKING:
    from trainer.tracking.flops import training_flops
    from trainer.tracking.training_log import StepMetrics, TrainingLog, read_step_metrics

__getattr__ = public_names(__name__)
