"""Training data: latents, images, the order of samples, batches for each rank, and checks before a run starts."""

from typing import TYPE_CHECKING

from retrieval.lazy import public_names

if TYPE_CHECKING:
    from trainer.data.loader import Loader, TrainingBatch
    from trainer.data.plan import TrainingPlan, make_plan

__getattr__ = public_names(__name__)
