"""The crash tests detect changed files, and the stage `filter` survives killed drivers and workers."""

import json
import os
import subprocess
from pathlib import Path

from benchmarks.common.report import REPOSITORY
from benchmarks.crashes.__main__ import page
from benchmarks.crashes.outcome import differences, files_of
from retrieval import Root
from tests.fork_server import WORKERS_ARE_FORKS


def outcome(kind: str, struck: bool, lost_s: float, wrong: list[str]) -> dict[str, object]:
    return {"stage": "embed", "kind": kind, "struck": struck, "lost_s": lost_s, "wrong": wrong}


def test_every_different_file_is_named_and_times_are_ignored(tmp_path: Path) -> None:
    before, after = Root(tmp_path / "before"), Root(tmp_path / "after")
    for root, seconds in ((before, 1.0), (after, 2.0)):
        root.write_json("stage/manifest.json", {"rows": 1, "shards": [{"seconds": seconds}]})
        root.write_bytes("stage/table", b"rows")
    assert differences(files_of(after, "stage"), files_of(before, "stage")) == []
    after.write_json("stage/manifest.json", {"rows": 2, "shards": []})
    after.delete("stage/table")
    after.write_bytes("stage/twice", b"rows")
    (tmp_path / "after/stage/.partial-1-table").touch()
    assert differences(files_of(after, "stage"), files_of(before, "stage")) == [
        ".partial-1-table is extra",
        "stage/manifest.json differs",
        "stage/table is missing",
        "stage/twice is extra",
    ]


def test_the_page_counts_faults_and_lists_problems() -> None:
    outcomes = [
        outcome("driver", True, 1.0, []),
        outcome("driver", True, 3.0, ["embed/a differs"]),
        outcome("driver", False, 9.0, []),
        outcome("disk", False, 9.0, []),
    ]
    machines = ["an old machine", "a machine", "a machine", "a machine"]
    rows = [{**each, "hardware": machine} for each, machine in zip(outcomes, machines, strict=True)]
    text = page({"seed": 7, "outcomes": rows})
    assert "**Machine:** a machine; an old machine; a Ray cluster" in text
    assert "| embed | driver | 2 | 1 | 2.0 |" in text
    assert "| embed | disk | 0 | 0 |  |" in text
    assert "- embed, driver: embed/a differs" in text
    assert "Not tested: worker, node, store, changed timeout, killed retry" in text


def test_filter_survives_the_loss_of_its_driver_and_of_a_worker(tmp_path: Path, forked_python: Path) -> None:
    """The benchmark has the other faults."""
    command = [str(forked_python), "-m", "benchmarks.crashes", "--each", "1", "--stages", "filter"]
    command += ["--cases", "driver", "worker", "--docs", str(tmp_path)]
    # The benchmark finds workers as children of a raylet, which forks are not.
    environment = {name: value for name, value in os.environ.items() if name != WORKERS_ARE_FORKS}
    subprocess.run(command, cwd=REPOSITORY, env=environment, check=True)
    outcomes = json.loads((tmp_path / "crashes.json").read_text())["outcomes"]
    assert {outcome["kind"] for outcome in outcomes if outcome["struck"]} == {"driver", "worker"}
