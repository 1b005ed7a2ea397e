"""Libraries that building and searching databases do not need, and the installation extra of each."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module, metadata
from typing import Any

from retrieval.errors import UserError

LIBRARIES = {
    "clip": ("open_clip", "safetensors", "torch", "torchvision"),
    "pipeline": ("autofaiss", "cv2", "idna", "prometheus_client", "ray"),
    "train": ("deepspeed", "diffusers", "jinja2", "matplotlib", "tensorboard"),
    "page": ("fastapi", "gradio", "uvicorn"),
    "s3": ("s3fs",),
    "c2pa": ("c2pa", "cryptography"),
}


FAISS_WHEELS = ("faiss-cpu", "faiss-gpu", "faiss-gpu-cu11", "faiss-gpu-cu12", "faiss-gpu-cuvs")
"""Distributions with files in the same folder `faiss/`."""


@cache
def check_faiss() -> None:
    """Raises UserError if several distributions of faiss are installed: the last one overwrote files of the others."""
    installed = [name for name in FAISS_WHEELS if any(metadata.distributions(name=name))]
    if len(installed) > 1:
        raise UserError(
            f"{' and '.join(installed)} are installed, which write to one folder, so faiss is a mixture of them. "
            f"Remove all, then install one: pip uninstall -y {' '.join(installed)}; pip install 'faiss-cpu>=1.15'. "
            "Joins and k-means use a GPU through torch and need no faiss-gpu."
        )


@contextmanager
def extras_named() -> Iterator[None]:
    """Turns an ImportError for a library that is not installed into a UserError that names its extra."""
    try:
        yield
    except ImportError as error:
        # fsspec raises its own ImportError from that of the missing library.
        library = (error.name or getattr(error.__cause__, "name", None) or "").partition(".")[0]
        if "faiss" in library:
            check_faiss()
        extra = next((extra for extra, libraries in LIBRARIES.items() if library in libraries), None)
        if extra is None:
            raise
        raise UserError(
            f"{library} is not installed. This needs the extra {extra!r}: pip install 'laion-rdm[{extra}]'"
        ) from error


def import_wandb() -> Any:
    """The module `wandb`. Raises UserError if it is not installed: it is part of no extra."""
    try:
        return import_module("wandb")
    except ModuleNotFoundError as error:
        raise UserError(
            f"the recipe sets wandb, but the package {error.name} is not installed. Run 'pip install wandb', or take "
            "the setting out."
        ) from error
