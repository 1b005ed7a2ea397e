"""Sampling of pictures with a trained model and databases: `Sampler`, requests, and the stage `sample`."""

from typing import TYPE_CHECKING

from retrieval.lazy import public_names

if TYPE_CHECKING:
    from trainer.sampling.recipe import ComputeConfig, SampleConfig
    from trainer.sampling.request import ImageQuery, Neighbor, Request, Sample
    from trainer.sampling.sampler import Sampler, TrainedModel

__getattr__ = public_names(__name__)
