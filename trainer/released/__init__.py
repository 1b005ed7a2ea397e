"""Import of CompVis checkpoints and diffusers folders as finished runs; export of a run as a diffusers folder."""

from typing import TYPE_CHECKING

from retrieval.lazy import public_names

if TYPE_CHECKING:
    from trainer.released.diffusers_folder import write_folder
    from trainer.released.import_run import import_model
    from trainer.released.pipeline import RetrievalDiffusionPipeline, Retriever

__getattr__ = public_names(__name__)
