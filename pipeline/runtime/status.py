"""How far each stage is, from the manifests and completion records alone.

Reads `<stage>/manifest.json`, `<stage>/started.json` and `<stage>/records/`; writes nothing and needs no Ray,
so it may look at a root on which a stage is at work elsewhere. Times are those that the storage gives the
records' files.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import partial
from itertools import pairwise
from typing import Any, Literal

from fsspec.core import url_to_fs

from retrieval.config import Config
from retrieval.errors import UserError
from retrieval.storage.manifest import Manifest, ShardRecord, fingerprint, read_manifest, read_record
from retrieval.storage.root import Root

State = Literal["not started", "unfinished", "finished", "stale"]

PHASES = {
    "filter": ("scan", "dedupe", "select"),
    "index": ("centroids", "shuffle", "partitions", "calibration"),
    "neighbors": ("route", "match", "merge", "recall"),
}
"""Stages that make shards of several kinds, one kind after the other, and the folders of their records."""
AS_MANY = {"select": "scan", "merge": "route"}
"""Phases of as many shards as an earlier one had."""
RECORDS_READ = 2_000
"""Records read of an unfinished stage; of more, as many are drawn evenly and their sums scaled."""
READERS = 16
"""Files read at once: an object store answers slowly, but to many."""
RECENT, FEWEST, MOST = 0.1, 8, 1_000
"""The last part, by which the time left is judged: a tenth of the shards done, within these bounds."""
NAMED = 3
"""Differing settings that are named."""
MODIFIED = ("mtime", "LastModified", "last_modified", "modified", "updated", "created")
"""What file systems call the time at which a file was written."""


@dataclass(frozen=True)
class Wanted:
    """A stage as the recipe wants it. word: its name in fingerprints; folder: where it stands."""

    word: str
    folder: str
    config: Config | None
    """Its settings; None where its output does not depend on a section."""
    totals: Mapping[str, int] = field(default_factory=dict)
    """Shards to make, by phase ("" for a stage without phases), where upstream manifests say."""


@dataclass(frozen=True)
class Status:
    """How far a stage is. Counts of an unfinished stage are those of its phase."""

    stage: str
    state: State
    note: str = ""
    """Of a stale stage why, of an unfinished one since when nothing came."""
    phase: str = ""
    unit: str = "shards"
    done: int = 0
    total: int | None = None
    """Shards to make, or None where no manifest says."""
    rows: int = 0
    rows_per_s: float | None = None
    """Over the last run of a finished stage, over the last part of an unfinished one; rows of all workers."""
    bytes: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    """Rows not kept by reason, most first."""
    eta_s: float | None = None
    """Seconds until the phase is done at the pace of the last part; None where that cannot be told."""
    is_estimate: bool = False
    """Rows, bytes and reasons are scaled up from a part of the records."""


Known = dict[str, tuple[Status, Manifest | None]]
"""The stages looked at before, by the name under which manifests list them as upstream."""


def look(root: Root, wanted: Wanted, known: Known, now: float) -> Status:
    """The state of one stage. now: seconds since 1970, by the clock of the storage."""
    return judge(root, wanted, manifest_of(root, wanted.folder), known, now)


def judge(root: Root, wanted: Wanted, manifest: Manifest | None, known: Known, now: float) -> Status:
    """`look` at a stage whose manifest was read already: at 2.3B rows it is large. None: it has none."""
    times = _record_times(root, wanted.folder)
    if manifest:
        status = _finished(root, wanted.word, manifest, times)
        why = _why_stale(manifest, wanted, known)
        return replace(status, state="stale", note=why) if why else status
    if not times and not root.exists(f"{wanted.folder}/started.json"):
        return Status(wanted.word, "not started")
    return _unfinished(root, wanted, times, now)


def manifest_of(root: Root, folder: str) -> Manifest | None:
    """The manifest of a stage's folder, or None while there is none."""
    return read_manifest(root, folder) if root.exists(f"{folder}/manifest.json") else None


def _finished(root: Root, word: str, manifest: Manifest, times: Mapping[str, float]) -> Status:
    shards = [shard for shard in manifest.shards if not shard.shard.startswith("dropped/")]
    ended = modified_at(root, f"{manifest.stage}/manifest.json")
    # A resumed stage notes the seconds of its last run alone, in which not all shards were made.
    made = [when for when in times.values() if when >= ended - manifest.seconds - 1]
    share = len(made) / len(times) if times else 1.0
    return Status(
        word,
        "finished",
        done=len(shards),
        total=len(shards),
        rows=manifest.rows,
        rows_per_s=manifest.rows * share / manifest.seconds if manifest.seconds and share else None,
        bytes=sum(file.bytes for shard in manifest.shards for file in shard.files),
        reasons=_most_first(manifest.reasons),
    )


def _why_stale(manifest: Manifest, wanted: Wanted, known: Known) -> str:
    """Why the stage's command would make it anew, or nothing. Files and formats are not compared."""
    if wanted.config is not None:
        now = fingerprint(wanted.word, manifest.schema_version, wanted.config, manifest.upstream)
        if now != manifest.fingerprint:
            return f"made {_differences(manifest.config, wanted.config.output_fields())}"
    for name, digest in manifest.upstream.items():
        if name not in known:
            continue
        status, upstream = known[name]
        if upstream is None:
            return f"{name}, which it was made from, is {status.state}"
        if digest not in (upstream.fingerprint, upstream.identity):
            return f"made from another {name}"
        if status.state == "stale":
            return f"made from {name}, which is stale"
    return ""


