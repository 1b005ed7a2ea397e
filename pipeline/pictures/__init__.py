"""Pictures: decoding and encoding, patches, copies of training images, and WebDataset tars.

The names are imported on first use, because their modules load Pillow and OpenCV.
"""

from typing import TYPE_CHECKING

from retrieval.lazy import public_names

if TYPE_CHECKING:
    from pipeline.pictures.picture import Picture, PictureError, encode_jpeg, prepare
    from pipeline.pictures.tars import sample_key, tar_writer

__getattr__ = public_names(
    __name__,
    dict.fromkeys(("Picture", "PictureError", "encode_jpeg", "prepare"), "picture")
    | dict.fromkeys(("sample_key", "tar_writer"), "tars"),
)
