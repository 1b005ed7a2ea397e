"""Libraries that building and searching databases do not need, and the installation extra of each."""

from collections.abc import Iterator
from contextlib import contextmanager

from retrieval.errors import UserError

LIBRARIES = {
    "clip": ("open_clip", "safetensors", "torch", "torchvision"),
    "pipeline": ("autofaiss", "cv2", "idna", "prometheus_client", "ray"),
    "train": ("deepspeed", "diffusers", "jinja2", "matplotlib", "tensorboard"),
    "page": ("fastapi", "gradio", "uvicorn"),
    "s3": ("s3fs",),
    "c2pa": ("c2pa", "cryptography"),
}


@contextmanager
def extras_named() -> Iterator[None]:
    """Turns an ImportError for a library that is not installed into a UserError that names its extra."""
    try:
        yield
    except ImportError as error:
        # fsspec raises its own ImportError from that of the missing library.
        library = (error.name or getattr(error.__cause__, "name", None) or "").partition(".")[0]
        extra = next((extra for extra, libraries in LIBRARIES.items() if library in libraries), None)
        if extra is None:
            raise
        raise UserError(
            f"{library} is not installed. This needs the extra {extra!r}: pip install 'laion-rdm[{extra}]'"
        ) from error
