"""DeepSpeed and the moving average of the weights; the training state as fragments of named parameters."""

from typing import TYPE_CHECKING

from retrieval.lazy import public_names

if TYPE_CHECKING:
    from trainer.engine.deepspeed_engine import Ranks, join_ranks, make_engine
    from trainer.engine.ema import MovingAverage

__getattr__ = public_names(__name__)
