"""`make bench-crashes`: injects every kind of fault into every data stage, then runs the stage again.

After each fault the stage's files are compared with those of an undisturbed run. Writes `docs/crashes.md` and
`docs/crashes.json`; with `--stages` the results of the other stages are kept. Exits with 1 if a stage lost or
changed a file.
"""

import argparse
import hashlib
import json
import logging
import multiprocessing.util
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks.common.report import DOCS, markdown_table, write_report
from benchmarks.crashes.data_set import STAGES, served_data_set
from benchmarks.crashes.faults import FAULTS, CrashCluster, crash_cluster, inject, small_disk
from benchmarks.crashes.store import running_store
from jobs.reporting.hardware import hardware
from retrieval.storage.root import Root

LIMIT_S = 600.0
"""A longer run counts as hanging."""
ATTEMPTS = 2
"""Attempts for each fault: a fault that comes after the end of the stage is drawn again."""
TIME_KEYS = ("seconds",)
PAGE = """# Crash tests

Written by `make bench-crashes` (seed {seed}); each fault is in `crashes.json`.

**Machine:** {machine}; a Ray cluster of two nodes with one worker each.

**Faults:** the *driver* or a *worker* is killed (SIGKILL), a *node* is lost with all its processes, the
*disk* is filled completely, or the *store* (S3, through a proxy) drops all connections, at a time drawn from
the seed. If the stage ends, the fault is repaired and the stage is run again. *Survived* means: every file of
the stage has the bytes of an undisturbed run, except for times in records; no file is missing, extra or
unfinished; no process of the stage is left; temporary files of killed processes are removed. *Lost* is the
time beyond that of an undisturbed run; most of it is the start of Ray workers.

{table}
"""


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


def differences(files: dict[str, str], expected: dict[str, str]) -> list[str]:
    """One text for each file that is missing, extra or different."""
    texts = [f"{name} is missing" for name in expected.keys() - files.keys()]
    texts += [f"{name} is extra" for name in files.keys() - expected.keys()]
    texts += [f"{name} differs" for name in files.keys() & expected.keys() if files[name] != expected[name]]
    return sorted(texts)


def run_clean(cluster: CrashCluster, stage: str, root: Root) -> CleanRun:
    """Run a stage undisturbed."""
    driver = cluster.start(stage, root)
    started = time.monotonic()
    driver.join(LIMIT_S)
    assert driver.exitcode == 0, f"{stage} ended with {driver.exitcode}; see {cluster.data_set.folder}/driver.log"
    seconds = time.monotonic() - started
    return CleanRun(files_of(root, stage), seconds)


def run_with_fault(cluster: CrashCluster, fault: tuple[str, str, int], root: Root, clean: CleanRun) -> Outcome:
    """Run a stage, inject a fault, and run it again if it failed. fault: stage, kind, seed."""
    stage, kind, seed = fault
    rng = np.random.default_rng([seed, STAGES.index(stage), FAULTS.index(kind)])
    moment = float(rng.uniform(0, clean.seconds))
    root.delete(stage)
    earlier_files = set(Path(tempfile.gettempdir()).iterdir())
    driver, runs = cluster.start(stage, root), 1
    started = time.monotonic()
    driver.join(moment)
    repair = inject(kind, cluster, driver, rng) if driver.is_alive() else None
    driver.join(LIMIT_S)
    if repair:
        repair()
    wrong = []
    while driver.exitcode != 0 and runs < 2:
        if driver.is_alive():
            wrong.append("the run hangs")
            driver.kill()
        driver, runs = cluster.start(stage, root), runs + 1
        driver.join(LIMIT_S)
    lost_s = time.monotonic() - started - clean.seconds
    if driver.exitcode != 0:
        wrong.append(f"the run after the fault ended with {driver.exitcode}")
        driver.kill()
    wrong += differences(files_of(root, stage), clean.files)
    if not cluster.wait_for_workers_to_end():
        wrong.append("a worker process is left")
    left_files = {path.name for path in earlier_files & set(Path(tempfile.gettempdir()).iterdir())}
    wrong += [f"{name} of an earlier process is not removed" for name in left_files if name.startswith("rdm-")]
    return Outcome(stage, kind, round(moment, 2), repair is not None, runs, round(lost_s, 2), wrong)