def _differences(made: Mapping[str, Any], asked: Mapping[str, Any]) -> str:
    """The settings that differ, as `with k = 4, the recipe has 8`."""
    theirs, ours = dict(_flat(made)), dict(_flat(asked))
    found = [
        f"with {name} = {theirs[name]!r}, the recipe has {value!r}" if name in theirs else f"without {name}"
        for name, value in ours.items()
        if name not in theirs or theirs[name] != value
    ]
    more = [f"{len(found) - NAMED} more differences"] if len(found) > NAMED else []
    return "; ".join([*found[:NAMED], *more]) or "by another version of the code"


def _flat(sections: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in sections.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _unfinished(root: Root, wanted: Wanted, times: Mapping[str, float], now: float) -> Status:
    phase, names = _current_phase(wanted.word, times)
    total = _total(wanted, phase, times)
    seen = sorted(times[name] for name in names)
    pace = _pace(seen)
    records = _read_records(root, wanted.folder, names)
    scale = len(names) / len(records) if records else 0.0
    rows = round(scale * sum(record.rows for record in records))
    reasons: Counter[str] = Counter()
    for record in records:
        reasons.update(record.reasons)
    return Status(
        wanted.word,
        "unfinished",
        note=_since(seen, now),
        phase=phase,
        done=len(names),
        total=total,
        rows=rows,
        rows_per_s=pace * rows / len(names) if pace and rows else None,
        bytes=round(scale * sum(file.bytes for record in records for file in record.files)),
        reasons=_most_first({word: round(scale * count) for word, count in reasons.items()}),
        eta_s=(total - len(names)) / pace if pace and total and not _is_quiet(seen, now) else None,
        is_estimate=len(records) < len(names),
    )


def _current_phase(word: str, times: Mapping[str, float]) -> tuple[str, list[str]]:
    """The last phase that has records, and their names; all records for a stage without phases."""
    for phase in reversed(PHASES.get(word, ())):
        names = sorted(name for name in times if name.partition("/")[0] == phase)
        if names:
            return phase, names
    return (PHASES[word][0], []) if word in PHASES else ("", sorted(times))


def _total(wanted: Wanted, phase: str, times: Mapping[str, float]) -> int | None:
    if phase in AS_MANY:
        return sum(name.startswith(f"{AS_MANY[phase]}/") for name in times)
    return wanted.totals.get(phase)


def _pace(seen: Sequence[float]) -> float | None:
    """Shards a second over the last part. seen: times of completion, sorted."""
    last = seen[-max(FEWEST, min(MOST, int(len(seen) * RECENT))) :]
    if len(last) < FEWEST or last[-1] <= last[0]:
        return None
    return (len(last) - 1) / (last[-1] - last[0])


def _is_quiet(seen: Sequence[float], now: float) -> bool:
    """True if nothing came for so long that the pace of the last part tells nothing any more."""
    last = seen[-max(FEWEST, min(MOST, int(len(seen) * RECENT))) :]
    gaps = [after - before for before, after in pairwise(last)]
    return now - seen[-1] > 60 + 5 * max(gaps, default=0.0) if seen else True


def _since(seen: Sequence[float], now: float) -> str:
    if not seen:
        return "no shard is done yet"
    ago = f"last shard {duration(now - seen[-1])} ago"
    return f"{ago}: interrupted, or its shards take long" if _is_quiet(seen, now) else ago


def _read_records(root: Root, folder: str, names: Sequence[str]) -> list[ShardRecord]:
    """The records of these names, or as many of them as are read, drawn evenly; in order."""
    count = min(len(names), RECORDS_READ)
    chosen = [names[number * len(names) // count] for number in range(count)]
    with ThreadPoolExecutor(READERS) as pool:
        found = list(pool.map(partial(_read, root, folder), chosen))
    return [record for record in found if record]


def _read(root: Root, folder: str, name: str) -> ShardRecord | None:
    try:
        found = read_record(root, folder, name)
    except (UserError, FileNotFoundError):  # the stage began anew while we looked
        return None
    return found[1] if found else None


def _record_times(root: Root, folder: str) -> dict[str, float]:
    """When each record was written, by name of its shard: one listing, however many there are."""
    root.fs.invalidate_cache()
    base = _path(root, f"{folder}/records")
    if not root.exists(f"{folder}/records"):
        return {}
    found: dict[str, dict[str, Any]] = root.fs.find(base, detail=True)
    names = {path: path[path.rindex(base) + len(base) :].lstrip("/") for path in found}
    return {
        name.removesuffix(".json"): _modified(found[path])
        for path, name in names.items()
        if name.endswith(".json") and ".partial-" not in name
    }


def _path(root: Root, name: str) -> str:
    """A name as the root's file system spells it."""
    return str(url_to_fs(root.at(name))[1])


def modified_at(root: Root, name: str) -> float:
    """When a file was written, in seconds since 1970."""
    return _modified(root.fs.info(_path(root, name)))


def _modified(info: Mapping[str, Any]) -> float:
    found = next((info[key] for key in MODIFIED if info.get(key)), 0.0)
    return found.timestamp() if isinstance(found, datetime) else float(found)


def _most_first(reasons: Mapping[str, int]) -> dict[str, int]:
    return dict(sorted(reasons.items(), key=lambda item: (-item[1], item[0])))


def duration(seconds: float) -> str:
    """Seconds for people: `42 s`, `3 min`, `5 h 12 min`, `4 d 3 h`."""
    minutes, hours = round(seconds / 60), round(seconds / 3600)
    if seconds < 100:
        return f"{max(0.0, seconds):.0f} s"
    if minutes < 100:
        return f"{minutes} min"
    if hours < 48:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{hours // 24} d {hours % 24} h"
