"""The stage `database`: builds style databases from folders, tars or tables of pictures."""

from typing import TYPE_CHECKING

from retrieval.lazy import public_names

if TYPE_CHECKING:
    from pipeline.databases.build import run, run_all
    from pipeline.databases.sources import PictureSource

__getattr__ = public_names(__name__)
