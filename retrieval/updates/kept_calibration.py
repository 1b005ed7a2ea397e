"""The calibration of an updated database: that of the database before, as long as the same index serves its rows.

Reads the opened databases before and after an update; returns values of the new manifest. A calibration that was
stored beside the earlier manifest is taken over, because it names the earlier database.
"""

from dataclasses import asdict, replace
from typing import Any

from retrieval.database.calibration import calibrate
from retrieval.database.database import Database
from retrieval.database.stored_calibration import was_recalibrated
from retrieval.index.effort import Effort, MeasuredEffort
from retrieval.recipe import IndexConfig

CHANGED_ROWS = "changed_rows"
"""Value of a manifest: rows that were added and deleted since the calibration for images."""
MAX_CHANGED_SHARE = 0.1
"""Share of changed rows up to which the recall was measured to stay within half a point: docs/grow.md."""


def kept_calibration(before: Database, after: Database, numbers: list[int]) -> dict[str, Any]:
    """The calibration and the changed rows. numbers: of the rewritten partitions.

    Images are calibrated again if the index of a partition became another one, such as lists in place of a comparison
    of all rows; the calibration for texts is then void.
    """
    if len(after) and _indexes(before, numbers) != _indexes(after, numbers):
        config = IndexConfig.model_validate(after.manifest.config)
        return {"calibration": {"images": calibrate(after, config.num_queries, config.seed)}, CHANGED_ROWS: 0}
    changed = abs(after.partition_rows - before.partition_rows)[numbers].sum()
    entries = {kind: [asdict(_updated(entry, after)) for entry in kept] for kind, kept in before.calibration.items()}
    return {"calibration": entries, CHANGED_ROWS: _changed_rows(before) + int(changed)}


def changed_share(database: Database) -> float:
    """Rows that were added and deleted since the calibration for images, as a share of all rows."""
    return _changed_rows(database) / max(len(database), 1)


def _changed_rows(database: Database) -> int:
    if was_recalibrated(database.root, database.manifest, "images"):
        return 0
    return int(database.manifest.values.get(CHANGED_ROWS, 0))


def _indexes(database: Database, numbers: list[int]) -> list[tuple[bool, int]]:
    """Of each partition: whether a search compares all rows, and the number of lists."""
    filled = [number for number in numbers if database.partition_rows[number]]
    return [(database.partitions[number].is_flat, database.partitions[number].num_lists) for number in filled]


def _updated(entry: MeasuredEffort, database: Database) -> MeasuredEffort:
    """An entry for the present number of rows: an effort that compares all rows names it."""
    if not entry.is_exact or database.is_exact:
        return entry
    rows = max(len(database), 1)
    return replace(entry, effort=Effort(len(database.partitions), rows, rows))
