"""Every data stage struck by every kind of fault at random moments, then run again: is anything lost?

`python -m benchmarks.crashes --seed 0 --each 20` writes `docs/crashes.md` and `docs/crashes.json`. After
each fault the stage's files are compared with those of a run that nothing disturbed. With `--stages` the
other stages keep the results they have. Ends with 1 if a stage did not survive.
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

from benchmarks.common.page import DOCS, write
from benchmarks.common.table import markdown
from benchmarks.crashes.faults import KINDS, Bench, bench, small_disk, strike
from benchmarks.crashes.store import running_store
from benchmarks.crashes.world import STAGES, served_world
from jobs.reporting.hardware import hardware
from retrieval.storage.root import Root

LIMIT_S = 600.0
"""A run that takes longer counts as hanging."""
TRIES = 2
"""For each wanted fault: one that comes after the end is drawn again."""
TAKES_TIME = ("seconds",)
PAGE = """# What a crash costs

Written by `make bench-crashes` (seed {seed}); each fault is in `crashes.json`.

**Machine:** {machine}; a Ray cluster of two nodes with one worker each.

**Faults:** *driver* and *worker* are killed (SIGKILL), a *node* is lost with all its processes, the *disk* is
filled to its last byte, the *store* (S3, through a proxy) drops all connections, at a moment drawn from the
seed. Where the stage ended, the fault is mended and the stage is run again. *Survived* means: every file of
the stage has the bytes that an undisturbed run writes, but for times in records; none is missing, too many or
unfinished; no process of the stage lives on; what killed processes had left on the disk before is swept. Lost
is the time beyond an undisturbed run's; most of it is the start of Ray workers.

{table}
"""


@dataclass(frozen=True)
class Outcome:
    """What a fault did. struck: before the stage's end; wrong: in words, empty where all was well."""

    stage: str
    kind: str
    moment_s: float
    struck: bool
    runs: int
    lost_s: float
    wrong: list[str]


@dataclass(frozen=True)
class Clean:
    """A stage that nothing disturbed: its files by name, and the seconds that it took."""

    files: dict[str, str]
    seconds: float


def files_of(root: Root, stage: str) -> dict[str, str]:
    """SHA-256 by name of each file of a stage, unfinished ones too; times in JSON do not count."""
    found = {}
    for name in root.list(stage):
        with root.open(name) as file:
            data = file.read()
        if name.endswith(".json"):
            data = json.dumps(_timeless(json.loads(data)), sort_keys=True).encode()
        found[name] = hashlib.sha256(data).hexdigest()
    if root.is_local:
        found |= {path.name: "unfinished" for path in root.local_path(stage).rglob(".partial-*")}
    return found


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _timeless(part) for key, part in value.items() if key not in TAKES_TIME}
    return [_timeless(part) for part in value] if isinstance(value, list) else value


def differences(found: dict[str, str], wanted: dict[str, str]) -> list[str]:
    """In words, for each file that is missing, too many or not the same."""
    words = [f"{name} is missing" for name in wanted.keys() - found.keys()]
    words += [f"{name} is too many" for name in found.keys() - wanted.keys()]
    words += [f"{name} differs" for name in found.keys() & wanted.keys() if found[name] != wanted[name]]
    return sorted(words)


def run_clean(bench: Bench, stage: str, root: Root) -> Clean:
    """Run a stage undisturbed."""
    driver = bench.start(stage, root)
    started = time.monotonic()
    driver.join(LIMIT_S)
    assert driver.exitcode == 0, f"{stage} ended with {driver.exitcode}; see {bench.world.folder}/driver.log"
    seconds = time.monotonic() - started
    return Clean(files_of(root, stage), seconds)


def suffer(bench: Bench, aim: tuple[str, str, int], root: Root, clean: Clean) -> Outcome:
    """Run a stage, strike it once, and run it again if it ended. aim: stage, kind, seed."""
    stage, kind, seed = aim
    rng = np.random.default_rng([seed, STAGES.index(stage), KINDS.index(kind)])
    moment = float(rng.uniform(0, clean.seconds))
    root.delete(stage)
    scratch = set(Path(tempfile.gettempdir()).iterdir())
    driver, runs = bench.start(stage, root), 1
    started = time.monotonic()
    driver.join(moment)
    mend = strike(kind, bench, driver, rng) if driver.is_alive() else None
    driver.join(LIMIT_S)
    if mend:
        mend()
    wrong = []
    while driver.exitcode != 0 and runs < 2:
        if driver.is_alive():
            wrong.append("it hangs")
            driver.kill()
        driver, runs = bench.start(stage, root), runs + 1
        driver.join(LIMIT_S)
    lost_s = time.monotonic() - started - clean.seconds
    if driver.exitcode != 0:
        wrong.append(f"the run after it ended with {driver.exitcode}")
        driver.kill()
    wrong += differences(files_of(root, stage), clean.files)
    if not bench.settled():
        wrong.append("a worker lives on")
    left = {path.name for path in scratch & set(Path(tempfile.gettempdir()).iterdir())}
    wrong += [f"{name} was left before and is not swept" for name in left if name.startswith("rdm-")]
    return Outcome(stage, kind, round(moment, 2), mend is not None, runs, round(lost_s, 2), wrong)