@dataclass(frozen=True)
class Matrix:
    """All combinations of stages and faults. count: faults of each kind for each stage."""

    cluster: CrashCluster
    roots: dict[str, Root]
    seed: int
    count: int

    def prepare(self, stages: Sequence[str]) -> dict[str, CleanRun]:
        """Run the stages undisturbed, and copy their output to the other roots."""
        local = self.roots["driver"]
        clean = {stage: run_clean(self.cluster, stage, local) for stage in tqdm(stages, desc="undisturbed")}
        for root in (self.roots[kind] for kind in ("disk", "store") if kind in self.roots):
            for name in local.list(""):
                with local.open(name) as file:
                    root.write_bytes(name, file.read())
        return clean

    def outcomes(self, stage: str, clean: CleanRun, bar: Any) -> Iterator[Outcome]:
        """Inject all faults into one stage."""
        for kind, root in self.roots.items():
            bar.set_description(f"{stage}, {kind}")
            struck = 0
            for number in range(ATTEMPTS * self.count):
                if struck == self.count:
                    break
                outcome = run_with_fault(self.cluster, (stage, kind, 1000 * self.seed + number), root, clean)
                struck += outcome.struck
                bar.update(outcome.struck)
                for text in outcome.wrong[:3]:
                    bar.write(f"{stage}, {kind}: {text}")
                yield outcome
            bar.update(self.count - struck)


@contextmanager
def prepared_cluster(seed: int) -> Iterator[tuple[CrashCluster, dict[str, Root]]]:
    """A cluster with a data set, and a root for each kind of fault that this machine allows."""
    multiprocessing.util.get_temp_dir()  # created now, outside of the folder that is removed below
    with tempfile.TemporaryDirectory(prefix="crashes-") as name:
        folder = Path(name)
        with small_disk(folder / "disk") as disk, running_store() as store:
            scratch = (disk or folder) / "scratch"
            scratch.mkdir()
            with served_data_set(folder / "data_set", seed) as data_set:
                os.environ["TMPDIR"] = tempfile.tempdir = str(scratch)
                try:
                    local = Root(folder / "run")
                    roots = dict.fromkeys(("driver", "worker", "node"), local)
                    roots |= {"disk": Root(disk / "run")} if disk else {}
                    roots["store"] = Root(store.url("run"))
                    with crash_cluster(data_set, store.proxy, disk or folder) as cluster:
                        yield cluster, roots
                finally:
                    tempfile.tempdir = None  # running_store restores the environment


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


def page(result: dict[str, Any]) -> str:
    """The page as Markdown."""
    outcomes = result["outcomes"]
    headings = ["stage", "fault", "faults:", "survived:", "median s lost:"]
    problems = [
        f"- {outcome['stage']}, {outcome['kind']}: {text}" for outcome in outcomes for text in outcome["wrong"][:3]
    ]
    missing = [kind for kind in FAULTS if kind not in {outcome["kind"] for outcome in outcomes}]
    notes = [f"Not tested, because this process may not mount a disk: {', '.join(missing)}."] if missing else []
    machine, seed = result["hardware"], result["seed"]
    table = markdown_table(headings, table_rows(outcomes))
    return "\n".join([PAGE.format(machine=machine, seed=seed, table=table), *notes, *problems]).rstrip() + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.crashes", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="seed of the times of the faults")
    parser.add_argument("--each", type=int, default=20, help="faults for each stage")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES), help="stages to test")
    parser.add_argument("--out", type=Path, default=DOCS / "crashes.md", help="the page")
    options = parser.parse_args()
    logging.getLogger("ray").setLevel(logging.ERROR)
    with prepared_cluster(options.seed) as (cluster, roots):
        matrix = Matrix(cluster, roots, options.seed, -(-options.each // len(roots)))
        clean = matrix.prepare(STAGES[: 1 + max(map(STAGES.index, options.stages))])
        with tqdm(total=len(options.stages) * len(roots) * matrix.count, unit="fault") as bar:
            failed = [
                merge(options.out, options.seed, stage, list(matrix.outcomes(stage, clean[stage], bar)))
                for stage in options.stages
            ]
    raise SystemExit(any(failed))


def merge(out: Path, seed: int, stage: str, outcomes: list[Outcome]) -> bool:
    """Write the page with new outcomes of a stage in place of its old ones. True if there was a problem."""
    path = out.with_suffix(".json")
    old = json.loads(path.read_text())["outcomes"] if path.exists() else []
    merged = [outcome for outcome in old if outcome["stage"] != stage] + [asdict(new) for new in outcomes]
    merged.sort(key=lambda outcome: (STAGES.index(outcome["stage"]), FAULTS.index(outcome["kind"])))
    result = {"hardware": hardware(), "seed": seed, "outcomes": merged}
    write_report(out.parent, out.stem, result, page(result))
    return any(outcome.wrong for outcome in outcomes)


if __name__ == "__main__":
    main()
