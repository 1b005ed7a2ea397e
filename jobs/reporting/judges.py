"""The judges of the evaluation in words, for reports and pages."""

from collections.abc import Mapping
from typing import Any


def gallery_words(descriptor: Mapping[str, Any]) -> str:
    """The real pictures that the style descriptor compares samples with. descriptor: from `completed` results.

    >>> gallery_words({"gallery_rows": 200})
    '200 real pictures that are in no database and did not train it'
    >>> gallery_words({"gallery_rows": None})
    'the real pictures that trained it, which are in no database'
    """
    rows = descriptor["gallery_rows"]
    if rows is None:
        return "the real pictures that trained it, which are in no database"
    return f"{rows:,} real pictures that are in no database and did not train it"
