"""Pictures: decodes files of any common format as upright 8-bit sRGB, within limits of pixels and memory."""

from typing import TYPE_CHECKING

from retrieval.lazy import public_names

if TYPE_CHECKING:
    from retrieval.pictures.decode import PictureError
    from retrieval.pictures.picture_file import read_picture

__getattr__ = public_names(__name__)
