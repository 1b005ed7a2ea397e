"""The progress of each stage, from its manifest and completion records.

Reads `<stage>/manifest.json`, `<stage>/started.json` and `<stage>/records/`; writes nothing and does not use
Ray, so it also works while a stage runs elsewhere. Times are the modification times of the record files.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from typing import Literal

from fsspec.core import url_to_fs

from retrieval.config import Config
from retrieval.errors import UserError
from retrieval.storage import object_store
from retrieval.storage.listing import deletion_named
from retrieval.storage.manifest import Manifest, ShardRecord, fingerprint, read_manifest, read_record
from retrieval.storage.root import Root
from retrieval.storage.stage_folder import listing_splits, setting_differences

State = Literal["not started", "unfinished", "finished", "stale"]

PHASES = {
    "filter": ("scan", "dedupe", "select"),
    "index": ("centroids", "shuffle", "repeated", "partitions", "calibration"),
    "neighbors": ("route", "match", "merge", "recall"),
}
"""Stages that run in phases, and the folders of each phase's records, in order."""
SPLITS = ("train/", "database/")
"""Beginnings of shard names. Records of other names count left-out rows."""
EQUAL_PHASES = {"select": "scan", "merge": "route"}
"""Phases that have as many shards as an earlier phase."""
MAX_RECORDS = 2_000
"""Most records that are read of an unfinished stage; of more, an even sample is read and its sums scaled."""
THREADS = 16
"""Files read at once: an object store has high latency but serves many requests."""
RECENT_SHARE, RECENT_MIN, RECENT_MAX = 0.1, 8, 1_000
"""The most recent shards, which the remaining time is estimated from: a tenth, within these bounds."""


@dataclass(frozen=True)
class StageSpec:
    """A stage as the recipe defines it. name: its name in fingerprints; folder: its folder in the root."""

    name: str
    folder: str
    config: Config | None
    """Its settings; None if its output does not depend on a section."""
    totals: Mapping[str, int] = field(default_factory=dict)
    """Number of shards by phase ("" for a stage without phases), as far as upstream manifests state it."""
    shards: Sequence[str] = ()
    """Names of its shards, as far as upstream manifests state them: they divide the listing of its records."""
    changed: str = ""
    """Which inputs of a finished stage changed that are no stages, in words."""


@dataclass(frozen=True)
class Status:
    """The progress of a stage. Counts of an unfinished stage are those of its current phase."""

    stage: str
    state: State
    note: str = ""
    """Why a stage is stale; when the last shard of an unfinished stage finished."""
    phase: str = ""
    unit: str = "shards"
    done: int = 0
    total: int | None = None
    """Number of shards; None if no manifest states it."""
    rows: int = 0
    rows_per_s: float | None = None
    """Of all workers, over the last run of a finished stage or the recent shards of an unfinished one."""
    bytes: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    """Rows not kept, by reason, highest count first."""
    eta_s: float | None = None
    """Estimated seconds until the phase ends, at the rate of the recent shards; None if unknown."""
    is_estimate: bool = False
    """Rows, bytes and reasons are scaled up from a sample of the records."""


UpstreamStages = dict[str, tuple[Status, Manifest | None]]
"""Status and manifest of earlier stages, by the name under which manifests list them as upstream."""


def stage_status(
    root: Root, spec: StageSpec, manifest: Manifest | None, upstream: UpstreamStages, now: float
) -> Status:
    """The status of one stage. manifest: from `find_manifest`; now: in seconds since 1970.

    The manifest is an argument because the caller needs it too, and it is large at 2.3B rows.
    """
    times = _record_times(root, spec.folder, manifest.shard_names() if manifest else spec.shards)
    if manifest:
        status = _finished(root, spec.name, manifest, times)
        reason = _stale_reason(manifest, spec, upstream)
        return replace(status, state="stale", note=reason) if reason else status
    if not times and not root.exists(f"{spec.folder}/started.json"):
        return Status(spec.name, "not started")
    return _unfinished(root, spec, times, now)


def find_manifest(root: Root, folder: str) -> Manifest | None:
    """The manifest of a stage's folder, or None if there is none."""
    return read_manifest(root, folder) if root.exists(f"{folder}/manifest.json") else None


