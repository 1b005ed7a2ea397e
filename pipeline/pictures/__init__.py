"""Pictures: decoding and encoding, patches, copies of training images, and WebDataset tars."""

from typing import TYPE_CHECKING

from retrieval.lazy import public_names

if TYPE_CHECKING:
    from pipeline.pictures.picture import Picture, encode, prepare
    from pipeline.pictures.tars import tar_writer

__getattr__ = public_names(__name__)
