"""Database: builds, opens, searches, calibrates and verifies databases of vectors."""

from typing import TYPE_CHECKING

from retrieval.lazy import public_names

if TYPE_CHECKING:
    from retrieval.database.build import DatabaseIdentity, write_database
    from retrieval.database.calibration import recalibrate
    from retrieval.database.database import Database, Neighbors
    from retrieval.database.verify import RecallSample, damaged_files, measure_recall

__getattr__ = public_names(__name__)