def _finished(root: Root, name: str, manifest: Manifest, times: Mapping[str, float]) -> Status:
    num_shards = len(manifest.shards) - len(manifest.shard_names("dropped/"))
    ended = modified_at(root, f"{manifest.stage}/manifest.json")
    # A resumed stage stores the seconds of its last run, which processed only a part of the shards.
    last_run = [time for time in times.values() if time >= ended - manifest.seconds - 1]
    share = len(last_run) / len(times) if times else 1.0
    return Status(
        name,
        "finished",
        done=num_shards,
        total=num_shards,
        rows=manifest.rows,
        rows_per_s=manifest.rows * share / manifest.seconds if manifest.seconds and share else None,
        bytes=manifest.bytes,
        reasons=_by_count(manifest.reasons),
    )


def _stale_reason(manifest: Manifest, spec: StageSpec, upstream: UpstreamStages) -> str:
    """Why the stage's command would run it again, or "". Files and format versions are not compared."""
    if spec.config is not None:
        current = fingerprint(spec.name, manifest.schema_version, spec.config, manifest.upstream)
        if current != manifest.fingerprint:
            differences = setting_differences(manifest.config, spec.config.output_fields())
            return f"made {'; '.join(differences) or 'by another version of the code'}; {all_again(manifest)}"
    if spec.changed:
        return spec.changed
    for name, digest in manifest.upstream.items():
        if name not in upstream:
            continue
        status, source = upstream[name]
        if source is None:
            return f"{name}, which it was made from, is {status.state}"
        parts = (source.identity_of(split) for split in SPLITS)
        if digest not in (source.fingerprint, source.identity, *parts):
            return f"made from another {name}: {_made_again(manifest, name, source)}"
        if status.state == "stale":
            return f"made from {name}, which is stale"
    return ""


def _made_again(manifest: Manifest, name: str, source: Manifest) -> str:
    """What the stage's command makes again for a changed input. name, source: the input's name and manifest."""
    if not any(name in shard.inputs for shard in manifest.shards):
        return all_again(manifest)
    prefix = "" if "/" in manifest.shards[0].shard else "train/"  # stages of training images alone omit it
    digests = {shard: digest for shard, digest in source.digests().items() if shard.startswith(prefix or SPLITS)}
    made = {f"{prefix}{shard.shard}": shard for shard in manifest.shards}
    outdated = [shard for key, shard in made.items() if shard.inputs.get(name) != digests.get(key)]
    missing = digests.keys() - made.keys()
    added = [shard for shard in source.shards if shard.shard in missing]
    # Bytes and seconds of added shards are estimated from those of the finished rows.
    ratio = sum(shard.rows for shard in added) / max(1, manifest.rows)
    rows = sum(shard.rows for shard in (*outdated, *added))
    size = _bytes(outdated) + ratio * manifest.bytes
    seconds = _seconds(outdated) + ratio * _seconds(manifest.shards)
    new = f" and {len(added):,} {'is' if len(added) == 1 else 'are'} new" if added else ""
    return (
        f"{len(outdated):,} of {len(manifest.shards):,} shards are outdated{new}, {rows:,} rows, {size / 1e6:,.1f} MB,"
        f" {format_duration(seconds)} of one worker"
    )


def all_again(manifest: Manifest) -> str:
    """What the command of a stage makes again if it cannot keep any shard."""
    # A resumed stage stores the seconds of its last run.
    return (
        f"all is made again with --remake, {manifest.rows:,} rows, {manifest.bytes / 1e6:,.1f} MB,"
        f" at least {format_duration(manifest.seconds)}"
    )


def _bytes(shards: Iterable[ShardRecord]) -> int:
    return sum(file.bytes for shard in shards for file in shard.files)


def _seconds(shards: Iterable[ShardRecord]) -> float:
    return sum(shard.seconds for shard in shards)


def _unfinished(root: Root, spec: StageSpec, times: Mapping[str, float], now: float) -> Status:
    phase, names = _current_phase(spec.name, times)
    total = _total(spec, phase, times)
    finished = sorted(times[name] for name in names)
    rate = _shards_per_s(finished)
    records = _read_records(root, spec.folder, names)
    scale = len(names) / len(records) if records else 0.0
    rows = round(scale * sum(record.rows for record in records))
    reasons: Counter[str] = Counter()
    for record in records:
        reasons.update(record.reasons)
    return Status(
        spec.name,
        "unfinished",
        note=_last_shard_note(finished, now),
        phase=phase,
        done=len(names),
        total=total,
        rows=rows,
        rows_per_s=rate * rows / len(names) if rate and rows else None,
        bytes=round(scale * _bytes(records)),
        reasons=_by_count({word: round(scale * count) for word, count in reasons.items()}),
        eta_s=(total - len(names)) / rate if rate and total and not _is_stalled(finished, now) else None,
        is_estimate=len(records) < len(names),
    )


