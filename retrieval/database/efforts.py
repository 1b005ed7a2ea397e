"""Chooses the effort of a search from the calibrations of a database, and warns where they do not cover the search."""

import math
import warnings
from dataclasses import replace

import numpy as np

from retrieval.errors import RecallWarning, UserError
from retrieval.index.effort import QUERY_KINDS, Effort, MeasuredEffort, choose_effort
from retrieval.index.routing import Numbers

MAX_EFFORTS = 256
"""Chosen efforts that are kept, one for each recall, kind of queries and k."""
SAFE_PARTITIONS, SAFE_CANDIDATES = 8, 4
"""A search for texts without a calibration visits this many times the partitions and candidates of one for images."""
FEW_ROWS = 10_000
"""So many rows are compared within milliseconds, without a warning."""


class Efforts:
    """The efforts of one database. Safe to share between threads."""

    def __init__(
        self,
        url: str,
        calibration: dict[str, list[MeasuredEffort]],
        rows: Numbers,
        hidden_rows: Numbers,
        warned: set[str],
    ) -> None:
        """url: for messages. rows, hidden_rows: in each partition. warned: messages that were shown already."""
        self._url = url
        self._calibration = calibration
        self._rows = rows
        self._hidden_rows = hidden_rows
        self._warned = warned
        self._efforts: dict[tuple[float, str, int], Effort] = {}

    def effort(self, recall: float, like: str, k: int) -> Effort:
        """The cheapest effort that reached a recall of k neighbors. k: at most the number of rows.

        Hidden rows raise the number of partitions; their effect on lists and candidates is found while searching.
        Without a calibration for texts: all lists of SAFE_PARTITIONS times the partitions of images and
        SAFE_CANDIDATES times the candidates.
        """
        effort = self._efforts.get((recall, like, k))
        if effort is None:
            if like not in QUERY_KINDS:
                raise UserError(f"like must be one of {', '.join(QUERY_KINDS)}, got {like!r}")
            effort = self._choose(recall, like, k)
            if len(self._efforts) >= MAX_EFFORTS:
                self._efforts.clear()
            self._efforts[recall, like, k] = effort
        return effort

    def _choose(self, recall: float, like: str, k: int) -> Effort:
        entries = self._calibration[like if like in self._calibration else "images"]
        chosen = choose_effort(entries, recall, k)
        if chosen.is_exact and chosen.effort.lists_per_partition == 1:
            return chosen.effort
        effort = replace(chosen.effort, partitions_per_query=self._visited_partitions(entries, recall, k))
        if like not in self._calibration:
            return self._safe(effort)
        if chosen.is_exact and self._rows.sum() > FEW_ROWS:
            self._warn(
                f"no index setting reached recall {recall} for {k} neighbors of {like} (measured: up to {chosen.best}, "
                "the lower end of an interval). All rows are compared, which is slow. Ask for a lower recall, or "
                "calibrate with more queries."
            )
        elif chosen.max_k < min(k, self._rows.sum() - 1) and not chosen.is_exact:
            self._warn(
                f"recall was measured for 1 to {chosen.max_k} neighbors. For {k} the effort is "
                f"{math.ceil(k / chosen.max_k)} times that of {chosen.max_k}, and the recall may differ from {recall}."
            )
        return effort

    def _safe(self, effort: Effort) -> Effort:
        """The effort of a search for texts without a calibration. effort: of a search for images."""
        rows, partitions = int(self._rows.sum()), min(SAFE_PARTITIONS * effort.partitions_per_query, len(self._rows))
        self._warn(
            f"no calibration for texts: a search for texts visits all lists of {partitions} of {len(self._rows)} "
            "partitions, which is slow, and its recall was not measured. Measure it with vectors of typical texts: "
            "laion-rdm calibrate DB --like texts --queries FILE.npy"
        )
        return Effort(partitions, rows, min(rows, SAFE_CANDIDATES * effort.candidates_per_result))

    def _visited_partitions(self, entries: list[MeasuredEffort], recall: float, k: int) -> int:
        """Partitions of a search for k visible rows: those for the k plus the hidden rows that can lie before them.

        These are at most the hidden rows of as many partitions. Beyond the largest measured k they count only by
        their share of the database.
        """
        chosen = choose_effort(entries, recall, k)
        partitions = chosen.effort.partitions_per_query
        if num_hidden := int(self._hidden_rows.sum()):
            in_way = int(np.sort(self._hidden_rows)[-partitions:].sum())
            rows = int(self._rows.sum())
            by_share = min(math.ceil(k * rows / max(1, rows - num_hidden)), rows)
            needed = max(min(k + in_way, chosen.max_k), by_share)
            partitions = choose_effort(entries, recall, needed).effort.partitions_per_query
        return min(partitions, len(self._rows))

    def _warn(self, reason: str) -> None:
        if reason not in self._warned:
            self._warned.add(reason)
            warnings.warn(f"{self._url}: {reason}", RecallWarning, stacklevel=6)
