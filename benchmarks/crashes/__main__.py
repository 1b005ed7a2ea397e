"""`make bench-crashes`: injects every kind of fault into every data stage, and plays the cases of `cases.py`.

After each fault the stage's files are compared with those of an undisturbed run. Writes `docs/crashes.md` and
`docs/crashes.json` after each fault; with `--stages` and `--cases` the other results are kept. Exits with 1 if a stage
lost or changed a file.
"""

import json
import logging
import multiprocessing.util
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks.common.report import benchmark_parser, write_atomically
from benchmarks.crashes.cases import CASES, CaseWorld
from benchmarks.crashes.cases import STAGE as CASE_STAGE
from benchmarks.crashes.data_set import MODULES, STAGES, ServedPictures, served_data_set
from benchmarks.crashes.faults import DRIVER, FAULTS, Command, CrashCluster, crash_cluster, inject, small_disk
from benchmarks.crashes.outcome import CleanRun, Outcome, differences, files_of, table_rows
from benchmarks.crashes.store import running_store
from jobs.reporting.hardware import hardware
from jobs.reporting.tables import markdown_table
from retrieval.storage.root import Root

KINDS = (*FAULTS, *CASES)
LIMIT_S = 600.0
"""A longer run counts as hanging."""
OUTAGE_S = 3.0
"""Time from a fault to its repair."""
CASE_COUNT = 2
"""Runs of each case, with other seeds."""
ATTEMPTS = 5
"""Attempts for each fault: a fault that comes after the end of the stage is drawn again."""
PAGE = """# Crash tests

Written by `make bench-crashes` (seed {seed}); each fault is in `crashes.json`.

**Machine:** {machine}; a Ray cluster of two nodes with one worker each.

**Faults:** the *driver* or a *worker* is killed (SIGKILL), a *node* is lost with all its processes, the
*disk* is filled completely, or the *store* (S3, through a proxy) drops all connections, at a time drawn from
the seed. The fault is repaired after {outage:g} s; if the stage ends, it is run again. *Survived* means: every file of
the stage has the bytes of an undisturbed run, except for times in records; no file is missing, extra or
unfinished; no process of the stage is left; temporary files of killed processes are removed. *Lost* is the
time beyond that of an undisturbed run; most of it is the start of Ray workers.

**Cases** of the download: a finished stage with a *changed timeout* keeps its files; a *killed retry* loses no
picture; of *two drivers* the second is refused; a *sick node* without the store does not stop the others; *losses at
start* of more workers than a shard may lose do not stop the stage; *killed workers*: one every 30 s for ten minutes,
while the stage is made again and again.

{table}
"""


def run_clean(cluster: CrashCluster, stage: str, root: Root) -> CleanRun:
    driver = cluster.start(Command(stage, root.url))
    started = time.monotonic()
    driver.join(LIMIT_S)
    assert driver.exitcode == 0, f"{stage} ended with {driver.exitcode}; see {cluster.data_set.folder}/driver.log"
    return CleanRun(files_of(root, stage), time.monotonic() - started)


def run_with_fault(cluster: CrashCluster, fault: tuple[str, str, int], root: Root, clean: CleanRun) -> Outcome:
    """Run a stage, inject a fault, and run it again if it failed. fault: stage, kind, seed."""
    stage, kind, seed = fault
    rng = np.random.default_rng([seed, STAGES.index(stage), FAULTS.index(kind)])
    moment = float(rng.uniform(0, clean.seconds))
    root.delete(stage)
    earlier_files = set(Path(tempfile.gettempdir()).iterdir())
    driver, runs = cluster.start(Command(stage, root.url)), 1
    started = time.monotonic()
    driver.join(moment)
    repair = inject(kind, cluster, driver, rng) if driver.is_alive() else None
    if repair:
        driver.join(OUTAGE_S)
        repair()
    driver.join(LIMIT_S)
    wrong = []
    while driver.exitcode != 0 and runs < 2:
        if driver.is_alive():
            wrong.append("the run hangs")
            driver.kill()
        driver, runs = cluster.start(Command(stage, root.url)), runs + 1
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
    """Stages, faults and cases. roots: by fault; count: faults of each kind for each stage."""

    cluster: CrashCluster
    pictures: ServedPictures
    roots: dict[str, Root]
    seed: int
    count: int

    def prepare(self, stages: Sequence[str]) -> dict[str, CleanRun]:
        """Run the stages undisturbed, and copy their output to the other roots.

        The first stage runs twice and its second run counts: the first one reads the libraries from the disk.
        """
        local = self.roots["driver"]
        run_clean(self.cluster, stages[0], local)
        local.delete(stages[0])
        clean = {stage: run_clean(self.cluster, stage, local) for stage in tqdm(stages, desc="undisturbed")}
        for root in (self.roots[kind] for kind in ("disk", "store") if kind in self.roots):
            for name in local.list(""):
                with local.open(name) as file:
                    root.write_bytes(name, file.read())
        return clean

    def fault_outcomes(self, stage: str, kind: str, clean: CleanRun) -> Iterator[Outcome]:
        """Inject faults of one kind into one stage. A run that ended before its fault gives the later times."""
        struck = 0
        for number in range(ATTEMPTS * self.count):
            if struck == self.count:
                break
            fault = stage, kind, 1000 * self.seed + number
            outcome = run_with_fault(self.cluster, fault, self.roots[kind], clean)
            struck += outcome.struck
            if not outcome.struck:
                clean = replace(clean, seconds=clean.seconds + min(outcome.lost_s, 0.0))
            yield outcome

    def case_outcomes(self, name: str, clean: CleanRun) -> Iterator[Outcome]:
        world = CaseWorld(self.cluster, self.pictures, self.roots["driver"], self.roots["store"], clean)
        for number in range(CASE_COUNT):
            for root in (world.local, world.store):
                root.delete(CASE_STAGE)
            started = time.monotonic()
            wrong = CASES[name](world, np.random.default_rng([self.seed, number, *name.encode()]))
            if not self.cluster.wait_for_workers_to_end():
                wrong.append("a worker process is left")
            seconds = round(time.monotonic() - started - clean.seconds, 2)
            yield Outcome(CASE_STAGE, name, 0.0, True, 1, seconds, wrong)


