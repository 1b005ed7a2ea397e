"""Records of a run: metrics files, TensorBoard, Weights & Biases, and utilization of the devices."""

from typing import TYPE_CHECKING

from retrieval.lazy import public_names

if TYPE_CHECKING:
    from trainer.tracking.flops import training_flops
    from trainer.tracking.training_log import StepMetrics, TrainingLog, read_step_metrics

__all__ = ["StepMetrics", "TrainingLog", "read_step_metrics", "training_flops"]

__getattr__ = public_names(
    __name__,
    {
        "StepMetrics": "training_log",
        "TrainingLog": "training_log",
        "read_step_metrics": "training_log",
        "training_flops": "flops",
    },
)