@dataclass(frozen=True)
class Matrix:
    """Stages by kinds of faults. count: faults of each kind that must strike each stage."""

    bench: Bench
    roots: dict[str, Root]
    seed: int
    count: int

    def prepare(self, stages: Sequence[str]) -> dict[str, Clean]:
        """Run the stages undisturbed, and copy what they wrote to the other roots."""
        local = self.roots["driver"]
        clean = {stage: run_clean(self.bench, stage, local) for stage in tqdm(stages, desc="undisturbed")}
        for root in (self.roots[kind] for kind in ("disk", "store") if kind in self.roots):
            for name in local.list(""):
                with local.open(name) as file:
                    root.write_bytes(name, file.read())
        return clean

    def strikes(self, stage: str, clean: Clean, bar: Any) -> Iterator[Outcome]:
        """The faults of one stage."""
        for kind, root in self.roots.items():
            bar.set_description(f"{stage}, {kind}")
            struck = 0
            for number in range(TRIES * self.count):
                if struck == self.count:
                    break
                outcome = suffer(self.bench, (stage, kind, 1000 * self.seed + number), root, clean)
                struck += outcome.struck
                bar.update(outcome.struck)
                for words in outcome.wrong[:3]:
                    bar.write(f"{stage}, {kind}: {words}")
                yield outcome
            bar.update(self.count - struck)


@contextmanager
def ready(seed: int) -> Iterator[tuple[Bench, dict[str, Root]]]:
    """A cluster, a world, and a root for each kind of fault that this machine allows."""
    multiprocessing.util.get_temp_dir()  # made now, it stands elsewhere than what is removed below
    with tempfile.TemporaryDirectory(prefix="crashes-") as name:
        folder = Path(name)
        with small_disk(folder / "disk") as disk, running_store() as store:
            scratch = (disk or folder) / "scratch"
            scratch.mkdir()
            with served_world(folder / "world", seed) as world:
                os.environ["TMPDIR"] = tempfile.tempdir = str(scratch)
                try:
                    local = Root(folder / "run")
                    roots = dict.fromkeys(("driver", "worker", "node"), local)
                    roots |= {"disk": Root(disk / "run")} if disk else {}
                    roots["store"] = Root(store.url("run"))
                    with bench(world, store.proxy, disk or folder) as made:
                        yield made, roots
                finally:
                    tempfile.tempdir = None  # the store puts back the environment


def rows(outcomes: Sequence[dict[str, Any]]) -> list[list[str]]:
    """A row a stage and kind: faults that struck, how many of them were survived, seconds lost."""
    found = []
    for stage, kind in dict.fromkeys((one["stage"], one["kind"]) for one in outcomes):
        struck = [one for one in outcomes if (one["stage"], one["kind"]) == (stage, kind) and one["struck"]]
        well = sum(not one["wrong"] for one in struck)
        lost = f"{median(one['lost_s'] for one in struck):.1f}" if struck else ""
        found.append([stage, kind, str(len(struck)), str(well), lost])
    return found


def page(result: dict[str, Any]) -> str:
    """The page's Markdown."""
    outcomes = result["outcomes"]
    heads = ["stage", "fault", "struck:", "survived:", "median s lost:"]
    wrong = [f"- {one['stage']}, {one['kind']}: {words}" for one in outcomes for words in one["wrong"][:3]]
    absent = [kind for kind in KINDS if kind not in {one["kind"] for one in outcomes}]
    notes = [f"Not tried here, for want of the right to mount a disk: {', '.join(absent)}."] if absent else []
    machine, seed = result["hardware"], result["seed"]
    table = markdown(heads, rows(outcomes))
    return "\n".join([PAGE.format(machine=machine, seed=seed, table=table), *notes, *wrong]).rstrip() + "\n"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.crashes", description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--each", type=int, default=20, help="faults that strike each stage")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--out", type=Path, default=DOCS / "crashes.md")
    given = parser.parse_args()
    logging.getLogger("ray").setLevel(logging.ERROR)
    with ready(given.seed) as (made, roots):
        matrix = Matrix(made, roots, given.seed, -(-given.each // len(roots)))
        clean = matrix.prepare(STAGES[: 1 + max(map(STAGES.index, given.stages))])
        with tqdm(total=len(given.stages) * len(roots) * matrix.count, unit="fault") as bar:
            wrong = [
                merge(given.out, given.seed, stage, list(matrix.strikes(stage, clean[stage], bar)))
                for stage in given.stages
            ]
    raise SystemExit(any(wrong))


def merge(out: Path, seed: int, stage: str, found: list[Outcome]) -> bool:
    """Write the page with a stage's outcomes in place of older ones. True if something went wrong."""
    known = out.with_suffix(".json")
    kept = json.loads(known.read_text())["outcomes"] if known.exists() else []
    outcomes = [one for one in kept if one["stage"] != stage] + [asdict(one) for one in found]
    outcomes.sort(key=lambda one: (STAGES.index(one["stage"]), KINDS.index(one["kind"])))
    result = {"hardware": hardware(), "seed": seed, "outcomes": outcomes}
    write(out.parent, out.stem, result, page(result))
    return any(one.wrong for one in found)


if __name__ == "__main__":
    main()
