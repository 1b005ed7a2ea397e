"""The stage `database`: builds style databases from folders, tars or tables of pictures.

The names are imported on first use, because the encoder loads torch.
"""

from typing import TYPE_CHECKING

from retrieval.lazy import public_names

if TYPE_CHECKING:
    from pipeline.databases.database import run, run_all, style_databases
    from pipeline.databases.sources import PictureSource, SourcePicture, list_pictures

__all__ = ["PictureSource", "SourcePicture", "list_pictures", "run", "run_all", "style_databases"]

__getattr__ = public_names(
    __name__,
    {
        "PictureSource": "sources",
        "SourcePicture": "sources",
        "list_pictures": "sources",
        "run": "database",
        "run_all": "database",
        "style_databases": "database",
    },
)