def _current_phase(stage: str, times: Mapping[str, float]) -> tuple[str, list[str]]:
    """The last phase that has records, and their names; all records for a stage without phases."""
    for phase in reversed(PHASES.get(stage, ())):
        names = sorted(name for name in times if name.partition("/")[0] == phase)
        if names:
            return phase, names
    return (PHASES[stage][0], []) if stage in PHASES else ("", sorted(times))


def _total(spec: StageSpec, phase: str, times: Mapping[str, float]) -> int | None:
    if phase in EQUAL_PHASES:
        return sum(name.startswith(f"{EQUAL_PHASES[phase]}/") for name in times)
    return spec.totals.get(phase)


def _recent(finished: Sequence[float]) -> Sequence[float]:
    """The most recent completion times. finished: all completion times, ascending."""
    return finished[-max(RECENT_MIN, min(RECENT_MAX, int(len(finished) * RECENT_SHARE))) :]


def _shards_per_s(finished: Sequence[float]) -> float | None:
    """Shards a second over the recent completion times; None if there are too few."""
    recent = _recent(finished)
    if len(recent) < RECENT_MIN or recent[-1] <= recent[0]:
        return None
    return (len(recent) - 1) / (recent[-1] - recent[0])


def _is_stalled(finished: Sequence[float], now: float) -> bool:
    """True if no shard finished for so long that the recent rate no longer applies."""
    gaps = [after - before for before, after in pairwise(_recent(finished))]
    return now - finished[-1] > 60 + 5 * max(gaps, default=0.0) if finished else True


def _last_shard_note(finished: Sequence[float], now: float) -> str:
    if not finished:
        return "no shard is done yet"
    note = f"last shard {format_duration(now - finished[-1])} ago"
    return f"{note}: interrupted, or its shards take long" if _is_stalled(finished, now) else note


def _read_records(root: Root, folder: str, names: Sequence[str]) -> list[ShardRecord]:
    """The records of these names, or an even sample of MAX_RECORDS of them; in order."""
    count = min(len(names), MAX_RECORDS)
    sample = [names[number * len(names) // count] for number in range(count)]
    with ThreadPoolExecutor(THREADS) as pool:
        records = list(pool.map(partial(_read, root, folder), sample))
    return [record for record in records if record]


def _read(root: Root, folder: str, name: str) -> ShardRecord | None:
    try:
        stored = read_record(root, folder, name)
    except (UserError, FileNotFoundError):  # the stage was restarted meanwhile
        return None
    return stored[1] if stored else None


def _record_times(root: Root, stage: str, shards: Iterable[str]) -> dict[str, float]:
    """Modification time of each record by shard name, from a single listing. shards: as far as known."""
    folder = f"{stage}/records/"
    return {
        file.name.removeprefix(folder).removesuffix(".json"): file.modified
        for file in root.files(folder, listing_splits(stage, shards))
        if file.name.endswith(".json") and not file.name.startswith(f"{folder}former/")
    }


def modified_at(root: Root, name: str) -> float:
    """Modification time of a file, in seconds since 1970. Raises UserError if it was deleted meanwhile."""
    with deletion_named():
        return object_store.modified_at(root.fs.info(str(url_to_fs(root.at(name))[1])))


def _by_count(reasons: Mapping[str, int]) -> dict[str, int]:
    return dict(sorted(reasons.items(), key=lambda item: (-item[1], item[0])))


def format_duration(seconds: float) -> str:
    """A duration as text: `42 s`, `3 min`, `5 h 12 min`, `4 d 3 h`."""
    minutes, hours = round(seconds / 60), round(seconds / 3600)
    if seconds < 100:
        return f"{max(0.0, seconds):.0f} s"
    if minutes < 100:
        return f"{minutes} min"
    if hours < 48:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{hours // 24} d {hours % 24} h"
