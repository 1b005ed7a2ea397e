"""Outcomes of crash tests: the files of a stage, compared with those of an undisturbed run, and their table."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from retrieval.storage.root import Root

TIME_KEYS = ("seconds",)


@dataclass(frozen=True)
class Outcome:
    """The effect of a fault. struck: it came before the end of the stage; wrong: a text for each problem."""

    stage: str
    kind: str
    moment_s: float
    struck: bool
    runs: int
    lost_s: float
    wrong: list[str]


@dataclass(frozen=True)
class CleanRun:
    """An undisturbed run of a stage: SHA-256 of its files by name, and its duration."""

    files: dict[str, str]
    seconds: float


def files_of(root: Root, stage: str) -> dict[str, str]:
    """SHA-256 by name of each file of a stage, unfinished files included; times in JSON are ignored."""
    digests = {}
    for name in root.list(stage):
        with root.open(name) as file:
            data = file.read()
        if name.endswith(".json"):
            data = json.dumps(_without_times(json.loads(data)), sort_keys=True).encode()
        digests[name] = hashlib.sha256(data).hexdigest()
    if root.is_local:
        digests |= {path.name: "unfinished" for path in root.local_path(stage).rglob(".partial-*")}
    return digests


def _without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_times(part) for key, part in value.items() if key not in TIME_KEYS}
    return [_without_times(part) for part in value] if isinstance(value, list) else value


def differences(files: dict[str, str], expected: dict[str, str], ignored: Sequence[str] = ()) -> list[str]:
    """One text for each file that is missing, extra or different. ignored: names of files whose content may differ."""
    texts = [f"{name} is missing" for name in expected.keys() - files.keys()]
    texts += [f"{name} is extra" for name in files.keys() - expected.keys()]
    changed = {name for name in files.keys() & expected.keys() if files[name] != expected[name]}
    texts += [f"{name} differs" for name in changed if name.rpartition("/")[2] not in ignored]
    return sorted(texts)


def table_rows(outcomes: Sequence[dict[str, Any]]) -> list[list[str]]:
    """A row for each stage and fault: number of faults, how many were survived, median seconds lost."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for outcome in outcomes:
        struck = groups.setdefault((outcome["stage"], outcome["kind"]), [])
        if outcome["struck"]:
            struck.append(outcome)
    rows = []
    for (stage, kind), struck in groups.items():
        survived = sum(not outcome["wrong"] for outcome in struck)
        lost = f"{median(outcome['lost_s'] for outcome in struck):.1f}" if struck else ""
        rows.append([stage, kind, str(len(struck)), str(survived), lost])
    return rows