@contextmanager
def prepared_cluster(seed: int) -> Iterator[tuple[CrashCluster, ServedPictures, dict[str, Root]]]:
    """A cluster with a data set, its pictures, and a root for each kind of fault that this machine allows."""
    multiprocessing.util.get_temp_dir()  # created now, outside of the folder that is removed below
    pictures = ServedPictures()
    with tempfile.TemporaryDirectory(prefix="crashes-") as name:
        folder = Path(name)
        with small_disk(folder / "disk") as disk, running_store() as store:
            scratch = (disk or folder) / "scratch"
            scratch.mkdir()
            with served_data_set(folder / "data_set", seed, pictures) as data_set:
                os.environ["TMPDIR"] = tempfile.tempdir = str(scratch)
                try:
                    local = Root(folder / "run")
                    roots = dict.fromkeys(("driver", "worker", "node"), local)
                    roots |= {"disk": Root(disk / "run")} if disk else {}
                    roots["store"] = Root(store.url("run"))
                    with crash_cluster(data_set, store.proxy, disk or folder) as cluster:
                        yield cluster, pictures, roots
                finally:
                    tempfile.tempdir = None  # running_store restores the environment


def page(result: dict[str, Any]) -> str:
    outcomes = result["outcomes"]
    headings = ["stage", "fault", "faults:", "survived:", "median s lost:"]
    problems = [
        f"- {outcome['stage']}, {outcome['kind']}: {text}" for outcome in outcomes for text in outcome["wrong"][:3]
    ]
    missing = [kind for kind in KINDS if kind not in {outcome["kind"] for outcome in outcomes}]
    notes = [f"Not tested: {', '.join(missing)}."] if missing else []
    machine = "; ".join(sorted({outcome["hardware"] for outcome in outcomes}))
    table = markdown_table(headings, table_rows(outcomes))
    text = PAGE.format(machine=machine, seed=result["seed"], outage=OUTAGE_S, table=table)
    return "\n".join([text, *notes, *problems]).rstrip() + "\n"


class Report:
    """The page and its JSON, written after each outcome. Outcomes of other stages and kinds are kept."""

    def __init__(self, docs: Path, seed: int, pairs: Sequence[tuple[str, str]]) -> None:
        self.stored = docs / "crashes.json"
        self.seed = seed
        self.failed = False
        stored = json.loads(self.stored.read_text())["outcomes"] if self.stored.exists() else []
        self.outcomes = [outcome for outcome in stored if (outcome["stage"], outcome["kind"]) not in pairs]

    def add(self, outcome: Outcome) -> None:
        """Add an outcome and write the page."""
        self.failed |= bool(outcome.wrong)
        self.outcomes.append({**asdict(outcome), "hardware": hardware()})
        self.outcomes.sort(key=lambda each: (STAGES.index(each["stage"]), KINDS.index(each["kind"])))
        result = {"seed": self.seed, "outcomes": self.outcomes}
        self.stored.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.stored, json.dumps(result, indent=1) + "\n")
        write_atomically(self.stored.with_suffix(".md"), page(result))


def main() -> None:
    parser = benchmark_parser("crashes", __doc__)
    parser.add_argument("--seed", type=int, default=0, help="seed of the times of the faults")
    parser.add_argument("--each", type=int, default=20, help="faults for each stage")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES), help="stages to test")
    parser.add_argument("--cases", nargs="+", choices=KINDS, default=list(KINDS), help="faults and cases to test")
    options = parser.parse_args()
    logging.getLogger("ray").setLevel(logging.ERROR)
    stages = STAGES[: 1 + max(map(STAGES.index, options.stages))]
    libraries = ["open_clip"] if "embed" in stages else []
    DRIVER.set_forkserver_preload(["benchmarks.crashes.faults", *(MODULES[stage] for stage in stages), *libraries])
    with prepared_cluster(options.seed) as (cluster, pictures, roots):
        faults = [kind for kind in options.cases if kind in roots]
        cases = [kind for kind in options.cases if kind in CASES]
        matrix = Matrix(cluster, pictures, roots, options.seed, -(-options.each // len(roots)))
        pairs = [(CASE_STAGE, kind) for kind in cases if CASE_STAGE in options.stages]
        pairs += [(stage, kind) for stage in options.stages for kind in faults]
        clean = matrix.prepare(stages)
        report = Report(options.docs, options.seed, pairs)
        with tqdm(pairs, unit="pair") as bar:
            for stage, kind in bar:
                bar.set_description(f"{stage}, {kind}")
                play = matrix.case_outcomes if kind in CASES else partial(matrix.fault_outcomes, stage)
                for outcome in play(kind, clean[stage]):
                    report.add(outcome)
                    bar.write(f"{stage}, {kind}: {'; '.join(outcome.wrong[:3]) or f'survived, {outcome.lost_s} s'}")
    print(report.stored.with_suffix(".md").read_text())
    raise SystemExit(report.failed)


if __name__ == "__main__":
    main()
